//! Promise: `csrc/xorz.h` and the Rust behind it are one contract. Every function is on both sides with as
//! many parameters, every constant has one value, every struct one layout; and no panic leaves the door.

use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::process::Command;
use xorz::codec::{Encoding, Prefer};
use xorz::error::{Error, Kind};
use xorz::ffi::{Task, capi, guard};
use xorz::matrix::Dtype;
use xorz::package::Codec;
use xorz::vector::Executor;

const BRIDGE: [&str; 4] = [
    include_str!("../../../src/ffi/bridge.rs"),
    include_str!("../../../src/ffi/bridge/arguments.rs"),
    include_str!("../../../src/ffi/bridge/device.rs"),
    include_str!("../../../src/ffi/bridge/products.rs"),
];
const HEADER: &str = include_str!("../../../csrc/xorz.h");
const RUST: [&str; 6] = [
    include_str!("../../../src/ffi/capi/mod.rs"),
    include_str!("../../../src/ffi/capi/exchanges.rs"),
    include_str!("../../../src/ffi/capi/files.rs"),
    include_str!("../../../src/ffi/capi/ops.rs"),
    include_str!("../../../src/ffi/capi/packages.rs"),
    include_str!("../../../src/ffi/capi/pointers.rs"),
];

fn without_comments(c: &str) -> String {
    let mut out = String::new();
    let mut rest = c;
    while let Some(start) = rest.find("/*") {
        out.push_str(&rest[..start]);
        rest = rest[start..].split_once("*/").expect("comments end").1;
    }
    out + rest
}

/// Name to number of parameters, for every `name(..)` that `opens` says is a declaration.
fn functions(text: &str, opens: impl Fn(&str) -> bool) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for (at, _) in text.match_indices("xorz_") {
        let name: String =
            text[at..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        let after = &text[at + name.len()..];
        if after.starts_with('(') && opens(&text[..at]) {
            let inside = after[1..].split_once(')').expect("closed").0.trim().trim_end_matches(',');
            let count = if inside.is_empty() || inside == "void" { 0 } else { inside.split(',').count() };
            assert!(found.insert(name.clone(), count).is_none(), "{name} is declared twice");
        }
    }
    found
}

#[test]
fn every_function_is_declared_and_defined() {
    let header = functions(&without_comments(HEADER), |before| {
        let word = before.trim_end_matches([' ', '*']).rsplit([' ', '\n']).next().unwrap_or("");
        matches!(word, "int32_t" | "uint32_t" | "uint64_t" | "void" | "char")
    });
    let rust = functions(&RUST.concat(), |before| before.ends_with("extern \"C\" fn "));
    assert!(header.len() > 20, "the header was not understood");
    assert_eq!(header, rust);
    let exported = RUST.concat().matches("#[unsafe(no_mangle)]").count();
    assert_eq!(exported, rust.len(), "an export is not called xorz_*");
}

/// What follows `start` in `text` up to the end of its block.
fn block<'t>(text: &'t str, start: &str) -> &'t str {
    let from = text.find(start).unwrap_or_else(|| panic!("`{start}` is not there"));
    let open = from + text[from..].find('{').expect("a block");
    let mut depth = 0usize;
    let closes = |c: char| {
        depth = if c == '{' { depth + 1 } else { depth - usize::from(c == '}') };
        depth == 0
    };
    let end = open + text[open..].find(closes).expect("the block is closed");
    &text[open..=end]
}

/// No panic passes a door, and none is caught twice on the way: each function that leaves the crate guards
/// once, itself or through the one helper that does it for C, and nothing that they call guards again.
#[test]
fn every_exported_function_guards_exactly_once() {
    // Constants and counters: nothing in them can panic.
    let cannot_panic = [
        "xorz_abi_version",
        "xorz_version",
        "xorz_panels_restored",
        "xorz_scratch_peak_bytes",
        "xorz_reset_counters",
        "note_exact_panel",
    ];
    let guards = |body: &str| {
        let ways = ["guard(", "call(error, ", "free("];
        ways.iter().map(|way| body.matches(way).count()).sum::<usize>()
    };
    let mut doors: Vec<(String, usize)> = Vec::new();
    let rust = RUST.concat();
    for name in functions(&rust, |before| before.ends_with("extern \"C\" fn ")).into_keys() {
        doors.push((name.clone(), guards(block(&rust, &format!("fn {name}(")))));
    }
    let bridge = BRIDGE.concat();
    let (declared, defined) = bridge.split_once("unsafe extern \"C++\"").expect("the shim's own functions");
    for declaration in block(declared, "extern \"Rust\"").split(" fn ").skip(1) {
        let name = declaration.split('(').next().expect("a name");
        // A task is run by the caller's threads, and catches what happens there itself.
        if name != "call" {
            doors.push((name.into(), guards(block(defined, &format!("fn {name}(")))));
        }
    }
    assert!(doors.len() > 45, "only {} doors were found", doors.len());
    for (name, guarded) in &doors {
        let want = usize::from(!cannot_panic.contains(&name.as_str()));
        assert_eq!(*guarded, want, "{name} guards {guarded} times");
    }
    // The two helpers of the C ABI guard, and else nobody but the doors.
    let direct = |text: &str| text.matches("guard(").count();
    let alone = |c: bool| {
        let names = doors.iter().filter(|(name, _)| name.starts_with("xorz_") == c).map(|(name, _)| name);
        names.map(|n| direct(block(if c { &rust } else { defined }, &format!("fn {n}(")))).sum::<usize>()
    };
    assert_eq!(
        (direct(&rust), direct(&bridge)),
        (2 + alone(true), alone(false)),
        "a guard outside of a door"
    );
}

/// What the C compiler says of `expressions`.
fn ask_c(expressions: &[String]) -> Vec<i64> {
    let folder = tempfile::tempdir().expect("folder");
    let (source, binary) = (folder.path().join("ask.c"), folder.path().join("ask"));
    let prints: String =
        expressions.iter().map(|e| format!("  printf(\"%lld\\n\", (long long)({e}));\n")).collect();
    let text = format!("#include <stdio.h>\n{HEADER}\nint main(void) {{\n{prints}  return 0;\n}}\n");
    std::fs::write(&source, text).expect("written");
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let args = ["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror"];
    let status =
        Command::new(cc).args(args).arg(&source).arg("-o").arg(&binary).status().expect("a C compiler");
    assert!(status.success(), "the header does not compile as C11");
    let out = Command::new(&binary).output().expect("runs").stdout;
    String::from_utf8(out).expect("text").lines().map(|l| l.parse().expect("a number")).collect()
}

fn compare(pairs: Vec<(String, i64)>) {
    let said = ask_c(&pairs.iter().map(|(e, _)| e.clone()).collect::<Vec<_>>());
    assert_eq!(said.len(), pairs.len());
    for ((expression, ours), theirs) in pairs.into_iter().zip(said) {
        assert_eq!(theirs, ours, "{expression}");
    }
}

#[test]
fn constants_are_equal() {
    let mut pairs: Vec<(String, i64)> = Vec::new();
    pairs.extend(Dtype::ALL.iter().map(|d| (format!("XORZ_{}", d.name()), *d as i64)));
    pairs.extend(
        Encoding::ALL.iter().map(|e| (format!("XORZ_ENCODING_{}", e.name().to_uppercase()), *e as i64)),
    );
    pairs.extend(
        Codec::ALL
            .iter()
            .filter(|c| c.on_request())
            .map(|c| (format!("XORZ_CODEC_{}", c.name().to_uppercase().replace('-', "_")), *c as i64)),
    );
    let kinds = [
        ("CORRUPT", Kind::Corrupt),
        ("TRUNCATED", Kind::Truncated),
        ("MISMATCH", Kind::Mismatch),
        ("UNSUPPORTED", Kind::Unsupported),
        ("INVALID_ARGUMENT", Kind::InvalidArgument),
        ("IO", Kind::Io),
        ("DEVICE", Kind::Device),
        ("INTERNAL", Kind::Internal),
    ];
    pairs.extend(kinds.map(|(n, k)| (format!("XORZ_{n}"), k as i64)));
    pairs.push(("XORZ_OK".into(), 0));
    pairs.push(("XORZ_RUN_NO_SHA256".into(), i64::from(capi::NO_SHA256)));
    pairs.push(("XORZ_RUN_TRUST_SHA256".into(), i64::from(capi::TRUST_SHA256)));
    pairs.push(("XORZ_RUN_WATCHED".into(), i64::from(capi::WATCHED)));
    pairs.push(("XORZ_CODEC_FAST".into(), i64::from(capi::CODEC_FAST)));
    pairs.push(("XORZ_CODEC_SMALLEST".into(), i64::from(capi::CODEC_SMALLEST)));
    pairs.push(("XORZ_ABI_VERSION".into(), i64::from(capi::xorz_abi_version())));
    pairs.push(("XORZ_MESSAGE_BYTES".into(), capi::MESSAGE_BYTES as i64));
    compare(pairs);
    assert!(matches!(["speed", "memory"].map(str::parse::<Prefer>), [Ok(Prefer::Speed), Ok(Prefer::Memory)]));
}

macro_rules! layout {
    ($pairs:ident, $c:literal, $rust:ty, $($field:ident),+) => {
        $pairs.push((format!("sizeof({})", $c), size_of::<$rust>() as i64));
        $($pairs.push((format!("offsetof({}, {})", $c, stringify!($field)), offset_of!($rust, $field) as i64));)+
    };
}

#[test]
fn structs_have_one_layout() {
    let mut pairs = Vec::new();
    layout!(pairs, "xorz_error", capi::XorzError, kind, message);
    layout!(pairs, "xorz_buffer", capi::XorzBuffer, data, length);
    layout!(pairs, "xorz_matrix", capi::XorzMatrix, words, bytes, n, k, dtype);
    layout!(pairs, "xorz_executor", capi::XorzExecutor, context, threads, run);
    layout!(
        pairs,
        "xorz_delta_info_t",
        capi::XorzDeltaInfo,
        encoding,
        dtype,
        n,
        k,
        tile_rows,
        tile_cols,
        changed,
        base_digest
    );
    layout!(pairs, "xorz_run", capi::XorzRun, jobs, flags, stop);
    layout!(pairs, "xorz_watch", capi::XorzWatch, stop, stages, total, done);
    layout!(pairs, "xorz_part", capi::XorzPart, delta, delta_bytes, base);
    layout!(pairs, "xorz_tensor", capi::XorzTensor, name, dtype, dims, rank, data, bytes);
    layout!(pairs, "xorz_options", capi::XorzOptions, prefer, codec, level, trust, strip_prefix);
    compare(pairs);
}

#[test]
fn a_panic_becomes_an_error() {
    let e = guard::<()>(|| panic!("lost {}", 42)).expect_err("an error");
    assert_eq!(e.kind(), Kind::Internal);
    assert!(e.message().contains("lost 42"), "{e}");
    assert_eq!(guard(|| Ok(7)), Ok(7));
    assert_eq!(guard::<()>(|| Err(Error::io("no"))).expect_err("an error").kind(), Kind::Io);
}

#[test]
fn a_task_runs_at_most_once_and_a_panic_in_a_worker_is_told() {
    let runs = std::sync::atomic::AtomicUsize::new(0);
    let count = |_: usize| {
        runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    };
    let task = Task::new(3, &count);
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| (0..9).for_each(|i| task.call(i)));
        }
    });
    assert_eq!(task.finish(), Ok(()));
    assert_eq!(runs.load(std::sync::atomic::Ordering::Relaxed), 3);

    let task = Task::new(2, &count);
    task.call(0);
    assert!(task.finish().expect_err("one is missing").message().contains("1 of 2"));

    let bad = |i: usize| assert!(i != 1, "worker {i} failed");
    let task = Task::new(2, &bad);
    (0..2).for_each(|i| task.call(i));
    let e = task.finish().expect_err("a panic");
    assert_eq!(e.kind(), Kind::Internal);
    assert!(e.message().contains("worker 1 failed"), "{e}");
}

#[test]
fn a_foreign_executor_without_a_function_is_refused() {
    let none = capi::XorzExecutor { context: std::ptr::null_mut(), threads: 0, run: None };
    assert_eq!(none.threads(), 1);
    assert_eq!(none.run(1, &|_| ()).expect_err("refused").kind(), Kind::InvalidArgument);
}
