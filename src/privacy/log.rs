//! A write-ahead log of private steps: each is on disk before it touches the parameters, so that a killed process can only have
//! counted too much.

use crate::base::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(Serialize, Deserialize)]
struct Line {
    step: u64,
    key: String,
    state: String,
    sigma: f64,
    rate: f64,
}

/// The log of one private run, a JSON line per step, in a file that only grows.
///
/// A step that a resumed process takes again counts once, if key, parameters and machine are those of the first time: it is
/// the same release. Under the same key but other parameters it is refused: both would carry the same noise, and their
/// difference none. A step under another key is another release, and counts again.
#[derive(Debug)]
pub struct StepLog {
    file: File,
    path: PathBuf,
    key: String,
    /// What each (step, key) started from.
    seen: BTreeMap<(u64, String), String>,
    /// σ and q of every distinct step.
    history: Vec<(f64, f64)>,
}

impl StepLog {
    /// Opens or creates a log. `key` stands for the key without telling it; a last line that was cut off by a kill is a step that was
    /// not taken.
    pub fn open(path: impl AsRef<Path>, key: String) -> Result<StepLog> {
        let path = path.as_ref().to_path_buf();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io("read the log of private steps", &path, e)),
        };
        let (mut seen, mut history) = (BTreeMap::new(), Vec::new());
        let whole = text.rfind('\n').map_or(0, |i| i + 1);
        for (i, line) in text[..whole].lines().enumerate() {
            let l: Line = serde_json::from_str(line).map_err(|e| {
                let what = format!("line {}: {e}; a damaged log would under-report ε, so it is not used", i + 1);
                Error::format(&path, what)
            })?;
            if seen.insert((l.step, l.key), l.state).is_none() {
                history.push((l.sigma, l.rate));
            }
        }
        let fail = |e| Error::io("open the log of private steps", &path, e);
        // Not truncated: what is there stays.
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(&path).map_err(fail)?;
        file.set_len(whole as u64).map_err(fail)?;
        let mut log = StepLog { file, path, key, seen, history };
        std::io::Seek::seek(&mut log.file, std::io::SeekFrom::End(0)).map_err(|e| log.error(e))?;
        Ok(log)
    }
    fn error(&self, e: std::io::Error) -> Error {
        Error::io("write the log of private steps", &self.path, e)
    }
    /// Whether this very release is in the log already; an error if another one with its noise is. `state` stands for what
    /// the step starts from.
    pub fn has(&self, step: u64, state: &str) -> Result<bool> {
        match self.seen.get(&(step, self.key.clone())) {
            None => Ok(false),
            Some(before) if before == state => Ok(true),
            Some(before) => Err(Error::privacy(format!(
                "step {step} was taken before under this key from another state ({before}; now {state}): both would carry the \
                 same noise, and their difference none. Resume from the checkpoint before that step on the same kind of machine, \
                 or go on with a fresh key"
            ))),
        }
    }
    /// Writes a step down, and returns once it is on disk.
    pub fn write(&mut self, step: u64, state: &str, sigma: f64, rate: f64) -> Result<()> {
        let line = Line { step, key: self.key.clone(), state: state.into(), sigma, rate };
        let mut text =
            serde_json::to_string(&line).map_err(|e| Error::format(&self.path, format!("cannot be written: {e}")))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data()).map_err(|e| self.error(e))?;
        self.seen.insert((step, line.key), line.state);
        self.history.push((sigma, rate));
        Ok(())
    }
    /// σ and q of every distinct step.
    pub fn history(&self) -> &[(f64, f64)] {
        &self.history
    }
}
