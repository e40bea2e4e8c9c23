//! `cargo bench --bench tensors`: a million tensors of 64 f32 (an argument names another number), 3 % of whose words are
//! changed: what packing, unpacking and opening them take, and what each of them takes in the package. One thread and two,
//! seconds by the clock and by the process's own time, and the most memory that was held beyond what was before. What was
//! packed is unpacked and compared.
//!
//! Opening is what stands between a package and its first tensor: the whole table is read, checked and indexed by name. The
//! best of five is shown.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;
use xorz::error::Result;
use xorz::package::{Destination, PackOptions, Package, Run, pack_files, unpack_files};

const WORDS: usize = 64;

/// What a stretch of work took.
struct Spent {
    wall: f64,
    cpu: f64,
    mib: f64,
}

fn spent<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Spent)> {
    // The mark of the most memory begins anew, where the system lets it.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let (start, cpu, before) = (Instant::now(), cpu_seconds(), mib("VmRSS:"));
    let made = work()?;
    let wall = start.elapsed().as_secs_f64();
    Ok((made, Spent { wall, cpu: cpu_seconds() - cpu, mib: mib("VmHWM:") - before }))
}

/// User and system time of this process; 0 where the system does not tell it.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn mib(field: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(field)).unwrap_or("0");
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// A checkpoint of `count` tensors, as packages of experts have them; `tuned` changes 3 % of its words.
fn write(path: &Path, count: usize, tuned: bool) -> Result<()> {
    let mut header = String::from("{");
    for i in 0..count {
        let (layer, expert, at) = (i / 768, i / 3 % 256, i * WORDS * 4);
        let part = ["gate", "up", "down"][i % 3];
        header += &format!(
            "{}\"layers.{layer}.experts.{expert}.{part}\":{{\"dtype\":\"F32\",\"shape\":[{WORDS}],\
             \"data_offsets\":[{at},{}]}}",
            if i > 0 { "," } else { "" },
            at + WORDS * 4
        );
    }
    header.push('}');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = 7u64;
    for _ in 0..count * WORDS {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (value, draw) = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5, state >> 20 & 0xFF);
        let bits = (value * 0.1).to_bits();
        out.write_all(&if tuned && draw < 8 { bits + 1 + (draw as u32) } else { bits }.to_le_bytes())?;
    }
    Ok(out.flush()?)
}

fn measure(dir: &Path, count: usize) -> Result<()> {
    let at = |name: &str| dir.join(name);
    write(&at("base"), count, false)?;
    write(&at("tuned"), count, true)?;
    let row = |what: &str, s: &Spent| {
        println!("{what:<24}{:>8.2} s {:>8.2} s of CPU {:>7.0} MiB", s.wall, s.cpu, s.mib);
    };
    println!("{count} tensors of {WORDS} f32");
    for jobs in [1, 2] {
        let run = Run { jobs, ..Run::default() };
        let package = at("package");
        let (report, took) = spent(|| {
            pack_files(&at("base"), &at("tuned"), Destination::Path(&package), &PackOptions::default(), &run)
        })?;
        row(&format!("pack, {jobs} thread(s)"), &took);
        let (_, took) = spent(|| unpack_files(&at("base"), &package, Destination::Path(&at("out")), &run))?;
        row(&format!("unpack, {jobs} thread(s)"), &took);
        assert!(fs::read(at("out"))? == fs::read(at("tuned"))?, "it came back wrong");
        if jobs == 1 {
            println!("{:.1} bytes a tensor in all", report.package_bytes as f64 / count as f64);
        }
    }
    let mut best: Option<Spent> = None;
    for _ in 0..5 {
        let (opened, took) = spent(|| Package::open(&at("package")))?;
        assert_eq!(opened.entries().len(), count);
        best = best.filter(|b| b.wall <= took.wall).or(Some(took));
    }
    best.iter().for_each(|took| row("open", took));
    Ok(())
}

fn main() -> Result<()> {
    // `cargo bench` adds a flag of its own.
    let given = std::env::args().skip(1).find_map(|a| a.parse::<usize>().ok());
    let dir = std::env::temp_dir().join(format!("xorz-tensors-{}", std::process::id()));
    fs::create_dir_all(&dir)?;
    let done = measure(&dir, given.unwrap_or(1_000_000));
    fs::remove_dir_all(&dir)?;
    done
}
