//! Promise: when the system refuses (disk full, no permission, a strange kind of file), the command says so
//! in one line that names the file, exits with its code, and leaves the old file as it was and nothing else.

use crate::common::disk::{
    command, complaint, done, matrices, model, names, refused, run, safetensors, tree,
};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

/// Files and folders as in `kill.rs`, with their packages `p` and `d`.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    // All are to read and pass through it, whoever they run as.
    fs::set_permissions(d, fs::Permissions::from_mode(0o755)).unwrap();
    let (base, ft) = matrices(22, 4, 256, 512);
    fs::write(d.join("base"), safetensors(&base)).unwrap();
    fs::write(d.join("ft"), safetensors(&ft)).unwrap();
    model(&d.join("base.d"), &base, 2);
    model(&d.join("ft.d"), &ft, 3);
    done(d, &["pack", "base", "ft", "-o", "p"]);
    done(d, &["pack", "base.d", "ft.d", "-o", "d"]);
    dir
}

fn shell(dir: &Path, script: &str) -> Command {
    let mut c = Command::new("sh");
    c.args(["-c", script]).current_dir(dir).env("XORZ", env!("CARGO_BIN_EXE_xorz")).env("XORZ_CACHE_DIR", "");
    c
}

fn full(out: &Output, what: &str) {
    let text = complaint(out);
    assert_eq!(out.status.code(), Some(4), "{what}: {text}");
}

const VERBS: [&str; 4] = [
    "pack base ft -o small/out",
    "pack base.d ft.d -o small/out",
    "unpack base p -o small/out",
    "unpack base.d d -o small/out",
];

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir(d.join("small")).unwrap();
    let can = Command::new("unshare")
        .args(["-rm", "mount", "-t", "tmpfs", "none", "small"])
        .current_dir(d)
        .output();
    if !can.is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED a_full_disk_is_an_error_and_leaves_nothing: no namespaces here");
        return;
    }
    for verb in VERBS {
        for pages in [0, 1, 4, 20] {
            // A page for each file that is to lie there already; the root of a tmpfs takes none.
            let setup = format!("mount -t tmpfs -o size={}k none small", 4 * (pages + 1));
            let old = if verb.starts_with("unpack base.d") { "" } else { "echo old > small/out;" };
            let script = format!(
                "{setup} || exit 99; {old} $XORZ {verb}; code=$?; cd small; find . -mindepth 1 -print0 | xargs -0 ls -d; \
                 test ! -e out || cat out; exit $code"
            );
            let mut c = Command::new("unshare");
            c.args(["-rm", "sh", "-c", &script]).current_dir(d);
            c.env("XORZ", env!("CARGO_BIN_EXE_xorz")).env("XORZ_CACHE_DIR", "").env("TMPDIR", d);
            let out = run(c);
            full(&out, &format!("{verb} on {pages} pages"));
            let text = complaint(&out);
            assert!(text.contains("small") && text.to_lowercase().contains("space"), "{text}");
            let left = String::from_utf8(out.stdout).unwrap();
            let want = if old.is_empty() { "" } else { "./out\nold\n" };
            assert!(left.replace(".\n", "") == want, "{verb} on {pages} pages leaves {left:?}");
        }
    }
}

#[test]
fn a_limit_on_the_length_of_files_is_an_error_and_leaves_nothing() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir(d.join("small")).unwrap();
    for verb in VERBS {
        for blocks in [0, 1, 8, 64] {
            let old = !verb.starts_with("unpack base.d");
            if old {
                fs::write(d.join("small/out"), b"old").unwrap();
            }
            let out = run(shell(
                d,
                &format!("trap '' XFSZ; ulimit -f {blocks}; exec $XORZ {verb} 2>&1 1>/dev/null | cat"),
            ));
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(
                text.starts_with("xorz: ") && text.contains("small") && text.lines().count() == 1,
                "{text}"
            );
            if old {
                assert_eq!(fs::read(d.join("small/out")).unwrap(), b"old", "{verb}, {blocks} blocks");
                fs::remove_file(d.join("small/out")).unwrap();
            }
            assert_eq!(names(&d.join("small")), [""; 0], "{verb}, {blocks} blocks");
        }
    }
}

#[test]
fn a_pipe_that_takes_nothing_is_an_error() {
    let dir = folder();
    for verb in ["pack base ft -o -", "pack base.d ft.d -o -", "unpack base p -o -"] {
        let out = run(shell(dir.path(), &format!("exec $XORZ {verb} > /dev/full")));
        full(&out, verb);
        assert!(complaint(&out).to_lowercase().contains("space"), "{}", complaint(&out));
    }
}

#[test]
fn outputs_on_another_filesystem_are_like_any() {
    let dir = folder();
    let d = dir.path();
    let other = Path::new("/dev/shm");
    if !other.is_dir() || fs::metadata(other).unwrap().dev() == fs::metadata(d).unwrap().dev() {
        eprintln!("SKIPPED outputs_on_another_filesystem_are_like_any: there is no other");
        return;
    }
    let other = tempfile::tempdir_in(other).unwrap();
    let at = |name: &str| other.path().join(name).to_str().unwrap().to_owned();
    done(d, &["pack", "base", "ft", "-o", &at("p")]);
    done(d, &["unpack", "base", &at("p"), "-o", &at("out")]);
    done(d, &["unpack", "base.d", "d", "-o", &at("out.d")]);
    assert!(fs::read(at("p")).unwrap() == fs::read(d.join("p")).unwrap());
    assert!(fs::read(at("out")).unwrap() == fs::read(d.join("ft")).unwrap());
    assert!(tree(Path::new(&at("out.d"))) == tree(&d.join("ft.d")));
    assert_eq!(names(other.path()), ["out", "out.d", "p"]);
}

#[test]
fn strange_outputs_are_refused_and_left_alone() {
    let dir = folder();
    let d = dir.path();
    fs::create_dir(d.join("taken")).unwrap();
    fs::write(d.join("taken/file"), b"mine").unwrap();
    fs::write(d.join("file"), b"mine").unwrap();
    assert!(Command::new("mkfifo").arg(d.join("pipe")).status().unwrap().success());
    let before = names(d);
    for (code, word, args) in [
        (4, "no/where", ["pack", "base", "ft", "-o", "no/where"]),
        (4, "no/where", ["unpack", "base", "p", "-o", "no/where"]),
        (4, "no/where", ["unpack", "base.d", "d", "-o", "no/where"]),
        (2, "taken", ["pack", "base", "ft", "-o", "taken"]),
        (2, "taken", ["unpack", "base", "p", "-o", "taken"]),
        (2, "taken", ["unpack", "base.d", "d", "-o", "taken"]),
        (2, "file", ["unpack", "base.d", "d", "-o", "file"]),
        // A rename would put a file in the place of the pipe, or of a device.
        (2, "pipe", ["pack", "base", "ft", "-o", "pipe"]),
        (2, "pipe", ["unpack", "base", "p", "-o", "pipe"]),
        (2, "pipe", ["unpack", "base.d", "d", "-o", "pipe"]),
        (2, "overwrite", ["pack", "base", "ft", "-o", "ft"]),
        (2, "overwrite", ["pack", "base.d", "ft.d", "-o", "ft.d/config.json"]),
        (2, "overwrite", ["unpack", "base", "p", "-o", "p"]),
        (2, "overwrite", ["unpack", "base", "p", "-o", "./base"]),
    ] {
        refused(d, &args, code, &[word]);
        assert_eq!(names(d), before, "{args:?}");
    }
    for name in ["", "..", ".", "/"] {
        let out = run(command(d, &["pack", "base", "ft", "-o", name]));
        assert!(matches!(out.status.code(), Some(2 | 4)), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(!String::from_utf8_lossy(&out.stderr).contains("internal"), "{name}");
    }
    assert_eq!(fs::read(d.join("taken/file")).unwrap(), b"mine");
    assert_eq!(names(d), before);
}

#[test]
fn unreadable_inputs_are_named_and_nothing_hangs() {
    let dir = folder();
    let d = dir.path();
    assert!(Command::new("mkfifo").arg(d.join("pipe")).status().unwrap().success());
    symlink("nothing", d.join("dangling")).unwrap();
    symlink("loop", d.join("loop")).unwrap();
    fs::create_dir(d.join("empty")).unwrap();
    let before = names(d);
    for (word, code) in
        [("missing", 4), ("dangling", 4), ("loop", 4), ("pipe", 2), ("empty", 2), ("/dev/null", 2)]
    {
        for args in [
            ["pack", word, "ft", "-o", "q"],
            ["pack", "base", word, "-o", "q"],
            ["unpack", word, "p", "-o", "q"],
            ["unpack", "base", word, "-o", "q"],
        ] {
            let out = run(command(d, &args));
            let text = complaint(&out);
            assert!(text.contains(word), "{args:?}: {text}");
            let codes = [code, if word == "empty" { 2 } else { 3 }];
            assert!(
                out.status.code().is_some_and(|c| codes.contains(&c)),
                "{args:?}, {:?}: {text}",
                out.status
            );
        }
        refused_any(d, &["verify", "base", "p", word], word);
        refused_any(d, &["inspect", word], word);
    }
    assert_eq!(names(d), before);
}

fn refused_any(d: &Path, args: &[&str], word: &str) {
    let out = run(command(d, args));
    assert!(!out.status.success() && complaint(&out).contains(word), "{args:?}");
}

/// The command as somebody without rights: as `nobody` where the tests run as root, for whom no file is
/// unreadable.
fn unprivileged(d: &Path, args: &[&str]) -> Output {
    let copy = d.join(".bin/xorz");
    if !copy.exists() {
        fs::create_dir(d.join(".bin")).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_xorz"), &copy).unwrap();
    }
    let mut c = Command::new(copy);
    c.args(args).current_dir(d).env("XORZ_CACHE_DIR", "");
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        c.uid(65534).gid(65534);
    }
    run(c)
}

#[test]
fn what_may_not_be_read_or_written_is_named() {
    let dir = folder();
    let d = dir.path();
    let mode =
        |name: &str, mode| fs::set_permissions(d.join(name), fs::Permissions::from_mode(mode)).unwrap();
    fs::create_dir(d.join("open")).unwrap();
    mode("open", 0o777);
    fs::create_dir(d.join("shut")).unwrap();
    fs::write(d.join("shut/old"), b"old").unwrap();
    mode("shut", 0o555);
    let secret = |name: &str| {
        fs::copy(d.join("ft"), d.join(name)).unwrap();
        mode(name, 0o000);
    };
    secret("secret");
    model(&d.join("secret.d"), &matrices(22, 4, 256, 512).1, 2);
    mode("secret.d/model-00002-of-00002.safetensors", 0o000);
    model(&d.join("config.d"), &matrices(22, 4, 256, 512).1, 2);
    mode("config.d/config.json", 0o000);
    for (word, args) in [
        ("secret", ["pack", "base", "secret", "-o", "open/q"]),
        ("secret", ["pack", "secret", "ft", "-o", "open/q"]),
        ("model-00002", ["pack", "base.d", "secret.d", "-o", "open/q"]),
        ("model-00002", ["pack", "secret.d", "ft.d", "-o", "open/q"]),
        ("config.json", ["pack", "base.d", "config.d", "-o", "open/q"]),
        ("secret", ["unpack", "secret", "p", "-o", "open/q"]),
        ("secret", ["unpack", "base", "secret", "-o", "open/q"]),
        ("shut", ["pack", "base", "ft", "-o", "shut/q"]),
        ("shut", ["pack", "base", "ft", "-o", "shut/old"]),
        ("shut", ["unpack", "base", "p", "-o", "shut/old"]),
        ("shut", ["unpack", "base.d", "d", "-o", "shut/q"]),
    ] {
        let out = unprivileged(d, &args);
        let text = complaint(&out);
        assert_eq!(out.status.code(), Some(4), "{args:?}: {text}");
        assert!(text.contains(word) && text.to_lowercase().contains("permission"), "{args:?}: {text}");
        assert_eq!(
            (names(&d.join("open")), names(&d.join("shut"))),
            (vec![], vec!["old".to_owned()]),
            "{args:?}"
        );
    }
    assert_eq!(fs::read(d.join("shut/old")).unwrap(), b"old");
    // Not a word about the base's settings: only its tensors matter.
    mode("base.d/config.json", 0o000);
    let out = unprivileged(d, &["pack", "base.d", "ft.d", "-o", "open/q"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    mode("shut", 0o755);
}
