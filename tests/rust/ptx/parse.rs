//! The text of PTX as statements: kernels with their parameters, shared memory, registers and labels. What an instruction
//! means is `decode.rs`. Syntax: PTX ISA, chapter 4.

use std::collections::HashMap;

/// A register as the interpreter numbers it: a value of up to 64 bits, or a predicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    Value(u32),
    Predicate(u32),
}

/// One instruction, as it is written.
pub(crate) struct Statement<'t> {
    pub(crate) line: u32,
    /// The predicate that it is under, and whether it is negated.
    pub(crate) guard: Option<(u32, bool)>,
    pub(crate) name: &'t str,
    pub(crate) arguments: Vec<&'t str>,
    /// Of `.pragma "used_bytes_mask"`: which bytes of the load are used, a bit each.
    pub(crate) used: u32,
    /// The innermost scope of registers that it sees.
    pub(crate) scope: usize,
}

/// Registers that one `.reg` declares: one of this name, or so many whose names begin with it.
struct Declared<'t> {
    many: Option<u32>,
    prefix: &'t str,
    first: Register,
}

/// A pair of braces: what is declared in it, and the one around it.
#[derive(Default)]
struct Scope<'t> {
    around: Option<usize>,
    declared: Vec<Declared<'t>>,
}

/// A kernel before its instructions are decoded.
pub(crate) struct Source<'t> {
    pub(crate) name: &'t str,
    /// Names and bytes of the parameters.
    pub(crate) params: Vec<(&'t str, u32)>,
    /// The shared variable: name, alignment and bytes.
    pub(crate) shared: Option<(&'t str, u64, u64)>,
    /// The file's tables of constants: name and bytes.
    pub(crate) tables: Vec<(&'t str, Vec<u8>)>,
    pub(crate) statements: Vec<Statement<'t>>,
    /// Where each label is, as the number of a statement.
    pub(crate) labels: HashMap<&'t str, u32>,
    /// Bits of each register of values.
    pub(crate) values: Vec<u8>,
    pub(crate) predicates: u32,
    scopes: Vec<Scope<'t>>,
}

impl Source<'_> {
    /// The register called `name` where the scope is in sight.
    pub(crate) fn register(&self, scope: usize, name: &str) -> Option<Register> {
        let scope = &self.scopes[scope];
        let one = |declared: &Declared<'_>| match declared.many {
            None => (declared.prefix == name).then_some(declared.first),
            Some(many) => {
                let digits = name.strip_prefix(declared.prefix)?;
                let at: u32 = digits.parse().ok().filter(|at| *at < many)?;
                Some(match declared.first {
                    Register::Value(first) => Register::Value(first + at),
                    Register::Predicate(first) => Register::Predicate(first + at),
                })
            }
        };
        scope.declared.iter().rev().find_map(one).or_else(|| self.register(scope.around?, name))
    }
}

/// Every kernel of a file.
pub(crate) fn kernels(text: &str) -> Result<Vec<Source<'_>>, String> {
    let mut found = vec![];
    let tables = tables(text)?;
    let mut rest = text;
    let line_of = |at: &str| 1 + text[..text.len() - at.len()].matches('\n').count() as u32;
    while let Some(at) = rest.find(".entry ") {
        rest = &rest[at + ".entry ".len()..];
        let (name, after) = rest.split_once('(').ok_or("an entry without parameters")?;
        let (params, after) = after.split_once(')').ok_or("parameters without an end")?;
        let open = after.find("\n{").ok_or("an entry without a body")?;
        let body = &after[open + 2..];
        let close = body.find("\n}").ok_or("a body without an end")?;
        let params = params.split(',').map(parameter).collect::<Result<_, _>>()?;
        let mut source = Reader::new(name.trim(), params).read(&body[..close], line_of(body))?;
        source.tables.clone_from(&tables);
        found.push(source);
        rest = &body[close..];
    }
    Ok(found)
}

/// Each `.const .align 8 .b8 NAME[N] = {..};`.
fn tables(text: &str) -> Result<Vec<(&str, Vec<u8>)>, String> {
    text.split('\n').filter(|line| line.starts_with(".const")).map(table).collect()
}

fn table(line: &str) -> Result<(&str, Vec<u8>), String> {
    let rest = line.strip_prefix(".const .align 8 .b8 ").ok_or("a table of unknown words")?;
    let (name, rest) = rest.split_once('[').ok_or("a table without a size")?;
    let (size, rest) = rest.split_once("] = {").ok_or("a table without bytes")?;
    let bytes = rest.trim_end_matches(['}', ';']).split(',').map(|b| b.trim().parse::<u8>());
    let mut bytes: Vec<u8> = bytes.collect::<Result<_, _>>().map_err(|e| format!("the table {name}: {e}"))?;
    let size = size.parse().ok().filter(|size| *size >= bytes.len());
    // Bytes that are not named are zeros.
    bytes.resize(size.ok_or_else(|| format!("the table {name} has more bytes than it says"))?, 0);
    Ok((name, bytes))
}

fn parameter(text: &str) -> Result<(&str, u32), String> {
    let mut words = text.split_whitespace();
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some(".param"), Some(".u64"), Some(name), None) => Ok((name, 8)),
        (Some(".param"), Some(".u32"), Some(name), None) => Ok((name, 4)),
        _ => Err(format!("the parameter `{}` is of no known kind", text.trim())),
    }
}

/// Reads a body, statement by statement.
struct Reader<'t> {
    into: Source<'t>,
    scope: usize,
    used: u32,
}

impl<'t> Reader<'t> {
    fn new(name: &'t str, params: Vec<(&'t str, u32)>) -> Self {
        let into = Source {
            name,
            params,
            shared: None,
            tables: vec![],
            statements: vec![],
            labels: HashMap::new(),
            values: vec![],
            predicates: 0,
            scopes: vec![Scope::default()],
        };
        Self { into, scope: 0, used: u32::MAX }
    }

    fn read(mut self, body: &'t str, first: u32) -> Result<Source<'t>, String> {
        for (i, line) in body.split('\n').enumerate() {
            let at = first + i as u32;
            let line = line.split("//").next().unwrap_or("");
            for part in line.split_inclusive(';') {
                self.part(part.trim(), at).map_err(|e| format!("line {at} of the PTX: {e}"))?;
            }
        }
        Ok(self.into)
    }

    fn part(&mut self, part: &'t str, line: u32) -> Result<(), String> {
        let mut text = part;
        loop {
            text = text.trim_start();
            if let Some(inner) = text.strip_prefix('{') {
                self.into.scopes.push(Scope { around: Some(self.scope), declared: vec![] });
                self.scope = self.into.scopes.len() - 1;
                text = inner;
            } else if let Some(after) = text.strip_prefix('}') {
                self.scope = self.into.scopes[self.scope].around.ok_or("a brace too many")?;
                text = after;
            } else if let Some((label, after)) =
                text.split_once(':').filter(|(label, _)| label.starts_with('$'))
            {
                self.into.labels.insert(label, self.into.statements.len() as u32);
                text = after;
            } else {
                break;
            }
        }
        if text.is_empty() {
            return Ok(());
        }
        let text = text.strip_suffix(';').ok_or_else(|| format!("`{text}` has no end"))?;
        if text.starts_with('.') { self.directive(text) } else { self.statement(text, line) }
    }

    fn directive(&mut self, text: &'t str) -> Result<(), String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            [".reg", kind, name] => self.declare(kind, name),
            [".shared", ".align", align, ".b8", variable] => {
                let (name, bytes) =
                    variable.strip_suffix(']').and_then(|v| v.split_once('[')).ok_or("no array")?;
                let number = |text: &str| text.parse::<u64>().map_err(|e| e.to_string());
                let variable = (name, number(align)?, number(bytes)?);
                self.into.shared.replace(variable).map_or(Ok(()), |_| Err("two shared variables".into()))
            }
            [".pragma", "\"nounroll\""] => Ok(()),
            [".pragma", "\"used_bytes_mask", mask] => {
                self.used = mask.trim_end_matches('"').parse().map_err(|_| format!("a mask of {mask}"))?;
                Ok(())
            }
            _ => Err(format!("an unknown directive: {text}")),
        }
    }

    fn declare(&mut self, kind: &str, name: &'t str) -> Result<(), String> {
        let (prefix, many) = match name.strip_suffix('>').and_then(|n| n.split_once('<')) {
            None => (name, None),
            Some((prefix, many)) => (prefix, Some(many.parse::<u32>().map_err(|e| e.to_string())?)),
        };
        let count = many.unwrap_or(1);
        let first = match kind {
            ".pred" => {
                self.into.predicates += count;
                Register::Predicate(self.into.predicates - count)
            }
            ".b16" | ".b32" | ".b64" | ".f32" | ".f64" => {
                let first = self.into.values.len();
                let bits = kind[2..].parse().map_err(|_| format!("registers of {kind}"))?;
                self.into.values.resize(first + count as usize, bits);
                Register::Value(first as u32)
            }
            _ => return Err(format!("registers of the unknown kind {kind}")),
        };
        self.into.scopes[self.scope].declared.push(Declared { many, prefix, first });
        Ok(())
    }

    fn statement(&mut self, text: &'t str, line: u32) -> Result<(), String> {
        let (guard, text) = match text.strip_prefix('@') {
            None => (None, text),
            Some(rest) => {
                let (name, text) = rest.split_once(char::is_whitespace).ok_or("a guard of nothing")?;
                let plain = name.trim_start_matches('!');
                match self.into.register(self.scope, plain) {
                    Some(Register::Predicate(p)) => (Some((p, plain != name)), text.trim_start()),
                    _ => return Err(format!("the guard {name} is no predicate")),
                }
            }
        };
        let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let used = std::mem::replace(&mut self.used, u32::MAX);
        let arguments = arguments(rest.trim());
        self.into.statements.push(Statement { line, guard, name, arguments, used, scope: self.scope });
        Ok(())
    }
}

/// Parts between commas; what stands in braces or brackets is one.
fn arguments(text: &str) -> Vec<&str> {
    let (mut out, mut depth, mut from) = (vec![], 0, 0);
    for (i, c) in text.char_indices() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' if depth == 0 => {
                out.push(text[from..i].trim());
                from = i + 1;
            }
            _ => {}
        }
    }
    if !text[from..].trim().is_empty() {
        out.push(text[from..].trim());
    }
    out
}
