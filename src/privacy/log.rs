//! A write-ahead log of private steps: each step is on disk before it changes the parameters, so that a killed process can only have
//! counted too many steps.

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
    /// Name of the release; `None` if it was not known before the step (on a GPU).
    release: Option<String>,
    sigma: f64,
    rate: f64,
}

/// The log of one private run: one JSON line per step, in an append-only file, or in memory alone, where it covers only this process.
///
/// The file is locked while it is open: a second run that opens it is refused, because each run would miss the other's steps.
///
/// The log counts releases; a release is the noised sum of one step. A step that a resumed process repeats counts once if it releases the
/// same bits, which the name of the release shows. Other sums of the same step have other noise but come from the same Poisson batch:
/// together they reveal as much about it as one sum with the noise multiplier (Σ σᵢ⁻²)^(−½), and count as such.
#[derive(Debug)]
pub struct StepLog {
    file: Option<(File, PathBuf)>,
    key: String,
    /// The releases of each (step, key).
    seen: BTreeMap<(u64, String), Taken>,
}

/// The releases of one step under one key.
#[derive(Clone, Debug)]
struct Taken {
    /// Name of each release, if it has one, and its σ.
    releases: Vec<(Option<String>, f64)>,
    rate: f64,
}

impl Taken {
    /// σ of a single release that reveals as much.
    fn sigma(&self) -> f64 {
        match &self.releases[..] {
            [(_, sigma)] => *sigma,
            all => all.iter().map(|(_, s)| s.powi(-2)).sum::<f64>().powf(-0.5),
        }
    }
    fn has(&self, release: Option<&str>) -> bool {
        release.is_some() && self.releases.iter().any(|(r, _)| r.as_deref() == release)
    }
}

impl StepLog {
    /// A log without a file. `key` identifies the noise key: it is computed from the key, but the key cannot be computed from it.
    pub fn in_memory(key: String) -> StepLog {
        StepLog { file: None, key, seen: BTreeMap::new() }
    }
    /// Opens or creates a log. An incomplete last line, left by a killed process, is a step that was not taken.
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
        // The folder is synced, so that the file's name survives a power failure, too.
        #[cfg(unix)]
        File::open(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
            .and_then(|folder| folder.sync_all())
            .map_err(fail)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|e| Error::io("read the log of private steps", &path, e))?;
        let mut log = StepLog { file: None, key, seen: BTreeMap::new() };
        let whole = text.rfind('\n').map_or(0, |i| i + 1);
        for (i, line) in text[..whole].lines().enumerate() {
            let l: Line = serde_json::from_str(line).map_err(|e| {
                let what = format!("line {}: {e}; a damaged log would under-report ε, so it is not used", i + 1);
                Error::format(&path, what)
            })?;
            log.add(l);
        }
        file.set_len(whole as u64).map_err(fail)?;
        Ok(StepLog { file: Some((file, path)), ..log })
    }
    fn add(&mut self, l: Line) {
        let taken = self.seen.entry((l.step, l.key)).or_insert_with(|| Taken { releases: Vec::new(), rate: l.rate });
        if !taken.has(l.release.as_deref()) {
            taken.releases.push((l.release, l.sigma));
            // If another version or an editor wrote the log, rates may differ: the larger one is the safe one.
            taken.rate = taken.rate.max(l.rate);
        }
    }
    fn own(&self, step: u64) -> Option<&Taken> {
        self.seen.get(&(step, self.key.clone()))
    }
    /// Whether this step has released something under this key; an error if its batch was drawn at another rate.
    pub fn has(&self, step: u64, rate: f64) -> Result<bool> {
        match self.own(step) {
            None => Ok(false),
            Some(taken) if taken.rate == rate => Ok(true),
            Some(taken) => Err(Error::privacy(format!(
                "step {step} was taken before under this key with a sampling rate of {}, and now it is {rate}: two batches that one \
                 key has drawn are not independent, and what they tell together cannot be counted. Go on with a fresh key",
                taken.rate
            ))),
        }
    }
    /// Whether the log contains this same release of a step.
    pub fn has_release(&self, step: u64, release: Option<&str>) -> bool {
        self.own(step).is_some_and(|t| t.has(release))
    }
    /// Writes a release to the log, and returns once it is on disk.
    pub fn write(&mut self, step: u64, release: Option<String>, sigma: f64, rate: f64) -> Result<()> {
        let line = Line { step, key: self.key.clone(), release, sigma, rate };
        if let Some((file, path)) = &mut self.file {
            let mut text =
                serde_json::to_string(&line).map_err(|e| Error::format(&*path, format!("cannot be written: {e}")))?;
            text.push('\n');
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_data())
                .map_err(|e| Error::io("write the log of private steps", &*path, e))?;
        }
        self.add(line);
        Ok(())
    }
    /// Number of steps under this log's own key.
    pub fn own_steps(&self) -> u64 {
        self.seen.keys().filter(|(_, key)| *key == self.key).count() as u64
    }
    /// σ and q of every step; `more`, if given, adds one more release (step, σ, q) under this log's own key.
    pub fn history(&self, more: Option<(u64, f64, f64)>) -> Vec<(f64, f64)> {
        let mut all = self.seen.clone();
        if let Some((step, sigma, rate)) = more {
            let none = Taken { releases: Vec::new(), rate };
            all.entry((step, self.key.clone())).or_insert(none).releases.push((None, sigma));
        }
        all.values().map(|t| (t.sigma(), t.rate)).collect()
    }
}
