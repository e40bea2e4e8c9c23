//! The kernels of `cuda/`, compiled for the host (`tests/cuda_host`) and launched from here. Must hold no
//! expectation.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};

/// One parameter of a kernel.
#[derive(Clone)]
pub enum Param {
    U32(u32),
    U64(u64),
    Null,
    /// Bytes that the kernel may read, so many bytes past a multiple of 256.
    In(Vec<u8>, u64),
    /// Bytes that it may write, too.
    Out(Vec<u8>, u64),
    /// As many bytes, of which only those that are touched take memory: zeros, but for the bytes at some
    /// offsets. Written to if some of them, offset and length each, are to come back.
    Vast(u64, Vec<(u64, Vec<u8>)>, Vec<(u64, u64)>),
}

/// One launch of 256 threads a block.
#[derive(Clone)]
pub struct Launch {
    pub kernel: String,
    pub blocks: (u32, u32),
    /// Orders threads at random unless 0.
    pub seed: u64,
    /// Whether 32-byte sectors are counted.
    pub count: bool,
    /// Whether asynchronous copies land as late as they may; else at once.
    pub late: bool,
    /// Of the grid, this block alone.
    pub only: Option<(u32, u32)>,
    pub params: Vec<Param>,
}

/// What a launch left, by parameter; nothing for scalars.
#[derive(Clone, Debug, Default)]
pub struct After {
    /// 32-byte sectors touched; and summed over blocks, each of which counts its own once.
    pub sectors: (u64, u64),
    /// Of [`Param::Out`].
    pub bytes: Vec<u8>,
}

/// Watches for races between threads.
pub const TSAN: &str = "-fsanitize=thread";

/// A build of the kernels.
pub struct Device {
    runner: PathBuf,
}

/// A directory of this repository.
pub fn root(dir: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)
}

fn is_newer(built: &Path, sources: &[&Path]) -> bool {
    let files = sources.iter().flat_map(|d| std::fs::read_dir(d).unwrap().map(|e| e.unwrap()));
    let newest = files.filter_map(|f| f.metadata().ok()?.modified().ok()).max();
    let at = built.metadata().and_then(|m| m.modified()).ok();
    at.is_some_and(|at| Some(at) > newest)
}

/// Held by the test that builds `what`, while others need it.
fn only_one(what: &str) -> MutexGuard<'static, ()> {
    static BUILDS: Mutex<BTreeMap<String, &'static Mutex<()>>> = Mutex::new(BTreeMap::new());
    let mut builds = BUILDS.lock().unwrap();
    let one = *builds.entry(what.into()).or_insert_with(|| Box::leak(Box::default()));
    drop(builds);
    one.lock().unwrap_or_else(|p| p.into_inner())
}

fn compile(cuda: &Path, flags: &[&str], files: &[&Path], to: &Path) -> Result<(), String> {
    // Another process may be at the same: whoever is last wins, with the same bytes.
    let mine = to.with_extension(format!("{}.o", std::process::id()));
    let out = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()))
        .args(["-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"])
        .args(flags)
        .arg("-I")
        .arg(cuda)
        .arg("-I")
        .arg(root("tests/cuda_host"))
        .args(files)
        .arg("-o")
        .arg(&mine)
        .output()
        .map_err(|e| format!("no C++ compiler: {e}"))?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    std::fs::rename(&mine, to).map_err(|e| e.to_string())
}

/// The scheduler, without what the thread sanitizer would watch in it.
fn runtime(flags: &[&str]) -> Result<PathBuf, String> {
    let (cuda, host) = (root("cuda"), root("tests/cuda_host"));
    let mut flags: Vec<&str> = flags
        .iter()
        .map(|f| if *f == TSAN { "-DXORZ_TSAN" } else { *f })
        .filter(|f| !f.contains("KERNELS"))
        .collect();
    let name = flags.concat().replace(|c: char| !c.is_alphanumeric(), "_");
    let object = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_host_runtime_{name}"));
    let _one = only_one(&name);
    if !is_newer(&object, &[&cuda, &host]) {
        flags.push("-c");
        compile(&cuda, &flags, &[&host.join("runtime.cpp")], &object)?;
    }
    Ok(object)
}

/// A folder with a double of libcuda.so.1 that runs the kernels (`tests/cuda_host/driver.cpp`), and an image
/// that it takes.
pub fn double() -> (PathBuf, PathBuf) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_double");
    std::fs::create_dir_all(&folder).unwrap();
    let (library, image) = (folder.join("libcuda.so.1"), folder.join("kernels.fatbin"));
    let (cuda, host) = (root("cuda"), root("tests/cuda_host"));
    let _one = only_one("double");
    if !is_newer(&library, &[&cuda, &host]) {
        let files = [host.join("driver.cpp"), host.join("runtime.cpp")];
        compile(&cuda, &["-O2", "-fPIC", "-shared"], &[&files[0], &files[1]], &library).unwrap();
    }
    // By rename: the child of another test may be reading it.
    let mine = image.with_extension(std::process::id().to_string());
    std::fs::write(&mine, [&0xBA55_ED50_u32.to_le_bytes()[..], b" for the double"].concat()).unwrap();
    std::fs::rename(&mine, &image).unwrap();
    (folder, image)
}

impl Device {
    /// Compile the repository's kernels with `flags`; a build that is newer than its sources is kept.
    pub fn new(name: &str, flags: &[&str]) -> Self {
        Self::of(name, &root("cuda"), flags).unwrap()
    }

    /// Compile the kernels in `cuda`.
    ///
    /// # Errors
    /// What the compiler said.
    pub fn of(name: &str, cuda: &Path, flags: &[&str]) -> Result<Self, String> {
        let _one = only_one(name);
        let host = root("tests/cuda_host");
        let runner = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_host_{name}"));
        if !is_newer(&runner, &[cuda, &host]) {
            let runtime = runtime(flags)?;
            compile(cuda, flags, &[&host.join("runner.cpp"), &runtime], &runner)?;
        }
        Ok(Self { runner })
    }

    /// Run launches one after another.
    ///
    /// # Errors
    /// What the runner or a sanitizer said.
    pub fn run(&self, launches: &[Launch]) -> Result<Vec<Vec<After>>, String> {
        let mut child = Command::new(&self.runner)
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .env("TSAN_OPTIONS", "halt_on_error=1 report_signal_unsafe=0 exitcode=66")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut bytes = Vec::new();
        launches.iter().for_each(|launch| launch.write(&mut bytes));
        let mut stdin = child.stdin.take().unwrap();
        // A runner that fails reads no further.
        let writer = std::thread::spawn(move || drop(stdin.write_all(&bytes)));
        let out = child.wait_with_output().unwrap();
        writer.join().unwrap();
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            let lines: Vec<_> = said.lines().filter(|l| !l.trim().is_empty()).take(12).collect();
            return Err(format!("{}: {}", out.status, lines.join("\n")));
        }
        let mut left = &out.stdout[..];
        let after = launches.iter().map(|launch| launch.read(&mut left)).collect();
        assert!(left.is_empty());
        Ok(after)
    }
}

fn take<'a>(left: &mut &'a [u8], bytes: usize) -> &'a [u8] {
    let (now, later) = left.split_at(bytes);
    *left = later;
    now
}

fn vast(size: u64, given: &[(u64, Vec<u8>)], back: &[(u64, u64)]) -> Vec<u8> {
    let mut out = size.to_le_bytes().to_vec();
    out.extend((given.len() as u32).to_le_bytes());
    for (at, bytes) in given {
        out.extend([&at.to_le_bytes(), &(bytes.len() as u64).to_le_bytes(), &bytes[..]].concat());
    }
    out.extend((back.len() as u32).to_le_bytes());
    back.iter().for_each(|(at, bytes)| out.extend([at.to_le_bytes(), bytes.to_le_bytes()].concat()));
    out
}

impl Launch {
    fn write(&self, to: &mut Vec<u8>) {
        let mut word = |v: u32| to.extend(v.to_le_bytes());
        word(self.kernel.len() as u32);
        to.extend(self.kernel.as_bytes());
        let mut word = |v: u32| to.extend(v.to_le_bytes());
        [self.blocks.0, self.blocks.1, 256].into_iter().for_each(&mut word);
        to.extend(self.seed.to_le_bytes());
        let mut word = |v: u32| to.extend(v.to_le_bytes());
        let ways = u32::from(self.count) + 2 * u32::from(self.late) + 4 * u32::from(self.only.is_some());
        let only = self.only.map_or(vec![], |(x, y)| vec![x, y]);
        [vec![ways], only, vec![self.params.len() as u32]].concat().into_iter().for_each(&mut word);
        for param in &self.params {
            let (kind, rest) = match param {
                Param::U32(v) => (0u32, v.to_le_bytes().to_vec()),
                Param::U64(v) => (1, v.to_le_bytes().to_vec()),
                Param::Null => (2, vec![]),
                Param::In(b, offset) => {
                    (3, [&(b.len() as u64).to_le_bytes(), &offset.to_le_bytes(), &b[..]].concat())
                }
                Param::Out(b, offset) => {
                    (4, [&(b.len() as u64).to_le_bytes(), &offset.to_le_bytes(), &b[..]].concat())
                }
                Param::Vast(size, given, back) => (5, vast(*size, given, back)),
            };
            to.extend(kind.to_le_bytes());
            to.extend(rest);
        }
    }

    fn read(&self, left: &mut &[u8]) -> Vec<After> {
        let number = |left: &mut &[u8]| u64::from_le_bytes(take(left, 8).try_into().unwrap());
        let mut one = |param: &Param| {
            let out = match param {
                Param::In(..) => 0,
                Param::Out(bytes, _) => bytes.len(),
                Param::Vast(_, _, back) => back.iter().map(|place| place.1 as usize).sum(),
                _ => return After::default(),
            };
            let sectors = (number(left), number(left));
            After { sectors, bytes: take(left, out).to_vec() }
        };
        self.params.iter().map(&mut one).collect()
    }
}
