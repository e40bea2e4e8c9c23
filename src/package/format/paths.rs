//! Which paths a package may have files at. It is unpacked by people who did not make it, into a folder that they, their shell
//! and their tools then work in: a file that tools run by themselves must not come that way, nor one whose name is not what
//! it looks like. Packing refuses the same paths, so that whatever is packed can be unpacked.

use crate::error::is_harmless;

/// Hidden files and folders that tools of model hubs put into models. Nothing runs any of them.
const HIDDEN: [&str; 9] = [
    ".gitattributes",
    ".gitignore",
    ".gitkeep",
    ".eval_results",
    ".huggingface",
    ".mdl",
    ".msc",
    ".mv",
    ".DS_Store",
];

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
    } else if path.split('/').any(|p| p.starts_with('.') && !HIDDEN.contains(&p)) {
        Some(
            "is hidden, as what shells and tools run by themselves is (.git, .bashrc), which no package may hold",
        )
    } else if path.split('/').any(|p| p.starts_with('-')) {
        Some("has a path that commands take for an option")
    } else {
        None
    }
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
