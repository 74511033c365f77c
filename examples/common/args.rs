//! The command line of the examples: `--name value` and `--flag`, checked against a list.
#![allow(dead_code)]

use std::fmt::Display;
use std::process::exit;
use std::str::FromStr;

/// An option: its name, what it stands at (empty if it is a flag), and what it does.
pub type Opt = (&'static str, &'static str, &'static str);

/// The options given, and the list that they were checked against.
pub struct Args {
    options: &'static [Opt],
    given: Vec<(&'static str, String)>,
}

impl Args {
    /// Reads the command line. `--help` prints the options; a wrong one ends the program with code 2.
    pub fn parse(example: &str, about: &str, options: &'static [Opt]) -> Args {
        let mut args = Args { options, given: Vec::new() };
        let mut words = std::env::args_os().skip(1).map(|w| w.to_string_lossy().into_owned());
        while let Some(word) = words.next() {
            if word == "--help" || word == "-h" {
                println!("{about}\n\nUsage: cargo run --release --example {example} -- [options]\n");
                for (name, default, text) in options {
                    let left = if default.is_empty() { format!("--{name}") } else { format!("--{name} <{default}>") };
                    println!("  {left:<28} {text}");
                }
                exit(0);
            }
            let Some(&(name, default, _)) = options.iter().find(|o| word.strip_prefix("--") == Some(o.0)) else {
                let known: String = options.iter().map(|o| format!("--{}, ", o.0)).collect();
                fail(format!("there is no option '{word}'; choose from {known}--help"));
            };
            if args.has(name) {
                fail(format!("--{name} is there twice; give it once"));
            }
            let value = match default {
                "" => String::new(),
                _ => words
                    .next()
                    .filter(|w| !w.starts_with("--"))
                    .unwrap_or_else(|| fail(format!("--{name} needs a value, such as --{name} {default}"))),
            };
            args.given.push((name, value));
        }
        args
    }
    /// Whether the option was given.
    pub fn has(&self, name: &str) -> bool {
        self.given.iter().any(|g| g.0 == name)
    }
    /// The value of an option as text: the one given, else what it stands at.
    pub fn text(&self, name: &str) -> &str {
        let default = self.options.iter().find(|o| o.0 == name).map_or("", |o| o.1);
        self.given.iter().find(|g| g.0 == name).map_or(default, |g| &g.1)
    }
    /// The value of an option, read and checked; `wanted` says what is accepted.
    pub fn get<T: FromStr>(&self, name: &str, wanted: &str, accept: impl Fn(&T) -> bool) -> T {
        match self.text(name).parse() {
            Ok(value) if accept(&value) => value,
            _ => fail(format!("--{name} cannot be '{}'; give {wanted}", self.text(name))),
        }
    }
    /// One of a few words, and what it stands for.
    pub fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> T {
        let known: Vec<&str> = choices.iter().map(|c| c.0).collect();
        match choices.iter().find(|c| c.0 == self.text(name)) {
            Some(choice) => choice.1,
            None => fail(format!("--{name} cannot be '{}'; choose from {}", self.text(name), known.join(", "))),
        }
    }
}

/// Ends the program: with code 0, or a message and code 1 if the work failed.
pub fn finish(result: prismgrad::Result<()>) {
    if let Err(e) = result {
        eprintln!("error: {e}");
        exit(1)
    }
}

/// Ends the program with a message about its options and code 2.
pub fn fail(message: impl Display) -> ! {
    eprintln!("error: {message}");
    exit(2)
}
