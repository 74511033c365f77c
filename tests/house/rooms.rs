//! The order of the house: which folder of `src/` may import from which, and where kernels may be launched.
//!
//! ARCHITECTURE.md and this test share one list: the line that begins with "Order:" in that page.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All Rust files below `folder`, by path from the root of the repository.
fn sources(folder: &str) -> Vec<String> {
    let mut found = vec![];
    for entry in fs::read_dir(root().join(folder)).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let path = format!("{folder}/{name}");
        if root().join(&path).is_dir() {
            found.extend(sources(&path));
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The code of a file: comments, text and unit tests left out.
fn code(path: &str) -> String {
    let text = read(path);
    let text = &text[..text.find("#[cfg(test)]").unwrap_or(text.len())];
    let mut out = String::new();
    for line in text.lines() {
        let mut quoted = false;
        let mut kept = String::new();
        let mut chars = line.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '\\' if quoted => drop(chars.next()),
                '"' => quoted = !quoted,
                '/' if !quoted && chars.peek() == Some(&'/') => break,
                _ if quoted => {}
                _ => kept.push(c),
            }
        }
        out.push_str(&kept);
        out.push('\n');
    }
    out
}

/// The words that follow `prefix` in `text`.
fn words_after<'a>(text: &'a str, prefix: &str) -> Vec<&'a str> {
    let word = |rest: &'a str| &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())];
    text.match_indices(prefix).map(|(at, _)| word(&text[at + prefix.len()..])).filter(|w| !w.is_empty()).collect()
}

/// The room of a file: `src/ops/linear.rs` is in `ops`, `src/profile.rs` in `profile`.
fn room(path: &str) -> &str {
    let rest = path.strip_prefix("src/").unwrap();
    rest.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The rooms in their order, from ARCHITECTURE.md.
fn order() -> Vec<String> {
    let page = read("ARCHITECTURE.md");
    let line =
        page.lines().find(|l| l.starts_with("Order:")).expect("ARCHITECTURE.md has a line that begins with \"Order:\"");
    line.split('`').skip(1).step_by(2).map(String::from).collect()
}

/// What `lib.rs` and the macros put at the root of the crate, and the room of each.
fn at_the_root() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in read("src/lib.rs").lines().filter_map(|l| l.strip_prefix("pub use ")) {
        let (room, names) = line.trim_end_matches(';').split_once("::").unwrap();
        for name in names.trim_matches(['{', '}']).split(',') {
            found.insert(name.trim().to_string(), room.to_string());
        }
    }
    for path in sources("src") {
        for name in words_after(&code(&path), "macro_rules! ") {
            found.entry(name.to_string()).or_insert_with(|| room(&path).to_string());
        }
    }
    found
}

/// The rooms that a file imports from, by `use crate::…` or by a path in the code.
fn imports(path: &str, root: &BTreeMap<String, String>) -> BTreeSet<String> {
    let code = code(path);
    let mut names: Vec<&str> = words_after(&code, "crate::");
    // `use crate::{A, b::C};`: the first word of each item.
    for (at, prefix) in code.match_indices("crate::{") {
        let (mut depth, mut start) = (1, at + prefix.len());
        for (i, c) in code[start..].char_indices().map(|(i, c)| (at + prefix.len() + i, c)) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && c == ',') {
                names.push(code[start..i].trim().split("::").next().unwrap_or_default());
                start = i + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    names.iter().filter(|n| !n.is_empty()).map(|n| root.get(*n).cloned().unwrap_or_else(|| n.to_string())).collect()
}

#[test]
fn rooms_import_only_from_those_before_them() {
    let (order, root) = (order(), at_the_root());
    let place = |room: &str| order.iter().position(|o| o == room);
    let mut wrong = vec![];
    let mut seen = BTreeSet::new();
    for path in sources("src").iter().filter(|p| *p != "src/lib.rs") {
        let own = room(path);
        seen.insert(own.to_string());
        let Some(at) = place(own) else {
            wrong.push(format!("{path}: {own} is not in the order of ARCHITECTURE.md"));
            continue;
        };
        for other in imports(path, &root) {
            match place(&other) {
                None => wrong.push(format!("{path} imports {other}, which is not in the order of ARCHITECTURE.md")),
                Some(o) if o > at => wrong.push(format!("{path} ({own}) imports from {other}, which comes after it")),
                Some(_) => {}
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let missing: Vec<&String> = order.iter().filter(|o| !seen.contains(*o)).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names rooms that src/ does not have: {missing:?}");
}

#[test]
fn kernels_are_launched_only_in_files_named_cuda() {
    let mut wrong = vec![];
    for path in sources("src") {
        let allowed = path.ends_with("/cuda.rs") || path.starts_with("src/device/");
        if !allowed && code(&path).contains("Launch::") {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "these files launch kernels; move that to the cuda.rs beside them: {wrong:?}");
}

#[test]
fn a_device_knows_no_array_and_the_cpu_halves_launch_nothing() {
    for path in sources("src/device").into_iter().chain(sources("src/base")) {
        let names = imports(&path, &at_the_root());
        assert!(names.iter().all(|n| n == "base" || n == "device"), "{path} imports {names:?}");
    }
}

/// Both lists of `src/ops/mod.rs` are what the folder holds; with `PRISMGRAD_WRITE_LISTS=1` they are written.
#[test]
fn every_file_of_ops_is_in_the_registry() {
    let mut names: Vec<String> = fs::read_dir(root().join("src/ops"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap().trim_end_matches(".rs").to_string())
        .filter(|n| n != "mod")
        .collect();
    names.sort();
    let text = read("src/ops/mod.rs");
    let mut lines: Vec<String> = vec![];
    for line in text.lines() {
        let is_module = line.starts_with("pub mod ");
        let is_entry = line.starts_with("    ") && line.ends_with("::OPS,");
        let write = |name: &String| if is_module { format!("pub mod {name};") } else { format!("    {name}::OPS,") };
        let last = lines.last().cloned().unwrap_or_default();
        match (is_module || is_entry, last.starts_with("pub mod ") || last.ends_with("::OPS,")) {
            (true, false) => lines.extend(names.iter().map(write)),
            (true, true) => {}
            (false, _) => lines.push(line.to_string()),
        }
    }
    let wanted = lines.join("\n") + "\n";
    if std::env::var_os("PRISMGRAD_WRITE_LISTS").is_some() {
        fs::write(root().join("src/ops/mod.rs"), &wanted).unwrap();
    }
    assert_eq!(read("src/ops/mod.rs"), wanted, "run PRISMGRAD_WRITE_LISTS=1 cargo test --test house");
}

/// Every op that a profile can name is in the registry, and so are its cases: `spans::op("name")` is the name of an entry.
#[test]
fn every_op_of_a_profile_is_registered() {
    let registered: BTreeSet<&str> = prismgrad::ops::registry().map(|op| op.name).collect();
    let mut missing = vec![];
    for path in sources("src/ops") {
        let text = read(&path);
        for (at, prefix) in text.match_indices("spans::op(\"") {
            let name = text[at + prefix.len()..].split('"').next().unwrap();
            if !registered.contains(name) {
                missing.push(format!("{path}: {name}"));
            }
        }
    }
    assert!(missing.is_empty(), "ops without an entry in the registry: {missing:?}");
}

/// Every file and folder below `folder`, by path from the root of the repository.
fn everything(folder: &str) -> Vec<String> {
    let mut found = vec![];
    for entry in fs::read_dir(root().join(folder)).unwrap() {
        let path = format!("{folder}/{}", entry.unwrap().file_name().into_string().unwrap());
        if root().join(&path).is_dir() {
            found.extend(everything(&path));
        }
        found.push(path);
    }
    found
}

/// Each file and folder that ARCHITECTURE.md names is there: `ops/softmax/cpu.rs` is the end of some path, `cuda/softmin.cu` too,
/// and `{a,b}.rs` names several.
#[test]
fn the_page_names_what_is_there() {
    let all: Vec<String> = ["src", "cuda", "tests"].into_iter().flat_map(everything).collect();
    let there = |name: &str| {
        let name = name.trim_end_matches('/');
        root().join(name).exists() || all.iter().any(|path| path.ends_with(&format!("/{name}")))
    };
    let page = read("ARCHITECTURE.md");
    let names = page.split('`').skip(1).step_by(2).filter(|n| !n.contains(char::is_whitespace) && !n.contains('*'));
    let named = |n: &&str| n.ends_with('/') || [".rs", ".cu", ".cuh", ".cpp", ".txt"].iter().any(|e| n.ends_with(e));
    let mut missing = vec![];
    for name in names.filter(named) {
        let whole = match (name.find('{'), name.find('}')) {
            (Some(a), Some(b)) => {
                name[a + 1..b].split(',').map(|m| format!("{}{m}{}", &name[..a], &name[b + 1..])).collect()
            }
            _ => vec![name.to_string()],
        };
        missing.extend(whole.into_iter().filter(|name| !there(name)));
    }
    assert!(missing.is_empty(), "ARCHITECTURE.md names what is not there: {missing:?}");
}
