//! The kernels of `cuda/`, compiled for the host (`tests/cuda_host`) and launched from here. Must hold no expectation.
#![allow(dead_code, unreachable_pub)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::SystemTime;

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

/// A build of the kernels.
pub struct Device {
    runner: PathBuf,
}

/// A directory of this repository.
pub fn root(dir: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)
}

fn newest(dirs: &[&Path]) -> SystemTime {
    let files = dirs.iter().flat_map(|d| std::fs::read_dir(d).unwrap().map(|e| e.unwrap()));
    files.filter_map(|f| f.metadata().ok()?.modified().ok()).max().unwrap_or(SystemTime::UNIX_EPOCH)
}

impl Device {
    /// Compile the repository's kernels with `flags`; a build that is newer than its sources is kept.
    pub fn new(name: &str, flags: &[&str]) -> Self {
        Self::of(name, &root("cuda"), flags).unwrap()
    }

    /// Compile the kernels in `cuda`.
    pub fn of(name: &str, cuda: &Path, flags: &[&str]) -> Result<Self, String> {
        // Tests run side by side, and compiling is most of their time.
        static BUILDING: Mutex<()> = Mutex::new(());
        let _one = BUILDING.lock().unwrap_or_else(|p| p.into_inner());
        let host = root("tests/cuda_host");
        let runner = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_host_{name}"));
        let built = runner.metadata().and_then(|m| m.modified());
        if built.is_ok_and(|at| at > newest(&[cuda, &host])) {
            return Ok(Self { runner });
        }
        let mine = runner.with_extension(std::process::id().to_string());
        let out = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()))
            .args(["-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"])
            .args(flags)
            .arg("-I")
            .arg(cuda)
            .arg("-I")
            .arg(&host)
            .args(["-x", "c++"])
            .args([host.join("runner.cpp"), host.join("runtime.cpp")])
            .arg("-o")
            .arg(&mine)
            .output()
            .map_err(|e| format!("no C++ compiler: {e}"))?;
        if !out.status.success() {
            return Err(String::from_utf8_lossy(&out.stderr).into_owned());
        }
        std::fs::rename(&mine, &runner).map_err(|e| e.to_string())?;
        Ok(Self { runner })
    }

    /// Run launches one after another.
    ///
    /// # Errors
    /// What the runner or a sanitizer said.
    pub fn run(&self, launches: &[Launch]) -> Result<Vec<Vec<After>>, String> {
        let mut child = Command::new(&self.runner)
            .env("ASAN_OPTIONS", "detect_leaks=0")
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

impl Launch {
    fn write(&self, to: &mut Vec<u8>) {
        let mut word = |v: u32| to.extend(v.to_le_bytes());
        word(self.kernel.len() as u32);
        to.extend(self.kernel.as_bytes());
        let mut word = |v: u32| to.extend(v.to_le_bytes());
        [self.blocks.0, self.blocks.1, 256].into_iter().for_each(&mut word);
        to.extend(self.seed.to_le_bytes());
        let mut word = |v: u32| to.extend(v.to_le_bytes());
        [u32::from(self.count), self.params.len() as u32].into_iter().for_each(&mut word);
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
                _ => return After::default(),
            };
            let sectors = (number(left), number(left));
            After { sectors, bytes: take(left, out).to_vec() }
        };
        self.params.iter().map(&mut one).collect()
    }
}
