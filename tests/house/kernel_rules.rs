//! Rules for the texts of the kernels that keep them portable, checkable and repeatable.

use crate::common::skip::skip;
use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, iter};

/// The text without comments and string contents, line by line as before.
fn code(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, rest.peek()) {
            ('/', Some('/')) => {
                iter::from_fn(|| rest.next_if(|c| *c != '\n')).for_each(drop);
            }
            ('/', Some('*')) => {
                rest.next();
                let mut last = ' ';
                for c in rest.by_ref() {
                    if c == '\n' {
                        out.push(c);
                    }
                    if last == '*' && c == '/' {
                        break;
                    }
                    last = c;
                }
            }
            _ => out.push(c),
        }
    }
    out
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
}

fn files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let mut out: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|x| x == "cu"))
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(p).unwrap()))
        .collect();
    out.sort();
    assert!(!out.is_empty());
    out
}

#[test]
fn kernel_files_keep_to_the_rules() {
    let mut broken = vec![];
    for (file, text) in files() {
        if text.lines().next() != Some("#include \"prelude.cuh\"") {
            broken.push(format!("{file}:1: the first line is not #include \"prelude.cuh\""));
        }
        for (i, line) in code(&text).lines().enumerate() {
            let mut say = |what: &str| broken.push(format!("{file}:{}: {what}: {line}", i + 1));
            let directive = line.trim_start().strip_prefix('#').map(str::trim_start);
            if i > 0 && directive.is_some_and(|d| d.starts_with("include")) {
                say("another include (NVRTC has no headers)");
            }
            for word in ["__shared__", "asm", "__asm__"] {
                if has_word(line, word) {
                    say(&format!("{word} outside prelude.cuh"));
                }
            }
            // Sums by atomics depend on the order of the blocks, in every type that rounds.
            if ["atomicAdd", "atomicSub", "atomicExch"].iter().any(|w| has_word(line, w))
                && ["float", "double", "f32", "f64", "bf16", "f16"].iter().any(|w| has_word(line, w))
            {
                say("a float atomic");
            }
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

/// Names written out after `__global__` (those that macros put together are compared by the compile check's table).
#[test]
fn kernel_names_are_unique() {
    let mut seen = BTreeMap::new();
    for (file, text) in files() {
        let text = code(&text);
        for part in text.split("__global__").skip(1) {
            let part = part.trim_start().trim_start_matches('\\').trim_start();
            let part = match part.find("__launch_bounds__") {
                Some(p) if part[..p].split_whitespace().all(|w| w == "void") => {
                    let rest = &part[p..];
                    &rest[rest.find(')').unwrap_or(0) + 1..]
                }
                _ => part,
            };
            let head = part.split('(').next().unwrap_or("");
            let name = head.split_whitespace().last().unwrap_or("");
            // In capitals: the parameter of a macro.
            if name.is_empty() || head.contains("##") || name.chars().all(|c| c.is_ascii_uppercase() || c == '_') {
                continue;
            }
            if let Some(other) = seen.insert(name.to_string(), file.clone()) {
                panic!("two kernels {name}: in {other} and in {file}");
            }
        }
    }
}

/// Every kernel is launched through an op, an optimizer or a step: `tests/cuda/registry.rs` runs every case of the registry and
/// `tests/cuda/steps.rs` whole steps, and neither launches a kernel itself. `.ci/run` has these two write the names of what they
/// launch to the file that `PRISMGRAD_EMU_LAUNCHED` names, and runs this test after them. `device_check.cu` is left out: its kernels
/// check a card, and no op needs them.
#[test]
fn every_kernel_is_launched_through_an_op() {
    let Some(path) = std::env::var_os("PRISMGRAD_EMU_LAUNCHED") else {
        return skip("PRISMGRAD_EMU_LAUNCHED names no file of launched kernels");
    };
    let launched = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", Path::new(&path).display()));
    let launched: std::collections::BTreeSet<&str> = launched.lines().collect();
    let table = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/resources.txt")).unwrap();
    let rows = table.lines().filter(|l| !l.starts_with('#')).map(|l| l.split_whitespace().collect::<Vec<_>>());
    let rows = rows.filter(|r| r[1] != "device_check");
    let idle: std::collections::BTreeSet<String> =
        rows.filter(|r| !launched.contains(r[2])).map(|r| format!("{} of {}.cu", r[2], r[1])).collect();
    assert!(idle.is_empty(), "kernels that no op launches: {idle:#?}");
}
