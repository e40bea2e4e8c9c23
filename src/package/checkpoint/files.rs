//! Checkpoints on disk: one safetensors file, or a folder as Hugging Face lays them out, with shards, an index and small
//! files beside them. Reads names, headers and indexes; no tensor.

use super::cache::Identity;
use super::folders::{self, pickled};
use crate::error::{Error, Result};
use crate::package::format::container::{MAX_HEADER_BYTES, SafeTensors, TensorInfo, name_digest};
use crate::package::format::parts::{BasePart, PartSource};
use crate::package::format::paths::objection;
use crate::package::format::record;
use crate::package::format::refusals::missing_in_base;
use crate::package::format::words::TensorWords;
use crate::package::io::regular::open_regular;
use crate::package::io::shared::ReadCache;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pickled files up to here are taken for settings (`training_args.bin`) and carried along, never opened.
const SMALL_PICKLE: u64 = 1 << 20;
const INDEX_ENDING: &str = ".safetensors.index.json";

/// One safetensors file of a checkpoint.
#[derive(Debug)]
pub struct TensorFile {
    /// Path within the folder, `/` between its parts; the name of a single file.
    pub path: String,
    /// Where it is.
    pub place: PathBuf,
    /// Its tensors.
    pub tensors: SafeTensors,
    pub(crate) executable: bool,
    /// What it was when it was opened.
    pub(super) identity: Option<Identity>,
}

impl TensorFile {
    fn open(path: String, place: PathBuf) -> Result<Self> {
        let tensors = SafeTensors::open(&place)?;
        if tensors.header().metadata.get("format").map(String::as_str) == Some(record::FORMAT) {
            let what =
                "is a xorz package, not a checkpoint; `xorz unpack BASE PACKAGE` gives the checkpoint back";
            return Err(Error::invalid(what).within(place.display()));
        }
        let identity = tensors.file().and_then(|file| Identity::of(file).ok());
        let executable = executable(&place);
        Ok(Self { path, place, tensors, executable, identity })
    }

    /// Refuse a file that somebody has written to since it was opened: what was read of it may be partly old, partly new.
    ///
    /// # Errors
    /// `Io`, naming the file.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        match (self.tensors.file(), &self.identity) {
            (Some(file), Some(before)) if !Identity::of(file)?.same(before) => {
                Err(Error::io("was changed while it was read; try again when it is at rest")
                    .within(self.place.display()))
            }
            _ => Ok(()),
        }
    }
}

/// A file without tensors, carried along as it is.
#[derive(Debug)]
pub struct CarriedFile {
    /// Path within the folder, `/` between its parts.
    pub path: String,
    /// Where it is.
    pub place: PathBuf,
    /// Its length.
    pub bytes: u64,
    pub(crate) executable: bool,
}

/// An opened checkpoint: headers read and checked, indexes compared with the shards that they name.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<TensorFile>,
    carried: Vec<CarriedFile>,
    folder: bool,
    /// By the digest of the name: file, and which of its tensors.
    names: HashMap<u128, (u32, u32)>,
    /// All places of the names that several files have, the one in `names` first.
    several: HashMap<String, Vec<(usize, usize)>>,
    /// Files of a fine-tune that are no part of it and were left out, with their lengths.
    left_out: Vec<(String, u64)>,
}

impl Checkpoint {
    /// Open a safetensors file, or a folder: every `.safetensors` file in it holds tensors, every other file is carried along
    /// (but for `.git`, `.cache` and what systems drop into folders). Of a Hugging Face cache's folder of a model, its snapshot.
    /// The state of a training's optimizer is left out.
    ///
    /// # Errors
    /// `Io`, `Corrupt`, `Truncated`, naming the file; `Mismatch` for an index that does not fit its shards; `Unsupported` for
    /// pickled weights, naming the way out; `InvalidArgument` for a folder without weights or with something that is no file.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, true)
    }

    /// [`Checkpoint::open`] of a base: only its tensors matter, so that nothing is carried and little refused.
    ///
    /// # Errors
    /// `Io`, `Corrupt` or `Truncated`, naming the file; `Mismatch` for an index that does not fit its shards; `Unsupported` for
    /// pickled weights; `InvalidArgument` for a folder without weights.
    pub fn open_base(path: &Path) -> Result<Self> {
        Self::open_as(path, false)
    }

    fn open_as(path: &Path, whole: bool) -> Result<Self> {
        if !path.is_dir() {
            refuse_pickle(path)?;
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let file = TensorFile::open(name, path.into()).map_err(|e| on_a_hub(path, e))?;
            return Self::new(vec![file], Vec::new(), false);
        }
        let path = &*folders::snapshot(path)?;
        let (weights, rest): (Vec<_>, Vec<_>) =
            folders::files(path, whole)?.into_iter().partition(|(path, _)| path.ends_with(".safetensors"));
        if weights.is_empty() {
            return Err(no_weights(&rest).within(path.display()));
        }
        if whole {
            weights.iter().chain(&rest).try_for_each(|(path, place)| match objection(path) {
                Some(what) => {
                    Err(Error::unsupported(format!("{what}; move it away, or rename it"))
                        .within(place.display()))
                }
                None => Ok(()),
            })?;
        }
        let files = weights.into_iter().map(|(path, place)| TensorFile::open(path, place));
        let mut checkpoint = Self::new(files.collect::<Result<_>>()?, Vec::new(), true)?;
        for (path, place) in rest {
            if path.ends_with(INDEX_ENDING) {
                checkpoint.check_index(&path, &place)?;
            }
            if whole {
                let bytes =
                    std::fs::metadata(&place).map_err(|e| Error::from(e).within(place.display()))?.len();
                if bytes > SMALL_PICKLE && folders::training_state(&path) {
                    checkpoint.left_out.push((path, bytes));
                    continue;
                }
                if bytes > SMALL_PICKLE && pickled(&place) {
                    return Err(pickle_error(&place));
                }
                let executable = executable(&place);
                checkpoint.carried.push(CarriedFile { path, place, bytes, executable });
            }
        }
        Ok(checkpoint)
    }

    fn new(files: Vec<TensorFile>, carried: Vec<CarriedFile>, folder: bool) -> Result<Self> {
        let count = files.iter().map(|f| f.tensors.header().tensors.len()).sum();
        let mut names = HashMap::<u128, (u32, u32)>::with_capacity(count);
        let mut several = HashMap::<String, Vec<_>>::new();
        let mut order: Vec<usize> = (0..files.len()).collect();
        // Where two files have a tensor of one name, the model's own file is meant, not a copy in another layout.
        order.sort_by_key(|&f| !files[f].path.starts_with("model"));
        for f in order {
            for (i, t) in files[f].tensors.header().tensors.iter().enumerate() {
                let here = (f as u32, i as u32);
                let first = *names.entry(name_digest(&t.name)).or_insert(here);
                if first == here {
                    continue;
                }
                let first = (first.0 as usize, first.1 as usize);
                let other = &files[first.0].tensors.header().tensors[first.1].name;
                if *other != t.name {
                    let what = format!("the names `{other}` and `{}` have one digest", t.name);
                    return Err(Error::corrupt(what).within(files[f].place.display()));
                }
                several.entry(t.name.clone()).or_insert_with(|| vec![first]).push((f, i));
            }
        }
        Ok(Self { files, carried, folder, names, several, left_out: Vec::new() })
    }

    /// Read through `cache` from now on; its files have the numbers from `first` on there.
    pub(crate) fn share(mut self, first: u32, cache: &Arc<ReadCache>) -> Self {
        let shared =
            |(n, f): (u32, TensorFile)| TensorFile { tensors: f.tensors.share(first + n, cache), ..f };
        self.files = (0..).zip(self.files).map(shared).collect();
        self
    }

    /// The safetensors files, in order of their paths.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// The other files, in order of their paths; none of a base.
    pub fn carried(&self) -> &[CarriedFile] {
        &self.carried
    }

    /// Whether it is a folder.
    pub fn is_folder(&self) -> bool {
        self.folder
    }

    /// The tensor called `name`, and which of the files holds it.
    pub fn find(&self, name: &str) -> Option<(usize, &TensorInfo)> {
        let (f, i) = *self.names.get(&name_digest(name))?;
        let found = &self.files[f as usize].tensors.header().tensors[i as usize];
        (found.name == name).then_some((f as usize, found))
    }

    /// Of several tensors called `name`, as the components of a pipeline have them, the one that `file` means: one that `fits`
    /// rather than another, then that of this path, then one of its folder, then as [`Checkpoint::find`].
    pub(crate) fn find_near(
        &self,
        name: &str,
        file: Option<&str>,
        fits: impl Fn(&TensorInfo) -> bool,
    ) -> Option<(usize, &TensorInfo)> {
        let Some(all) = self.several.get(name) else { return self.find(name) };
        let folder = |path: &str| path.rfind('/').map_or(String::new(), |i| path[..i].to_owned());
        let rank = |f: usize, t: &TensorInfo| {
            let path = self.files[f].path.as_str();
            let far = file.map_or(0, |want| match () {
                () if want == path => 0,
                () if folder(want) == folder(path) => 1,
                () => 2,
            });
            (!fits(t), far)
        };
        let places = all.iter().map(|&(f, i)| (f, &self.files[f].tensors.header().tensors[i]));
        places.min_by_key(|&(f, t)| rank(f, t))
    }

    /// What is to be said of files that were left out.
    pub(crate) fn note(&self) -> Option<String> {
        let (first, _) = self.left_out.first()?;
        let total: u64 = self.left_out.iter().map(|(_, bytes)| bytes).sum();
        let more = match self.left_out.len() {
            1 => String::new(),
            n => format!(" and {} more files", n - 1),
        };
        Some(format!(
            "left out `{first}`{more} ({total} bytes): the state of a training, which is no part of the model"
        ))
    }

    /// Whether several files have a tensor called `name`.
    pub(crate) fn has_several(&self, name: &str) -> bool {
        self.several.contains_key(name)
    }

    /// Every tensor, file after file, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo)> {
        self.files
            .iter()
            .enumerate()
            .flat_map(|(f, file)| file.tensors.header().tensors.iter().map(move |t| (f, t)))
    }

    /// An index names shards that are there, and tensors that are in them.
    fn check_index(&self, path: &str, place: &Path) -> Result<()> {
        let within = |e: Error| e.within(place.display());
        let text = read_small(place).map_err(within)?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|e| within(Error::corrupt(format!("is not a safetensors index: {e}"))))?;
        let folder = path.rfind('/').map_or("", |i| &path[..=i]);
        let in_folder = |shard: &str| self.files.iter().find(|f| f.path.strip_prefix(folder) == Some(shard));
        // As loaders do: they take `model.safetensors` where it is, and look at no index; one that names no file that is there
        // is of an earlier save, if what is there is whole.
        let whole =
            path.strip_suffix(".index.json").is_some_and(|one| self.files.iter().any(|f| f.path == one));
        let mut shards = index.weight_map.values();
        let here = |name: &str| self.files.iter().any(|f| f.tensors.find(name).is_some());
        let mut stale = || shards.all(|s| in_folder(s).is_none()) && index.weight_map.keys().all(|n| here(n));
        if whole || stale() {
            return Ok(());
        }
        for (tensor, shard) in &index.weight_map {
            let file = in_folder(shard).ok_or_else(|| {
                within(Error::mismatch(format!(
                    "names the shard `{shard}` for tensor `{tensor}`, which is not in the folder; fetch it again"
                )))
            })?;
            if file.tensors.find(tensor).is_none() {
                return Err(within(Error::mismatch(format!(
                    "says that tensor `{tensor}` is in `{shard}`, but it is not: a shard of another model?"
                ))));
            }
        }
        Ok(())
    }
}

/// A tensor of a checkpoint: which file, and where in it.
pub(crate) type Found<'a> = (usize, &'a TensorInfo);

/// The words of a base tensor.
pub(super) fn words<'a>(base: &'a Checkpoint, (f, b): Found<'a>) -> TensorWords<'a> {
    TensorWords::File(&base.files()[f].tensors, b)
}

impl PartSource for Checkpoint {
    fn read_part(&self, part: &BasePart, at: u64, out: &mut [u8]) -> Result<()> {
        let name = part.name.as_deref().unwrap_or_default();
        let needed = part.at.saturating_add(part.bytes);
        let found = self.find_near(name, part.file.as_deref(), |t| t.bytes() >= needed);
        let (f, info) = found.ok_or_else(|| missing_in_base(name))?;
        if info.bytes() < needed {
            return Err(Error::mismatch(format!(
                "is a delta of bytes {} to {needed} of the base's `{name}`, which has {}; give the base that it was packed \
                 against",
                part.at,
                info.bytes()
            )));
        }
        self.files[f].tensors.read_at(info.range.start + part.at + at, out)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The whole text of a file that is small by nature, such as an index.
fn read_small(place: &Path) -> Result<Vec<u8>> {
    let file = open_regular(place)?;
    let bytes = file.metadata()?.len();
    if bytes > MAX_HEADER_BYTES {
        return Err(Error::corrupt(format!(
            "has {bytes} bytes, more than the {} of the longest index",
            MAX_HEADER_BYTES
        )));
    }
    let mut text = Vec::new();
    file.take(MAX_HEADER_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

fn executable(place: &Path) -> bool {
    std::fs::metadata(place).is_ok_and(|m| m.permissions().mode() & 0o111 != 0)
}

fn pickle_error(place: &Path) -> Error {
    Error::unsupported(
        "holds pickled weights, which can run code when they are opened, so xorz does not; write them anew with \
         `save_pretrained(..., safe_serialization=True)` or `safetensors.torch.save_file`, or move the file away",
    )
    .within(place.display())
}

/// What to say about a name such as `meta-llama/Llama-3.2-1B`: users of tools that fetch models try it.
fn on_a_hub(path: &Path, e: Error) -> Error {
    let name = path.to_str().unwrap_or_default();
    let plain = |p: &str| !p.is_empty() && !p.starts_with('.') && !p.contains(char::is_whitespace);
    match name.split_once('/') {
        Some((owner, model))
            if !path.exists()
                && plain(owner)
                && plain(model)
                && !model.contains('/')
                && !Path::new(owner).exists() =>
        {
            Error::io(format!(
                "{}; xorz fetches nothing: `hf download {name} --local-dir {model}` fetches a model, {model} is its path then",
                e.message()
            ))
        }
        _ => e,
    }
}

fn refuse_pickle(place: &Path) -> Result<()> {
    if pickled(place) && place.is_file() { Err(pickle_error(place)) } else { Ok(()) }
}

fn no_weights(rest: &[(String, PathBuf)]) -> Error {
    if let Some((_, place)) = rest.iter().find(|(_, place)| pickled(place)) {
        return pickle_error(place);
    }
    let exported = rest.iter().find(|(path, _)| folders::exported(path));
    let instead = exported.map_or(String::new(), |(path, _)| {
        format!(" (`{path}` is a model made for another program; take the one that it was made from)")
    });
    Error::invalid(format!(
        "holds no .safetensors file{instead}; `save_pretrained` and `safetensors.torch.save_file` write them"
    ))
}
