//! The folder of a run: configuration, metrics, checkpoints, plots, summary.
//!
//! ```text
//! runs/digits/
//!   config.json      the settings of the run
//!   metrics.jsonl    one JSON object per line, each with its step
//!   checkpoints/     see crate::io::checkpoint
//!   plots/
//!   summary.json     written last: a run that has one is finished
//!   run.lock         held while a process works on the run
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::base::{Error, Result};
use crate::io::{CheckpointFolder, create_folder, read_json, write_json};

/// What to do with a folder that holds a run already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// The folder is not changed; an error says what can be done.
    #[default]
    Refuse,
    /// The run continues from its last checkpoint, or from the beginning if there is none.
    Resume,
    /// Configuration, metrics, checkpoints, plots and summary are removed, and the run starts from the beginning. Other files stay.
    Overwrite,
}

/// An open run folder, which is locked against a second process.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
    resumed: bool,
    /// The system releases the lock when the file is closed, also if the process is killed.
    _lock: File,
}

impl RunFolder {
    /// Opens a folder for a run with this configuration.
    ///
    /// `existing` says what happens if the folder already has a run. A resumed run must have the same configuration, except for the fields
    /// in `may_differ` (dotted paths such as `train.steps`).
    ///
    /// # Errors
    /// [`Error::Invalid`] if the folder has a run already, is in use, or was made with another configuration, with the names of the fields
    /// that differ; [`Error::Io`] if it cannot be written.
    pub fn create(
        path: impl AsRef<Path>,
        config: &impl Serialize,
        existing: Existing,
        may_differ: &[&str],
    ) -> Result<Self> {
        const OP: &str = "run folder";
        let path = path.as_ref().to_path_buf();
        create_folder(&path)?;
        let config_path = path.join("config.json");
        // Every run has a lock. A folder with a configuration but no lock, such as a model's, is not a run folder and is not written to.
        if config_path.exists() && !path.join("run.lock").exists() {
            let message =
                format!("{} has a config.json that no run has written; choose another folder", path.display());
            return Err(Error::invalid(OP, message));
        }
        let lock = lock(&path)?;
        // The configuration is converted to text and back, like the stored one, so that numbers do not differ by how they were read.
        let config: Value = serde_json::to_string(config)
            .and_then(|text| serde_json::from_str(&text))
            .map_err(|e| Error::invalid(OP, format!("the configuration cannot be put as JSON: {e}")))?;
        let used = config_path.exists();
        if used && existing == Existing::Refuse {
            let state = if path.join("summary.json").exists() { "a finished run" } else { "an unfinished run" };
            let message =
                format!("{} holds {state}; choose another folder, or ask to resume or to overwrite it", path.display());
            return Err(Error::invalid(OP, message));
        }
        let resumed = used && existing == Existing::Resume;
        if resumed {
            let mut differences = Vec::new();
            compare("", &read_json(&config_path)?, &config, &mut differences);
            differences.retain(|d| !may_differ.iter().any(|m| d.path == *m || d.path.starts_with(&format!("{m}."))));
            if !differences.is_empty() {
                let list: Vec<String> = differences.iter().map(Difference::to_string).collect();
                let message = format!(
                    "{} was made with another configuration: {}; use the same, or another folder",
                    path.display(),
                    list.join(", ")
                );
                return Err(Error::invalid(OP, message));
            }
        } else if used {
            remove_run(&path)?;
        }
        create_folder(&path.join("plots"))?;
        create_folder(&path.join("checkpoints"))?;
        let metrics_path = path.join("metrics.jsonl");
        let metrics = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&metrics_path)
            .map_err(|e| Error::io("open", &metrics_path, e))?;
        // The configuration is written last: only with it does a folder count as a run.
        write_json(&config_path, &config)?;
        Ok(RunFolder { path, metrics, resumed, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Whether an existing run is continued.
    pub fn resumed(&self) -> bool {
        self.resumed
    }
    /// The path for a plot; the plot adds `.svg` and `.png`.
    pub fn plot(&self, name: &str) -> PathBuf {
        self.path.join("plots").join(name)
    }
    /// The checkpoints of the run.
    pub fn checkpoints(&self) -> Result<CheckpointFolder> {
        CheckpointFolder::open(self.path.join("checkpoints"))
    }

    /// Appends a line to the metrics: `{"step": 3, …}` with the fields of `record`, which must be an object or a struct.
    ///
    /// JSON has no NaN and no infinity: such numbers become `null`. Each line is written in one call, so that a killed process leaves
    /// complete lines.
    pub fn log(&mut self, step: u64, record: &impl Serialize) -> Result<()> {
        const OP: &str = "log metrics";
        let record = serde_json::to_value(record).map_err(|e| Error::invalid(OP, e.to_string()))?;
        let Value::Object(fields) = record else {
            return Err(Error::invalid(OP, "a record must have named fields: use a struct or json!({…})"));
        };
        let mut line = format!("{{\"step\":{step}");
        for (name, value) in fields.iter().filter(|(name, _)| *name != "step") {
            line.push_str(&format!(",{}:{value}", Value::from(name.as_str())));
        }
        line.push_str("}\n");
        self.metrics.write_all(line.as_bytes()).map_err(|e| Error::io("append to", self.path.join("metrics.jsonl"), e))
    }

    /// Cuts the metrics back to the lines up to `step`, which should be the step of the checkpoint from which the run continues. No step is
    /// then in the file twice, and no partial line from a crash stays. Removes the summary, if the run had been finished.
    pub fn rewind(&mut self, step: u64) -> Result<()> {
        let path = self.path.join("metrics.jsonl");
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        let mut reader = BufReader::new(file);
        let (mut keep, mut line) = (0u64, Vec::new());
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).map_err(|e| Error::io("read", &path, e))?;
            let whole = line.last() == Some(&b'\n');
            let at = serde_json::from_slice::<Value>(&line).ok().and_then(|v| v["step"].as_u64());
            if n == 0 || !whole || at.is_none_or(|at| at > step) {
                break;
            }
            keep += n as u64;
        }
        self.metrics.set_len(keep).and_then(|()| self.metrics.sync_all()).map_err(|e| Error::io("cut", &path, e))?;
        remove_file(&self.path.join("summary.json"))
    }

    /// All records so far, for plots. Incomplete lines are left out.
    pub fn metrics(&self) -> Result<Vec<Value>> {
        let path = self.path.join("metrics.jsonl");
        let text = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        Ok(text.split(|&b| b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }

    /// Points `(step, value)` of one field of the metrics, where it is a number.
    pub fn series(&self, field: &str) -> Result<Vec<(f64, f64)>> {
        let point = |v: &Value| Some((v["step"].as_f64()?, v[field].as_f64()?));
        Ok(self.metrics()?.iter().filter_map(point).collect())
    }

    /// Syncs the metrics and writes the summary, which marks the run as finished.
    pub fn finish(&mut self, summary: &impl Serialize) -> Result<()> {
        self.metrics.sync_all().map_err(|e| Error::io("sync", self.path.join("metrics.jsonl"), e))?;
        write_json(self.path.join("summary.json"), summary)
    }

    /// Whether the run has a summary.
    pub fn finished(&self) -> bool {
        self.path.join("summary.json").exists()
    }
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("run.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message =
                format!("another process is working on {}; stop it, or choose another folder", folder.display());
            Err(Error::invalid("run folder", message))
        }
        // Some network file systems have no locks. Runs on them work without this protection.
        Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", &path, e)),
    }
}

/// Removes the files of a run, and no other file in the folder.
fn remove_run(folder: &Path) -> Result<()> {
    // The configuration is removed last: until then the folder still counts as a run.
    let is_checkpoint = |p: &Path| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("step-"));
    let is_plot = |p: &Path| p.extension().is_some_and(|e| e == "svg" || e == "png");
    remove_of(&folder.join("checkpoints"), &is_checkpoint)?;
    remove_of(&folder.join("plots"), &is_plot)?;
    ["summary.json", "metrics.jsonl", "config.json"].iter().try_for_each(|name| remove_file(&folder.join(name)))
}

/// Removes the entries of a folder for which `ours` is true.
fn remove_of(folder: &Path, ours: &dyn Fn(&Path) -> bool) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|e| Error::io("list", folder, e))?,
    };
    for entry in entries {
        let path = entry.map_err(|e| Error::io("list", folder, e))?.path();
        if ours(&path) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

struct Difference {
    path: String,
    old: Value,
    new: Value,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |value: &Value| if value.is_null() { "absent".into() } else { value.to_string() };
        write!(f, "{} was {}, is {}", self.path, show(&self.old), show(&self.new))
    }
}

fn compare(path: &str, old: &Value, new: &Value, found: &mut Vec<Difference>) {
    let join = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort_unstable();
            keys.dedup();
            for key in keys {
                compare(&join(key), &old[key], &new[key], found);
            }
        }
        _ if old == new => {}
        _ => {
            let path = if path.is_empty() { "configuration" } else { path }.to_string();
            found.push(Difference { path, old: old.clone(), new: new.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;
    use serde_json::json;

    fn create(path: &Path, config: Value, existing: Existing) -> Result<RunFolder> {
        RunFolder::create(path, &config, existing, &["train.steps"])
    }

    fn message(result: Result<RunFolder>) -> String {
        result.map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn a_run_from_start_to_end() {
        let scratch = Scratch::new("run");
        let path = scratch.join("a/b");
        let config = json!({"train": {"steps": 3, "lr": 0.1}, "seed": 1});
        let mut run = create(&path, config.clone(), Existing::Refuse).unwrap();
        assert!(!run.resumed() && !run.finished());
        for step in 1..=3 {
            run.log(step, &json!({"loss": 1.0 / step as f64, "bad": f64::NAN})).unwrap();
        }
        assert!(run.log(4, &3).is_err());
        assert_eq!(run.series("loss").unwrap(), [(1.0, 1.0), (2.0, 0.5), (3.0, 1.0 / 3.0)]);
        assert!(run.series("bad").unwrap().is_empty());
        run.finish(&json!({"loss": 0.3})).unwrap();
        assert!(run.finished() && run.plot("loss").ends_with("plots/loss"));
        assert!(message(create(&path, config.clone(), Existing::Resume)).contains("another process"));
        drop(run);
        let refused = message(create(&path, config.clone(), Existing::Refuse));
        assert!(refused.contains("a finished run") && refused.contains("overwrite"), "{refused}");
        fs::write(path.join("notes.txt"), "mine").unwrap();
        let run = create(&path, config, Existing::Overwrite).unwrap();
        assert!(run.metrics().unwrap().is_empty() && !run.finished() && path.join("notes.txt").exists());
    }

    #[test]
    fn a_resumed_run_has_no_doubled_or_half_lines() {
        let scratch = Scratch::new("run-resume");
        let config = json!({"a": 1});
        let mut run = create(scratch.path(), config.clone(), Existing::Resume).unwrap();
        assert!(!run.resumed());
        (1..=5).for_each(|step| run.log(step, &json!({"loss": step})).unwrap());
        run.metrics.write_all(b"{\"step\":6,\"lo").unwrap();
        drop(run);
        let mut run = create(scratch.path(), config.clone(), Existing::Resume).unwrap();
        assert!(run.resumed());
        assert_eq!(run.metrics().unwrap().len(), 5);
        run.rewind(9).unwrap();
        assert_eq!(run.series("loss").unwrap().last(), Some(&(5.0, 5.0)), "the half line is gone, the others stay");
        run.rewind(3).unwrap();
        run.log(4, &json!({"loss": 44})).unwrap();
        assert_eq!(run.series("loss").unwrap()[2..], [(3.0, 3.0), (4.0, 44.0)]);
        run.rewind(0).unwrap();
        assert_eq!(fs::read(scratch.join("metrics.jsonl")).unwrap(), b"");
    }

    #[test]
    fn another_configuration_is_refused_by_field() {
        let scratch = Scratch::new("run-config");
        let config = json!({"train": {"steps": 3, "lr": 0.1}, "seed": 1});
        drop(create(scratch.path(), config, Existing::Refuse).unwrap());
        let longer = json!({"train": {"steps": 9, "lr": 0.1}, "seed": 1});
        drop(create(scratch.path(), longer, Existing::Resume).unwrap());
        let other = json!({"train": {"steps": 9, "lr": 0.2}, "clip": 1});
        let text = message(create(scratch.path(), other, Existing::Resume));
        for part in ["train.lr was 0.1, is 0.2", "seed was 1, is absent", "clip was absent, is 1"] {
            assert!(text.contains(part), "{text}");
        }
        fs::write(scratch.join("config.json"), "{").unwrap();
        assert!(message(create(scratch.path(), json!({}), Existing::Resume)).contains("config.json"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let scratch = Scratch::new("run-blocked");
        fs::write(scratch.join("file"), "").unwrap();
        assert!(message(create(&scratch.join("file/run"), json!({}), Existing::Refuse)).contains("file"));
    }
}
