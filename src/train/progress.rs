//! Progress on the terminal: a bar on a terminal, or a line every few seconds if output goes to a file.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows how far a run is, its speed, the time left and a few numbers such as the loss and ε.
///
/// It writes to standard error, so that standard output has only results. Its failures never make the run fail.
pub struct Progress {
    name: String,
    total: Option<u64>,
    start: u64,
    done: u64,
    began: Instant,
    sink: Sink,
}

enum Sink {
    Bar(ProgressBar),
    Lines { out: Box<dyn Write + Send>, every: Duration, last: Option<Instant> },
}

impl Progress {
    /// Progress towards `total` steps (or without an end), counted from `start`, which is not 0 after a resume.
    pub fn new(name: impl Into<String>, total: Option<u64>, start: u64) -> Self {
        let name = name.into();
        let sink = if std::io::stderr().is_terminal() {
            Sink::Bar(bar(&name, total, start))
        } else {
            Sink::Lines { out: Box::new(std::io::stderr()), every: Duration::from_secs(5), last: None }
        };
        Progress { name, total, start, done: start, began: Instant::now(), sink }
    }

    /// Progress as lines to any writer, at most one per `every`; the first step and the last always give one.
    pub fn lines(
        name: impl Into<String>,
        total: Option<u64>,
        start: u64,
        out: impl Write + Send + 'static,
        every: Duration,
    ) -> Self {
        let sink = Sink::Lines { out: Box::new(out), every, last: None };
        Progress { name: name.into(), total, start, done: start, began: Instant::now(), sink }
    }

    /// Reports that `done` steps have been made, with the numbers to show, such as `[("loss", 1.9), ("ε", 0.8)]`.
    pub fn set(&mut self, done: u64, values: &[(&str, f64)]) {
        self.done = done;
        let elapsed = self.began.elapsed();
        let finished = self.total.is_some_and(|t| done >= t);
        let message = || format!("{}{}", numbers(values), speed(done.saturating_sub(self.start), elapsed));
        match &mut self.sink {
            Sink::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(message());
            }
            Sink::Lines { out, every, last } => {
                if !finished && last.is_some_and(|l| l.elapsed() < *every) {
                    return;
                }
                *last = Some(Instant::now());
                let of = self.total.map_or(String::new(), |t| format!("/{t}"));
                let left = time_left(self.start, done, self.total, elapsed);
                let _ = writeln!(out, "{} {done}{of}  {}{left}", self.name, message());
            }
        }
    }

    /// Writes a separate line above the bar, such as "checkpoint saved".
    pub fn note(&mut self, text: &str) {
        match &mut self.sink {
            Sink::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Sink::Lines { out, .. } => drop(writeln!(out, "{text}")),
        }
    }

    /// Steps made so far.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Leaves the last state on the screen and stops redrawing.
    pub fn finish(self) {
        if let Sink::Bar(bar) = &self.sink {
            bar.abandon();
        }
    }
}

fn bar(name: &str, total: Option<u64>, start: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    let template = if total.is_some() {
        "{prefix} {wide_bar} {pos}/{len}  {msg}  {elapsed} left {eta}"
    } else {
        "{prefix} {spinner} {pos}  {msg}  {elapsed}"
    };
    // The template is fixed, so it cannot be invalid at run time; the plain style is a fallback.
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(name.to_string());
    bar.set_position(start);
    bar.reset_eta();
    bar
}

fn numbers(values: &[(&str, f64)]) -> String {
    values.iter().fold(String::new(), |mut text, (name, value)| {
        let _ = write!(text, "{name} {}  ", short(*value));
        text
    })
}

/// The value with four significant digits, with an exponent only where it makes the text shorter.
fn short(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if !value.is_finite() => format!("{value}"),
        0.0 => "0".into(),
        s if !(1e-3..1e6).contains(&s) => format!("{value:.2e}"),
        s => format!("{value:.*}", (3 - s.log10().floor() as i32).clamp(0, 6) as usize),
    }
}

fn speed(steps: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    match steps as f64 / seconds {
        rate if steps == 0 || !rate.is_finite() => String::new(),
        rate if rate >= 1.0 => format!("{} steps/s", short(rate)),
        rate => format!("{} s/step", short(1.0 / rate)),
    }
}

fn time_left(start: u64, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let made = done.saturating_sub(start);
    match total {
        Some(total) if made > 0 && done < total => {
            let seconds = elapsed.as_secs_f64() / made as f64 * (total - done) as f64;
            let s = seconds.round() as u64;
            format!("  {}:{:02}:{:02} left", s / 3600, s / 60 % 60, s % 60)
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_few_and_tell_what_matters() {
        let out = Shared::default();
        let mut progress = Progress::lines("train", Some(100), 90, out.clone(), Duration::from_secs(3600));
        for step in 91..=100 {
            progress.set(step, &[("loss", 1.23456), ("ε", 0.5)]);
        }
        progress.note("saved");
        assert_eq!(progress.done(), 100);
        progress.finish();
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].starts_with("train 91/100  loss 1.235  ε 0.5000  ") && lines[0].ends_with(" left"), "{text}");
        assert!(lines[1].starts_with("train 100/100") && !lines[1].contains("left"), "{text}");
    }

    #[test]
    fn numbers_are_short() {
        let cases = [(0.0, "0"), (1234.5678, "1235"), (12.3456, "12.35"), (0.012345, "0.01235"), (1e-5, "1.00e-5")];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
        assert_eq!(short(f64::NAN), "NaN");
        assert_eq!(short(2.5e9), "2.50e9");
        assert_eq!(time_left(0, 1, Some(3601), Duration::from_secs(1)), "  1:00:00 left");
        assert_eq!(speed(1, Duration::from_secs(4)), "4.000 s/step");
    }
}
