//! The commands that the pages name exist, and `.ci/run` runs each of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// What follows `cargo` on a line of shell, up to a comment or the next command.
struct Command {
    /// What is for cargo; the first word is `run`, `test`, `bench`, ….
    cargo: Vec<String>,
    /// What is for the program, after `--`.
    program: Vec<String>,
}

impl Command {
    fn of(line: &str) -> Option<Command> {
        let end = |w: &&str| !(w.starts_with(['|', '&', ';', '>']) || w.starts_with("2>"));
        let words = line.split_whitespace().take_while(|w| !w.starts_with('#')).skip_while(|w| *w != "cargo").skip(1);
        let mut words = words.take_while(end).map(str::to_string);
        let cargo: Vec<String> = words.by_ref().take_while(|w| w != "--").collect();
        (!cargo.is_empty()).then(|| Command { cargo, program: words.collect() })
    }

    /// As it is typed.
    fn text(&self) -> String {
        let program = if self.program.is_empty() { String::new() } else { format!(" -- {}", self.program.join(" ")) };
        format!("cargo {}{program}", self.cargo.join(" "))
    }

    /// What one of cargo's options is given.
    fn given(&self, option: &str) -> Vec<&str> {
        let pairs = self.cargo.windows(2).filter(|w| w[0] == option);
        pairs.flat_map(|w| w[1].split(',')).collect()
    }

    /// What is wrong with the files and features that it names.
    fn missing(&self) -> Vec<String> {
        let mut out = Vec::new();
        for (option, folder) in [("--example", "examples"), ("--test", "tests"), ("--bench", "benches")] {
            // '*' is all of them.
            for name in self.given(option).into_iter().filter(|n| *n != "'*'") {
                let (file, main) = (format!("{folder}/{name}.rs"), format!("{folder}/{name}/main.rs"));
                let model = format!("{folder}/models/{name}.rs");
                if ![&file, &main, &model].iter().any(|f| root().join(f).exists()) {
                    out.push(format!("there is no {file}"));
                }
            }
        }
        let manifest = read("Cargo.toml");
        for feature in self.given("--features") {
            if !manifest.lines().any(|l| l.starts_with(&format!("{feature} = ["))) {
                out.push(format!("there is no feature {feature}"));
            }
        }
        out
    }

    /// Whether this command of `.ci/run` does what the page's does: the same of cargo, and every option of the program's
    /// (their values, and what else the program is given, may be chosen for a short run).
    fn covers(&self, page: &Command) -> bool {
        // Nobody looks at a browser there.
        let wanted = page.cargo.iter().filter(|w| *w != "--open");
        self.cargo[0] == page.cargo[0]
            && wanted.into_iter().all(|w| self.cargo.contains(w) || self.given("--features").contains(&w.as_str()))
            && page.program.iter().filter(|w| w.starts_with("--")).all(|w| self.program.contains(w))
    }
}

/// Every command in the code blocks of a page, and between backticks in its tables and sentences.
fn commands(page: &str) -> Vec<Command> {
    let mut out = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside {
            out.extend(Command::of(line));
        } else {
            out.extend(line.split('`').skip(1).step_by(2).filter_map(Command::of));
        }
    }
    out
}

/// The README and the pages of results, with their names.
fn pages() -> Vec<(String, String)> {
    let mut out = vec!["README.md".to_string()];
    for entry in fs::read_dir(root().join("docs/results")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            out.push(format!("docs/results/{name}"));
        }
    }
    assert!(out.len() > 1, "docs/results has no pages");
    out.into_iter().map(|name| (name.clone(), read(name))).collect()
}

/// The commands of `.ci/run`; a backslash at the end of a line continues it.
fn checked() -> Vec<Command> {
    let script = read(".ci/run").replace("\\\n", " ");
    script.lines().filter(|l| !l.trim_start().starts_with('#')).filter_map(Command::of).collect()
}

#[test]
fn commands_are_found_where_they_are_written() {
    let page = "Text with `cargo doc --open` and `no command`.\n\n```sh\n\
                A=1 cargo run --release --example a -- x --list # what it does\n# cargo in a comment\n```\n\
                | `cargo test --features emulator` | all |\n";
    let found: Vec<String> = commands(page).iter().map(Command::text).collect();
    let want = ["cargo doc --open", "cargo run --release --example a -- x --list", "cargo test --features emulator"];
    assert_eq!(found, want);
    let [a, b] = ["cargo run --example a -- --list", "cargo test --features nvtx,emulator --tests"].map(Command::of);
    let (a, b, found) = (a.unwrap(), b.unwrap(), commands(page));
    assert!(b.covers(&found[2]) && !b.covers(&found[1]));
    assert!(!a.covers(&found[1]), "not the same without --release");
    assert_eq!(a.missing(), ["there is no examples/a.rs"]);
    assert_eq!(Command::of("cargo build --features emulator,none").unwrap().missing(), ["there is no feature none"]);
}

#[test]
fn commands_of_the_pages_exist_and_are_run() {
    let checked = checked();
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for (page, text) in pages() {
        for command in commands(&text) {
            let line = command.text();
            wrong.extend(command.missing().into_iter().map(|m| format!("{page}: {line}: {m}")));
            if !checked.iter().any(|c| c.covers(&command)) {
                wrong.push(format!("{page}: {line}: .ci/run does not run it"));
            }
            seen.insert(line);
        }
    }
    assert!(seen.len() >= 15, "the pages name few commands: {seen:#?}");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// What `.ci/run` runs exists, and it runs every example and every benchmark that there is.
#[test]
fn every_example_is_run() {
    let checked = checked();
    let missing: Vec<String> = checked.iter().flat_map(Command::missing).collect();
    assert!(missing.is_empty(), "{missing:?}");
    for (option, folder) in [("--example", "examples"), ("--bench", "benches")] {
        let files: Vec<PathBuf> = fs::read_dir(root().join(folder)).unwrap().map(|e| e.unwrap().path()).collect();
        let names: Vec<&str> = files
            .iter()
            .filter(|f| f.extension().is_some_and(|x| x == "rs"))
            .map(|f| f.file_stem().unwrap().to_str().unwrap())
            .collect();
        assert!(!names.is_empty());
        for name in names {
            assert!(checked.iter().any(|c| c.given(option).contains(&name)), ".ci/run never runs {folder}/{name}.rs");
        }
    }
}
