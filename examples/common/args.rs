//! The command line of the examples. It is the same for all: `--quick`, `--out`, `--overwrite`, `--help`, and the options of the example.
#![allow(dead_code)]

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use prismgrad::Result;
use prismgrad::train::{Existing, RunFolder};
use std::fmt::Display;
use std::path::PathBuf;
use std::process::exit;
use std::str::FromStr;

/// An option: its name, its default (empty for a flag), its value under `--quick`, and its help text.
pub type Opt = (&'static str, &'static str, &'static str, &'static str);

/// The options of the command line.
pub struct Args {
    options: &'static [Opt],
    matches: ArgMatches,
}

impl Args {
    /// Reads the command line. `--help` prints the options; a wrong option ends the program with a message and code 2.
    pub fn parse(example: &'static str, about: &'static str, options: &'static [Opt]) -> Args {
        let mut command = Command::new(example)
            .about(about)
            .override_usage(format!("cargo run --release --example {example} -- [options]"))
            .disable_version_flag(true)
            .arg(
                Arg::new("out")
                    .long("out")
                    .value_name("DIR")
                    .default_value(format!("runs/{example}"))
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("run folder"),
            )
            .arg(flag("overwrite", "replace a run that is in the folder already"))
            .arg(flag("quick", "a short run, to see that it works; its figures mean little"));
        for &(name, default, quick, text) in options {
            command = command.arg(match default {
                "" => flag(name, text),
                _ if quick == default => Arg::new(name).long(name).default_value(default).help(text),
                _ => Arg::new(name).long(name).default_value(default).help(format!("{text} [quick: {quick}]")),
            });
        }
        Args { options, matches: command.get_matches() }
    }
    /// Whether the option was given.
    pub fn has(&self, name: &str) -> bool {
        self.matches.value_source(name) == Some(ValueSource::CommandLine)
    }
    /// The value of an option as text: the given value, or its default, which depends on `--quick`.
    pub fn text(&self, name: &str) -> &str {
        let quick = self.options.iter().find(|o| o.0 == name && self.has("quick") && !self.has(name));
        match quick {
            Some(option) => option.2,
            None => self.matches.get_one::<String>(name).map_or("", String::as_str),
        }
    }
    /// The run folder, whose name may be any that the system accepts.
    pub fn out(&self) -> PathBuf {
        self.matches.get_one::<PathBuf>("out").cloned().unwrap_or_default()
    }
    /// The value of an option, parsed and checked; `accepted` describes valid values in the error.
    pub fn get<T: FromStr>(&self, name: &str, accepted: &str, accept: impl Fn(&T) -> bool) -> T {
        match self.text(name).parse() {
            Ok(value) if accept(&value) => value,
            _ => fail(format!("--{name} cannot be '{}'; give {accepted}", self.text(name))),
        }
    }
    /// The meaning of an option whose value is one of a few words.
    pub fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)]) -> T {
        let known: Vec<&str> = choices.iter().map(|c| c.0).collect();
        match choices.iter().find(|c| c.0 == self.text(name)) {
            Some(choice) => choice.1,
            None => fail(format!("--{name} cannot be '{}'; choose from {}", self.text(name), known.join(", "))),
        }
    }
    /// The run folder of `--out` with this configuration. A folder that has a run already is refused unless `--overwrite` is given.
    pub fn folder(&self, config: &impl serde::Serialize) -> Result<RunFolder> {
        let existing = if self.has("overwrite") { Existing::Overwrite } else { Existing::Refuse };
        RunFolder::create(self.out(), config, existing, &[])
    }
}

fn flag(name: &'static str, text: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(text)
}

/// Ends the program: with code 0, or a message and code 1 if the work failed.
pub fn finish(result: Result<()>) {
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
