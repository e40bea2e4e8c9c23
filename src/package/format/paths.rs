//! Which paths a package may have files at. It is unpacked by people who did not make it, into a folder that they, their shell
//! and their tools then work in: a file that tools run by themselves must not come that way, nor one whose name is not what
//! it looks like. Packing refuses the same paths, so that whatever is packed can be unpacked.

use super::record::SourceFile;
use crate::error::{Error, Result, is_harmless};
use std::collections::HashSet;

/// Hidden files that tools of model hubs put into models, though others that begin so are refused.
const HARMLESS: [&str; 3] = [".gitattributes", ".gitignore", ".gitkeep"];

/// How hidden files begin that shells, git and editors run, or read commands from, by themselves.
const STARTS: [&str; 24] = [
    ".git",
    ".hg",
    ".svn",
    ".bzr",
    ".jj",
    ".bash",
    ".zsh",
    ".zlog",
    ".vim",
    ".nvim",
    ".emacs",
    ".dir-locals",
    ".xsession",
    ".xinit",
    ".env",
    ".gdb",
    ".lldb",
    ".pnp",
    ".yarnrc",
    ".eslintrc",
    ".babelrc",
    ".mise",
    ".autoenv",
    ".pre-commit",
];

/// How they end: `.npmrc`, `.profile`, `.Renviron`, `.gdbinit`, `.login`.
const ENDS: [&str; 9] =
    ["rc", "profile", "environ", "environment", "init", "login", "logout", "aliases", ".conf"];

/// And their whole names, and those of folders that hold such files.
const NAMES: [&str; 44] = [
    ".config",
    ".local",
    ".ssh",
    ".gnupg",
    ".pki",
    ".forward",
    ".rhosts",
    ".shosts",
    ".vscode",
    ".idea",
    ".vs",
    ".fleet",
    ".zed",
    ".cursor",
    ".claude",
    ".devcontainer",
    ".direnv",
    ".husky",
    ".circleci",
    ".travis.yml",
    ".cargo",
    ".docker",
    ".kube",
    ".aws",
    ".azure",
    ".jupyter",
    ".ipython",
    ".mvn",
    ".m2",
    ".gradle",
    ".terraform",
    ".vagrant",
    ".my.cnf",
    ".ghci",
    ".iex.exs",
    ".mailcap",
    ".htaccess",
    ".user.ini",
    ".pip",
    ".bundle",
    ".stack",
    ".julia",
    ".mozilla",
    ".wine",
];

/// Whether a hidden file or folder of this name may be one that something runs by itself, or takes commands or keys from.
fn runs(name: &str) -> bool {
    let name = name.to_lowercase();
    name.starts_with('.')
        && !HARMLESS.contains(&name.as_str())
        && (NAMES.contains(&name.as_str())
            || STARTS.iter().any(|start| name.starts_with(start))
            || ENDS.iter().any(|end| name.ends_with(end)))
}

/// The longest name of a file, and the longest path, in bytes.
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4096;

/// What is wrong with a path, `/` between its parts, that might not stay in the folder; `None` where nothing is.
pub(crate) fn leads_elsewhere(path: &str) -> Option<&'static str> {
    let elsewhere = |p: &str| p.is_empty() || p == "." || p == ".." || p.len() > MAX_NAME || p.contains('\0');
    (path.len() > MAX_PATH || path.split('/').any(elsewhere)).then_some("has a path that leads elsewhere")
}

/// What is wrong with the path of a file in a folder; `None` where nothing is.
pub(crate) fn objection(path: &str) -> Option<&'static str> {
    // Some scripts join letters by these two.
    let shown = |c: char| is_harmless(c) || matches!(c, '\u{200c}' | '\u{200d}');
    if let Some(what) = leads_elsewhere(path) {
        Some(what)
    } else if !path.chars().all(shown) {
        Some(
            "has a character in its path that terminals do not show as it is (a control, or a turn of direction)",
        )
    } else if path.split('/').any(runs) {
        Some(
            "has the name of what shells, git and editors run by themselves (as .git and .bashrc), which no package holds",
        )
    } else if path.split('/').any(|p| p.starts_with('-')) {
        Some("has a path that commands take for an option")
    } else {
        None
    }
}

/// Paths stay inside the folder that they are unpacked to, do no harm there, and none is in the way of another.
pub(super) fn check_files(files: &[SourceFile], folder: bool) -> Result<()> {
    let bad = |path: &str, what: &str| Err(Error::corrupt(format!("the source file `{path}` {what}")));
    let mut paths = HashSet::new();
    for file in files {
        let path = file.path.as_str();
        // The name of a single file says where it came from, not where it goes.
        if let Some(what) = if folder { objection(path) } else { leads_elsewhere(path) } {
            return bad(path, what);
        }
        if !folder && path.contains('/') {
            return bad(path, "lies in a folder, but the package was made from a file");
        }
        if !paths.insert(path) {
            return bad(path, "is there twice");
        }
    }
    for path in &paths {
        let above = path.match_indices('/').find(|(i, _)| paths.contains(&path[..*i]));
        if above.is_some() {
            return bad(path, "lies in another file");
        }
    }
    if !folder && files.len() > 1 {
        return Err(Error::corrupt(format!("made from one file, but {} are listed", files.len())));
    }
    if !folder && files.iter().any(|f| f.header_bytes.is_none()) {
        return Err(Error::corrupt("made from one file, which has no tensors"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_models_are_fine_and_others_are_not() {
        for path in [
            "model.safetensors",
            "onnx/model_quantized.onnx",
            ".gitattributes",
            "a/.gitkeep",
            ".hidden",
            "...",
            ".DS_Store",
            ".mdl",
            ".huggingface/x",
            ".eval_results/a.yaml",
            "a b/Modell für Öl (2).txt",
            "模型/تجربه\u{200c}ها.json",
            "a..b",
            "x-",
        ] {
            assert_eq!(objection(path), None, "{path}");
        }
        let long = "x".repeat(MAX_NAME + 1);
        let deep = "a/".repeat(MAX_PATH / 2) + "b";
        for path in [
            "",
            "/",
            "..",
            "a/../b",
            "a//b",
            "a\0b",
            &long,
            &deep,
            ".git/hooks/post-checkout",
            "a/.GIT/config",
            ".bashrc",
            ".npmrc",
            ".Rprofile",
            ".zshenv",
            ".ZSHENV",
            ".gitmodules",
            ".github/workflows/x.yml",
            ".gdbinit",
            ".tmux.conf",
            "a/.envrc",
            ".vscode/tasks.json",
            "a\x1b[2J",
            "a\nb",
            "a\u{9b}31m",
            "a\u{202e}gpj.exe",
            "a\u{2066}",
            "a\u{61c}",
            "\u{feff}a",
            "-rf",
            "a/--checkpoint-action=exec=sh",
            "a\u{7f}",
        ] {
            assert!(objection(path).is_some(), "{path:?}");
        }
    }
}
