//! A write-ahead log of private steps: each is on disk before it touches the parameters, so that a killed process can only have
//! counted too much.

use crate::base::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

#[derive(Serialize, Deserialize)]
struct Line {
    step: u64,
    key: String,
    state: String,
    sigma: f64,
    rate: f64,
}

/// The log of one private run, a JSON line per step, in a file that only grows; or in memory alone, where it sees what this
/// process does.
///
/// The file is locked while it is open: a second run that opens it is refused, because each would hide the other's steps.
///
/// A step that a resumed process takes again counts once, if key, parameters and machine are those of the first time: it is
/// the same release. Under the same key but other parameters it is refused: both would carry the same noise, and their
/// difference none. A step under another key is another release, and counts again.
#[derive(Debug)]
pub struct StepLog {
    file: Option<(File, PathBuf)>,
    key: String,
    /// What each (step, key) started from.
    seen: BTreeMap<(u64, String), String>,
    /// σ and q of every distinct step.
    history: Vec<(f64, f64)>,
}

impl StepLog {
    /// A log without a file. `key` is a number that follows from the key and from which the key does not follow.
    pub fn in_memory(key: String) -> StepLog {
        StepLog { file: None, key, seen: BTreeMap::new(), history: Vec::new() }
    }
    /// Opens or creates a log. A last line that was cut off by a kill is a step that was not taken.
    pub fn open(path: impl AsRef<Path>, key: String) -> Result<StepLog> {
        let path = path.as_ref().to_path_buf();
        let fail = |e| Error::io("open the log of private steps", &path, e);
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::privacy(format!(
                    "the log of private steps {} is in use by another run, and each would hide the other's steps: wait until \
                     that run has ended, or give this one another log and a key of its own",
                    path.display()
                )));
            }
            Err(TryLockError::Error(e)) => return Err(Error::io("lock the log of private steps", &path, e)),
        }
        // The file's name has to outlive a power cut, too.
        #[cfg(unix)]
        File::open(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
            .and_then(|folder| folder.sync_all())
            .map_err(fail)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|e| Error::io("read the log of private steps", &path, e))?;
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
        file.set_len(whole as u64).map_err(fail)?;
        Ok(StepLog { file: Some((file, path)), key, seen, history })
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
        if let Some((file, path)) = &mut self.file {
            let mut text =
                serde_json::to_string(&line).map_err(|e| Error::format(&*path, format!("cannot be written: {e}")))?;
            text.push('\n');
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_data())
                .map_err(|e| Error::io("write the log of private steps", &*path, e))?;
        }
        self.seen.insert((step, line.key), line.state);
        self.history.push((sigma, rate));
        Ok(())
    }
    /// Distinct steps under this log's own key.
    pub fn own_steps(&self) -> u64 {
        self.seen.keys().filter(|(_, key)| *key == self.key).count() as u64
    }
    /// σ and q of every distinct step.
    pub fn history(&self) -> &[(f64, f64)] {
        &self.history
    }
}
