//! Promise: file systems that refuse what disks do are survived: folders that cannot be synced (CIFS and FUSE: EINVAL, ENOTSUP),
//! no locks (Lustre, NFS: ENOSYS, ENOLCK), no hard links, no permissions. What fails in earnest is an error all the same.

use crate::common::disk::{command, complaint, done, matrices, model, names, run, safetensors, tree};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Refuses fsync of folders, and whole system calls by a filter of the kernel, which sees those that no library makes, too.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int fsync(int fd) {
  const char *refused = getenv("REFUSE_FOLDERS");
  struct stat s;
  if (refused && fstat(fd, &s) == 0 && S_ISDIR(s.st_mode)) {
    errno = atoi(refused);
    return -1;
  }
  return syscall(SYS_fsync, fd);
}

__attribute__((constructor)) static void filter(void) {
  const char *call = getenv("REFUSE_CALL"), *code = getenv("REFUSE_CODE");
  if (!call || !code) return;
  struct sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, atoi(call), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | atoi(code)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {sizeof rules / sizeof *rules, rules};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) _exit(99);
}
"#;

/// The shim, or nothing where there is no compiler.
fn shim(d: &Path) -> Option<PathBuf> {
    let (source, built) = (d.join("shim.c"), d.join("shim.so"));
    fs::write(&source, SHIM).unwrap();
    let out = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&built).arg(&source).output().ok()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(built)
}

struct Refusing {
    dir: tempfile::TempDir,
    shim: PathBuf,
}

impl Refusing {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        let (base, ft) = matrices(91, 3, 64, 256);
        fs::write(d.join("base"), safetensors(&base)).unwrap();
        fs::write(d.join("ft"), safetensors(&ft)).unwrap();
        model(&d.join("base.d"), &base, 2);
        model(&d.join("ft.d"), &ft, 2);
        fs::create_dir(d.join("ft.d/deep")).unwrap();
        fs::write(d.join("ft.d/deep/run.sh"), b"#!/bin/sh\n").unwrap();
        fs::set_permissions(d.join("ft.d/deep/run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        let Some(shim) = shim(d) else {
            eprintln!("SKIPPED: there is no C compiler");
            return None;
        };
        Some(Self { dir, shim })
    }

    fn run(&self, args: &[&str], env: &[(&str, String)]) -> Output {
        let mut c = command(self.dir.path(), args);
        c.env("LD_PRELOAD", &self.shim).envs(env.iter().cloned());
        run(c)
    }

    /// Everything is written twice, to new names and over old files, and comes back.
    fn survives(&self, what: &str, env: &[(&str, String)]) {
        let d = self.dir.path();
        for round in 0..2 {
            let _ = fs::remove_dir_all(d.join("out.d"));
            for args in [
                ["pack", "base", "ft", "-o", "p"],
                ["pack", "base.d", "ft.d", "-o", "q"],
                ["unpack", "base", "p", "-o", "out"],
                ["unpack", "base.d", "q", "-o", "out.d"],
            ] {
                let out = self.run(&args, env);
                let text = String::from_utf8_lossy(&out.stderr).into_owned();
                assert!(out.status.success(), "{what}, round {round}, {args:?}: {text}");
            }
            assert!(fs::read(d.join("out")).unwrap() == fs::read(d.join("ft")).unwrap(), "{what}");
            let bytes =
                |dir: &str| -> Vec<_> { tree(&d.join(dir)).into_iter().map(|(n, (_, b))| (n, b)).collect() };
            assert!(bytes("out.d") == bytes("ft.d"), "{what}");
            assert!(names(d).iter().all(|n| !n.starts_with('.')), "{what}: {:?}", names(d));
        }
        done(d, &["verify", "base.d", "q", "ft.d"]);
        for name in ["p", "q", "out"] {
            fs::remove_file(d.join(name)).unwrap();
        }
    }
}

#[test]
fn folders_that_cannot_be_synced_are_no_failure() {
    let Some(refusing) = Refusing::new() else { return };
    for code in [libc::EINVAL, libc::ENOTSUP, libc::ENOSYS, libc::EPERM, libc::EACCES, libc::EBADF] {
        refusing.survives(&format!("fsync {code}"), &[("REFUSE_FOLDERS", code.to_string())]);
    }
    // A disk that fails is none of these.
    for code in [libc::EIO, libc::ENOSPC] {
        let out = refusing.run(&["pack", "base", "ft", "-o", "p"], &[("REFUSE_FOLDERS", code.to_string())]);
        assert_eq!(out.status.code(), Some(4), "{}", complaint(&out));
    }
}

#[test]
fn calls_that_a_file_system_lacks_are_done_without() {
    let Some(refusing) = Refusing::new() else { return };
    for (what, call, codes) in [
        ("flock", libc::SYS_flock, &[libc::ENOSYS, libc::ENOLCK, libc::EOPNOTSUPP, libc::EINVAL][..]),
        ("linkat", libc::SYS_linkat, &[libc::EPERM, libc::ENOTSUP, libc::ENOENT]),
        ("fchmod", libc::SYS_fchmod, &[libc::EPERM, libc::ENOTSUP]),
    ] {
        for code in codes {
            let env = [("REFUSE_CALL", call.to_string()), ("REFUSE_CODE", code.to_string())];
            refusing.survives(&format!("{what} {code}"), &env);
        }
    }
}
