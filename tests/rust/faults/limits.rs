//! Promise: where the system gives no more threads or files, jobs are done with those that are there, or refused with nothing left
//! behind; pipes that lie where killed runs leave files, and files that are swapped for pipes, keep nobody waiting.

use crate::common::disk::{command, complaint, done, matrices, model, names, run, safetensors};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// `base`, `ft`, `base.d` and `ft.d`, with their packages `p` and `d`, and `open`, where anybody may write.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let (base, ft) = matrices(41, 6, 256, 512);
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    fs::write(d.join("ft"), safetensors(&ft)).unwrap();
    model(&d.join("base.d"), &base, 2);
    model(&d.join("ft.d"), &ft, 3);
    fs::create_dir_all(d.join("ft.d/deep/er/still")).unwrap();
    fs::write(d.join("ft.d/deep/er/still/notes.txt"), b"notes").unwrap();
    done(d, &["pack", "base", "ft", "-o", "p"]);
    done(d, &["pack", "base.d", "ft.d", "-o", "d"]);
    fs::create_dir(d.join("open")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_xorz"), d.join("xorz")).unwrap();
    for (name, mode) in [(".", 0o755), ("open", 0o777)] {
        fs::set_permissions(d.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    dir
}

#[test]
fn where_no_thread_can_be_started_the_calling_one_does_the_work() {
    let dir = folder();
    let d = dir.path();
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    for args in [
        &["pack", "base", "ft", "-o", "open/q", "--jobs", "16"][..],
        &["pack", "base.d", "ft.d", "-o", "open/qd", "--jobs", "16"],
        &["unpack", "base", "p", "-o", "open/out", "--jobs", "16"],
        &["unpack", "base.d", "d", "-o", "open/out.d", "--jobs", "16"],
        &["verify", "base.d", "d", "ft.d", "--jobs", "16"],
        &["digest", "base.d", "--jobs", "16"],
        &["estimate", "base", "ft", "--jobs", "16"],
    ] {
        let mut c = Command::new("prlimit");
        c.args(["--nproc=1", "./xorz"]).args(args).current_dir(d).env("XORZ_CACHE_DIR", "");
        if root {
            // Root is not limited; this user has no other process.
            c.uid(54_321).gid(54_321);
        }
        let out = run(c);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        if text.contains("prlimit") {
            return eprintln!("SKIPPED where_no_thread_can_be_started: {text}");
        }
        assert!(out.status.success(), "{args:?}: {:?} {text}", out.status);
    }
    assert!(fs::read(d.join("open/q")).unwrap() == fs::read(d.join("p")).unwrap());
    assert!(fs::read(d.join("open/qd")).unwrap() == fs::read(d.join("d")).unwrap());
    assert!(fs::read(d.join("open/out")).unwrap() == fs::read(d.join("ft")).unwrap());
}

#[test]
fn too_few_open_files_leave_nothing_behind() {
    let dir = folder();
    let d = dir.path();
    let mut refused = 0;
    for verb in [
        "pack base ft -o open/q",
        "pack base.d ft.d -o open/q",
        "unpack base p -o open/q",
        "unpack base.d d -o open/q",
    ] {
        for limit in 3..24 {
            let mut c = Command::new("sh");
            let script = format!("ulimit -n {limit}; exec ./xorz {verb} --jobs 2");
            c.args(["-c", &script]).current_dir(d).env("XORZ_CACHE_DIR", "").env("TMPDIR", d.join("open"));
            let out = run(c);
            if out.status.success() {
                assert_eq!(names(&d.join("open")), ["q"], "{verb}, {limit} files");
                let _ = fs::remove_file(d.join("open/q"));
                let _ = fs::remove_dir_all(d.join("open/q"));
                continue;
            }
            refused += 1;
            assert_eq!(names(&d.join("open")), [""; 0], "{verb}, {limit} files: {:?}", out.status);
            if out.status.code() == Some(4) {
                assert!(complaint(&out).contains("open files"), "{}", complaint(&out));
            }
        }
    }
    assert!(refused > 8);
}

#[test]
fn a_pipe_or_device_named_like_a_leftover_keeps_nobody_waiting_and_stays() {
    let dir = folder();
    let d = dir.path();
    let old = |name: &str| format!("open/.{name}.tmp-4194303-{:016x}", 7);
    for name in ["q", "out", "out.d"] {
        assert!(Command::new("mkfifo").arg(d.join(old(name))).status().unwrap().success());
    }
    // What a killed run really left is removed all the same.
    let left = format!("open/.q.tmp-4194303-{:016x}", 8);
    fs::write(d.join(&left), b"half").unwrap();
    // And so is its folder, without following links out of it.
    fs::create_dir(d.join(format!("open/.out.d.tmp-4194303-{:016x}", 9))).unwrap();
    std::os::unix::fs::symlink(d.join("ft"), d.join(format!("open/.q.tmp-4194303-{:016x}", 10))).unwrap();
    done(d, &["pack", "base", "ft", "-o", "open/q"]);
    done(d, &["unpack", "base", "p", "-o", "open/out"]);
    done(d, &["unpack", "base.d", "d", "-o", "open/out.d"]);
    for name in ["q", "out", "out.d"] {
        assert!(d.join(old(name)).exists(), "{name}: somebody's pipe was removed");
    }
    assert!(!d.join(left).exists() && d.join("ft").exists());
    assert!(!d.join(format!("open/.out.d.tmp-4194303-{:016x}", 9)).exists());
}

#[test]
fn a_pipe_in_the_place_of_a_carried_file_keeps_nobody_waiting() {
    let dir = folder();
    let d = dir.path();
    for (folder, name) in
        [("ft.d", "config.json"), ("ft.d", "model.safetensors.index.json"), ("base.d", "config.json")]
    {
        let place = d.join(folder).join(name);
        let kept = fs::read(&place).unwrap();
        fs::remove_file(&place).unwrap();
        assert!(Command::new("mkfifo").arg(&place).status().unwrap().success());
        let out = run(command(d, &["pack", "base.d", "ft.d", "-o", "open/q"]));
        assert_eq!(out.status.success(), folder == "base.d", "{folder}/{name}");
        assert!(out.status.success() || complaint(&out).contains(name), "{folder}/{name}");
        fs::remove_file(&place).unwrap();
        fs::write(&place, kept).unwrap();
    }
    assert!(Path::new(&d.join("open/q")).exists());
}
