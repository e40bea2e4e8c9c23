//! Checkpoints on disk, and the built command run on them.

use super::data::{Rng, stepped};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use xorz::matrix::Dtype;

/// A tensor of a file: name, dtype, dimensions, bytes.
pub type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

/// The bytes of a safetensors file, its header as `safetensors` itself writes it.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (r#"{"__metadata__":{"format":"pt"}"#.to_string(), Vec::new());
    for (name, dtype, dims, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        let name = serde_json::to_string(name).unwrap();
        header +=
            &format!(r#",{name}:{{"dtype":"{dtype}","shape":{dims:?},"data_offsets":[{start},{end}]}}"#);
        data.extend_from_slice(bytes);
    }
    header += "}";
    header += &" ".repeat(header.len().wrapping_neg() % 8);
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// `count` bf16 matrices of `n` x `k`, and a fine-tune of them.
pub fn matrices(seed: u64, count: usize, n: usize, k: usize) -> (Vec<Tensor>, Vec<Tensor>) {
    let mut rng = Rng::new(seed);
    let one = |i: usize| {
        let base = rng.weights(Dtype::BF16, n * k);
        let ft = stepped(&mut rng, Dtype::BF16, &base, 2e-5);
        let name = format!("model.layers.{i}.weight");
        ((name.clone(), "BF16", vec![n, k], base), (name, "BF16", vec![n, k], ft))
    };
    (0..count).map(one).unzip()
}

/// A folder as Hugging Face lays it out: shards, an index, and small files beside them.
pub fn model(dir: &Path, tensors: &[Tensor], shards: usize) {
    fs::create_dir_all(dir).unwrap();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        part.iter().for_each(|t| drop(map.insert(t.0.clone(), name.clone().into())));
        fs::write(dir.join(&name), safetensors(part)).unwrap();
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(dir.join("config.json"), br#"{"model_type": "llama"}"#).unwrap();
}

/// Every file below a folder: path, whether it may be executed, bytes. Folders that hold nothing are named
/// with a `/`.
pub fn tree(dir: &Path) -> BTreeMap<String, (bool, Vec<u8>)> {
    fn walk(dir: &Path, prefix: &str, out: &mut BTreeMap<String, (bool, Vec<u8>)>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.file_type().unwrap().is_dir() {
                let before = out.len();
                walk(&entry.path(), &format!("{path}/"), out);
                if out.len() == before {
                    out.insert(format!("{path}/"), (false, Vec::new()));
                }
            } else {
                let executable = fs::metadata(entry.path()).unwrap().permissions().mode() & 0o111 != 0;
                out.insert(path, (executable, fs::read(entry.path()).unwrap()));
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(dir, "", &mut out);
    out
}

/// Path, sha256, and whether it may be executed, of every file below a folder.
pub fn sums(dir: &Path) -> BTreeMap<String, (String, bool)> {
    let sum = |bytes: &[u8]| Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
    tree(dir).into_iter().map(|(path, (executable, bytes))| (path, (sum(&bytes), executable))).collect()
}

/// Names in a folder, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The command, in `dir`, without a cache, a terminal, or anything to read.
pub fn command(dir: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_xorz"));
    c.args(args).current_dir(dir).env("XORZ_CACHE_DIR", "").stdin(Stdio::null());
    c
}

/// Run it; a run of more than a minute is a hang, and fails.
pub fn run(mut c: Command) -> Output {
    let mut child = c.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (pid, start) = (child.id(), Instant::now());
    while start.elapsed() < Duration::from_secs(60) {
        if child.try_wait().unwrap().is_some() {
            return child.wait_with_output().unwrap();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("process {pid} hangs: {c:?}");
}

/// Run `xorz ARGS` in `dir`.
pub fn xorz(dir: &Path, args: &[&str]) -> Output {
    run(command(dir, args))
}

/// Run `xorz ARGS`, which must succeed; what it printed.
pub fn done(dir: &Path, args: &[&str]) -> String {
    let out = xorz(dir, args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// What it complained of: one line that begins with its name.
pub fn complaint(out: &Output) -> String {
    let text = String::from_utf8(out.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("xorz: ") && !text.contains("internal error"), "{text}");
    text
}

/// Run `xorz ARGS`, which must fail with this exit code and name all of `words`.
pub fn refused(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let out = xorz(dir, args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {text}");
    let text = complaint(&out);
    words.iter().for_each(|w| assert!(text.contains(w), "{args:?} should name `{w}`: {text}"));
    assert!(out.stdout.is_empty(), "{args:?}");
}
