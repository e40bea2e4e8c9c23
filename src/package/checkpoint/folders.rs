//! What lies in people's folders: which files are a checkpoint's, what systems and tools drop beside them, and which folder is
//! meant where a Hugging Face cache is named. Names and links only; no file is read but a cache's `refs`.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// What systems and tools keep beside a model and that is no part of it: files and folders.
const DROPPINGS: [&str; 23] = [
    ".git",
    ".hg",
    ".svn",
    ".cache",
    ".huggingface",
    ".locks",
    ".no_exist",
    ".ipynb_checkpoints",
    ".DS_Store",
    ".AppleDouble",
    ".Spotlight-V100",
    ".TemporaryItems",
    ".Trashes",
    ".fseventsd",
    "__MACOSX",
    "Thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "$RECYCLE.BIN",
    "System Volume Information",
    "@eaDir",
    "#recycle",
    "lost+found",
];
/// How names begin that macOS, NFS and FUSE give to what they drop.
const DROPPED: [&str; 4] = ["._", ".nfs0", ".fuse_hidden", ".Trash-"];
/// How files with pickled contents end.
const PICKLED: [&str; 5] = ["bin", "pt", "pth", "ckpt", "pkl"];
/// How models end that were made for other programs: ONNX, GGUF, TensorFlow, Flax, Rust, Core ML, OpenVINO.
const EXPORTED: [&str; 9] =
    [".onnx", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", "openvino_model.xml"];
/// How files and folders begin in which trainings keep the state of optimizers, schedulers and random numbers.
const TRAINING: [&str; 9] = [
    "optimizer",
    "optim_states",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    "sampler",
    "global_step",
    "pytorch_model_fsdp",
];
/// How deep folders within folders are followed.
const MAX_DEPTH: usize = 32;

fn dropping(name: &str) -> bool {
    DROPPINGS.contains(&name) || DROPPED.iter().any(|start| name.starts_with(start))
}

/// Whether a file holds pickled contents, going by its name, and by those beside it: OpenVINO keeps `X.bin` beside `X.xml`.
pub(super) fn pickled(place: &Path) -> bool {
    let ending = place.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    ending.is_some_and(|e| {
        PICKLED.contains(&e.as_str()) && !(e == "bin" && place.with_extension("xml").is_file())
    })
}

/// Whether a file is a model in the format of another program.
pub(super) fn exported(path: &str) -> bool {
    EXPORTED.iter().any(|ending| path.ends_with(ending))
}

/// Whether a file belongs to a training that is to go on, not to the model: by its name, or that of a folder it is in.
pub(super) fn training_state(path: &str) -> bool {
    let ending = path.rsplit_once('.').map_or("", |(_, e)| e);
    let state = PICKLED.contains(&ending) || ending == "distcp";
    let named = |part: &str| {
        TRAINING.iter().any(|start| part.starts_with(start)) || part.ends_with("_optim_states.pt")
    };
    state && (ending == "distcp" || path.split('/').any(named))
}

/// The folder that is meant: `path` itself, or the snapshot of a model's folder in a Hugging Face cache.
///
/// # Errors
/// `InvalidArgument` where several could be meant, naming them, and for a whole cache.
pub(super) fn snapshot(path: &Path) -> Result<PathBuf> {
    let absolute = path.canonicalize().unwrap_or_else(|_| path.into());
    let inside = ["snapshots", "blobs", "refs"].iter().any(|n| absolute.file_name() == Some(n.as_ref()));
    let model = if inside { absolute.parent().unwrap_or(&absolute) } else { path };
    let kept = model.join("snapshots");
    if kept.is_dir() && (model.join("blobs").is_dir() || model.join("refs").is_dir()) {
        let main = std::fs::read_to_string(model.join("refs/main")).unwrap_or_default();
        let mut all: Vec<PathBuf> = std::fs::read_dir(&kept)
            .map_err(|e| Error::from(e).within(kept.display()))?
            .flatten()
            .filter(|e| !e.file_name().to_string_lossy().starts_with('.'))
            .map(|e| e.path())
            .filter(|p| p.is_dir())
            .collect();
        all.sort();
        let meant = all.iter().find(|p| p.file_name().is_some_and(|n| n == main.trim()));
        return match (meant, &all[..]) {
            (Some(one), _) | (None, [one]) => Ok(one.clone()),
            (None, []) => Err(Error::invalid(
                "is a model's folder in a cache, but has no snapshot; fetch the model again",
            )
            .within(path.display())),
            (None, [first, ..]) => Err(Error::invalid(format!(
                "is a model's folder in a cache with {} snapshots; name one of them, such as {}",
                all.len(),
                first.display()
            ))
            .within(path.display())),
        };
    }
    let models = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut models: Vec<_> = models
        .filter(|e| e.file_name().to_string_lossy().starts_with("models--"))
        .map(|e| e.path())
        .collect();
    models.sort();
    match models.first() {
        Some(first) => Err(Error::invalid(format!(
            "is a cache of {} models; name one of them, such as {}",
            models.len(),
            first.display()
        ))
        .within(path.display())),
        None => Ok(path.into()),
    }
}

/// Every regular file below `folder`, in order of the paths; links to files are followed. Of a fine-tune, which is to come back
/// `whole`, links to folders and what is no file are refused; of a base, links to folders are followed and what has no tensors
/// does not matter.
pub(super) fn files(folder: &Path, whole: bool) -> Result<Vec<(String, PathBuf)>> {
    let mut walk = Walk { whole, found: Vec::new() };
    walk.folder(folder, "", 0)?;
    Ok(walk.found)
}

struct Walk {
    whole: bool,
    found: Vec<(String, PathBuf)>,
}

impl Walk {
    fn folder(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<()> {
        let within = |e: std::io::Error| Error::from(e).within(folder.display());
        let list = std::fs::read_dir(folder).map_err(within)?;
        let mut entries = list.collect::<std::io::Result<Vec<_>>>().map_err(within)?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let place = entry.path();
            let name = entry.file_name();
            match name.to_str() {
                Some(name) if dropping(name) => {}
                Some(name) => self.entry(&place, format!("{prefix}{name}"), depth)?,
                None if self.whole => {
                    return Err(Error::unsupported("has a name that is not UTF-8").within(place.display()));
                }
                None => {}
            }
        }
        Ok(())
    }

    fn entry(&mut self, place: &Path, path: String, depth: usize) -> Result<()> {
        let within = |e: std::io::Error| Error::from(e).within(place.display());
        let link = std::fs::symlink_metadata(place).map_err(within)?.is_symlink();
        let meta = match std::fs::metadata(place) {
            Ok(meta) => meta,
            // A base's README is of no matter.
            Err(_) if link && !self.whole && !path.ends_with(".safetensors") => return Ok(()),
            Err(e) if link => {
                let what = format!(
                    "{e}: it is a link to what is not there; fetch the file again, or remove the link"
                );
                return Err(Error::io(what).within(place.display()));
            }
            Err(e) => return Err(within(e)),
        };
        if meta.is_file() {
            self.found.push((path, place.into()));
            return Ok(());
        }
        if meta.is_dir() && !(link && (self.whole || leads_up(place))) {
            if depth == MAX_DEPTH {
                return Err(Error::unsupported("folders are nested too deeply").within(place.display()));
            }
            return self.folder(place, &format!("{path}/"), depth + 1);
        }
        if self.whole {
            let what = if meta.is_dir() { "is a link to a folder" } else { "is neither a file nor a folder" };
            return Err(Error::unsupported(format!("{what}; put a copy in its place, or move it away"))
                .within(place.display()));
        }
        Ok(())
    }
}

/// Whether a link leads to a folder that it lies in, which would never end.
fn leads_up(link: &Path) -> bool {
    let folder = link.parent().and_then(|p| p.canonicalize().ok());
    match (link.canonicalize(), folder) {
        (Ok(target), Some(folder)) => folder.starts_with(target),
        _ => true,
    }
}
