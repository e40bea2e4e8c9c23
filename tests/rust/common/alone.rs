//! Tests that count or change what the whole process shares (`xorz::cpu::counters`): each in a process of its
//! own.

use std::process::Command;

const ALONE: &str = "XORZ_TEST_ALONE";

/// The name by which the test harness knows the test `F`, or the test that holds the closure `F`: without
/// crate and closure.
pub fn test_name<F>() -> String {
    let path = std::any::type_name::<F>().split("::{{closure}}").next().unwrap_or_default();
    path.split_once("::").map_or(path, |(_, inside)| inside).to_owned()
}

/// Run `body`, the whole of the test that calls this, in a process that runs nothing else.
pub fn alone<F: FnOnce()>(body: F) {
    if std::env::var_os(ALONE).is_some() {
        return body();
    }
    let name = test_name::<F>();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &name, "--nocapture", "--test-threads=1"]).env(ALONE, "1");
    let out = child.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    // A name that the harness does not know would run nothing, and succeed.
    assert!(out.status.success() && text.contains("1 passed"), "{name}: {}\n{text}", out.status);
}
