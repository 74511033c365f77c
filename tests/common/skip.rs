//! Reports of tests that cannot run on this machine or in this run.

use std::io::Write;

/// Reports on standard error, in spite of the test's captured output, that a test or a part of it did not run and why. If
/// `PRISMGRAD_REQUIRE_ALL` is set, as in `.ci/run`, it fails instead.
#[track_caller]
pub fn skip(why: &str) {
    let required = std::env::var_os("PRISMGRAD_REQUIRE_ALL").is_some_and(|v| !v.is_empty() && v != "0");
    assert!(!required, "not tested, though PRISMGRAD_REQUIRE_ALL is set: {why}");
    let name = std::thread::current().name().unwrap_or("a test").to_string();
    let _ = writeln!(std::io::stderr(), "{name}: not tested, {why}");
}
