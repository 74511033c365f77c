//! Checkpoint folders that are either complete or absent.
//!
//! A checkpoint is written to `step-<n>.tmp-<process>-<k>`: every file is synced, then a manifest with the size and the
//! CRC-32 of each file, then the folder, which is renamed to `step-<n>`. A process killed at any point leaves either the
//! complete folder or a temporary one that the next run removes. [`CheckpointFolder::latest`] verifies every byte
//! before it returns a checkpoint, and falls back to an older one if it finds damage.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::safetensors::{Entry, Plan, SafeTensors};
use super::{create_folder, sync_folder, unique_suffix, write_synced};
use crate::base::{Error, Result};

const MANIFEST: &str = "manifest.json";
const FORMAT: u32 = 1;

/// The manifest: what a complete checkpoint consists of.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    step: u64,
    score: Option<f64>,
    files: Vec<FileRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct FileRecord {
    name: String,
    bytes: u64,
    crc32: u32,
}

/// A folder of checkpoints, with a rule for which of them are kept.
#[derive(Clone, Debug)]
pub struct CheckpointFolder {
    root: PathBuf,
    keep_last: usize,
    keep_best: bool,
}

/// The newest complete checkpoint, and the damaged ones that are newer.
#[derive(Debug)]
pub struct Latest {
    /// `None` if there is no complete checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// One line for each newer checkpoint that is damaged. Show them to the user.
    pub warnings: Vec<String>,
}

impl CheckpointFolder {
    /// Opens the folder, creates it if necessary, and removes what killed processes left in it.
    ///
    /// Keeps the last three checkpoints and the best one by default. Only one process may write to the folder.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref().to_path_buf();
        create_folder(&root)?;
        let folder = CheckpointFolder { root, keep_last: 3, keep_best: true };
        folder.recover()?;
        Ok(folder)
    }

    /// Sets how many of the newest checkpoints stay (at least one).
    pub fn keep_last(mut self, count: usize) -> Self {
        self.keep_last = count.max(1);
        self
    }

    /// Sets whether the checkpoint with the lowest score stays as well.
    pub fn keep_best(mut self, keep: bool) -> Self {
        self.keep_best = keep;
        self
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Writes a checkpoint and removes those that the rule no longer keeps. This one always stays, even if others have higher numbers.
    ///
    /// `score` ranks the checkpoints: lower is better, such as a validation loss. Files are added by `write`. If anything fails, the
    /// temporary folder is removed and every earlier checkpoint is as it was. A checkpoint of the same step is replaced.
    pub fn save(
        &self,
        step: u64,
        score: Option<f64>,
        write: impl FnOnce(&mut CheckpointWriter) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("step-{step:010}");
        let folder = self.root.join(format!("{name}{}", unique_suffix()));
        let _active = Active::new(&folder);
        fs::create_dir(&folder).map_err(|e| Error::io("create checkpoint", &folder, e))?;
        let written = self.write_into(&folder, step, score, write).and_then(|()| self.put_in_place(&folder, &name));
        if written.is_err() {
            let _ = fs::remove_dir_all(&folder);
        }
        let path = written?;
        // The checkpoint is complete. What cannot be removed now is tried again after the next one.
        let _ = self.prune(step);
        Ok(path)
    }

    fn write_into(
        &self,
        folder: &Path,
        step: u64,
        score: Option<f64>,
        write: impl FnOnce(&mut CheckpointWriter) -> Result<()>,
    ) -> Result<()> {
        let mut writer = CheckpointWriter { folder: folder.to_path_buf(), files: Vec::new() };
        write(&mut writer)?;
        // JSON has no NaN, so a run that diverged has no score.
        let score = score.filter(|s| s.is_finite());
        let manifest = Manifest { format: FORMAT, step, score, files: writer.files };
        let path = folder.join(MANIFEST);
        let bytes = super::json_bytes(&path, &manifest)?;
        write_synced(&path, |w| w.write_all(&bytes))?;
        sync_folder(folder)
    }

    fn put_in_place(&self, folder: &Path, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        let replaced = self.root.join(format!("{name}.replaced"));
        let old = path.exists();
        if old {
            fs::rename(&path, &replaced).map_err(|e| Error::io("move aside", &path, e))?;
        }
        if let Err(error) = fs::rename(folder, &path) {
            if old {
                let _ = fs::rename(&replaced, &path);
            }
            return Err(Error::io("put in place checkpoint", &path, error));
        }
        sync_folder(&self.root)?;
        if old {
            fs::remove_dir_all(&replaced).map_err(|e| Error::io("remove", &replaced, e))?;
        }
        Ok(path)
    }

    /// Steps of all checkpoints, complete or not, in ascending order.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = fs::read_dir(&self.root).map_err(|e| Error::io("list", &self.root, e))?;
        let mut steps = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("list", &self.root, e))?;
            let step = entry.file_name().to_str().and_then(|n| n.strip_prefix("step-")?.parse::<u64>().ok());
            steps.extend(step);
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The checkpoint of one step, verified.
    pub fn at(&self, step: u64) -> Result<Checkpoint> {
        Checkpoint::open(self.root.join(format!("step-{step:010}")))
    }

    /// The newest checkpoint that is complete. Damaged ones are skipped with a warning, and not removed.
    pub fn latest(&self) -> Result<Latest> {
        let mut warnings = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.at(step) {
                Ok(checkpoint) => return Ok(Latest { checkpoint: Some(checkpoint), warnings }),
                Err(error) => warnings.push(format!("passed over a damaged checkpoint: {error}")),
            }
        }
        Ok(Latest { checkpoint: None, warnings })
    }

    /// The complete checkpoint with the lowest score, if any has one.
    pub fn best(&self) -> Result<Option<Checkpoint>> {
        let mut scored: Vec<(f64, u64)> =
            self.whole_at_a_glance()?.into_iter().filter_map(|(s, v)| Some((v?, s))).collect();
        scored.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(scored.into_iter().find_map(|(_, step)| self.at(step).ok()))
    }

    /// Removes temporary folders whose process has ended, and completes or undoes a replacement that was interrupted.
    fn recover(&self) -> Result<()> {
        let entries = fs::read_dir(&self.root).map_err(|e| Error::io("list", &self.root, e))?;
        for entry in entries {
            let path = entry.map_err(|e| Error::io("list", &self.root, e))?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            if let Some(original) = name.strip_suffix(".replaced") {
                let original = self.root.join(original);
                let result = if original.exists() { fs::remove_dir_all(&path) } else { fs::rename(&path, &original) };
                result.map_err(|e| Error::io("recover", &path, e))?;
            } else if let Some((_, owner)) = name.split_once(".tmp-")
                && name.starts_with("step-")
                && abandoned(owner, &path)
            {
                fs::remove_dir_all(&path).map_err(|e| Error::io("remove half-written", &path, e))?;
            }
        }
        Ok(())
    }

    /// Step and score of every checkpoint whose files have the right sizes. The files are not read.
    fn whole_at_a_glance(&self) -> Result<Vec<(u64, Option<f64>)>> {
        let whole = |step: &u64| {
            let path = self.root.join(format!("step-{step:010}"));
            let manifest = read_manifest(&path).ok()?;
            let size = |f: &FileRecord| fs::metadata(path.join(&f.name)).is_ok_and(|m| m.len() == f.bytes);
            manifest.files.iter().all(size).then_some((*step, manifest.score))
        };
        Ok(self.steps()?.iter().filter_map(whole).collect())
    }

    /// Removes the checkpoints that the rule no longer keeps, but never the step that has just been `written`, whatever its number.
    fn prune(&self, written: u64) -> Result<()> {
        let whole = self.whole_at_a_glance()?;
        let best = whole.iter().filter_map(|&(step, score)| Some((score?, step))).min_by(|a, b| a.0.total_cmp(&b.0));
        let old = &whole[..whole.len().saturating_sub(self.keep_last)];
        for &(step, _) in old {
            if step == written || (self.keep_best && best.is_some_and(|(_, b)| b == step)) {
                continue;
            }
            // Renamed first, so that an interrupted removal does not look like a damaged checkpoint.
            let path = self.root.join(format!("step-{step:010}"));
            let doomed = self.root.join(format!("step-{step:010}{}", unique_suffix()));
            fs::rename(&path, &doomed).map_err(|e| Error::io("retire", &path, e))?;
            fs::remove_dir_all(&doomed).map_err(|e| Error::io("remove", &doomed, e))?;
        }
        Ok(())
    }
}

/// Names of the temporary folders that this process is writing now. The process never uses a name twice.
static ACTIVE: Mutex<BTreeSet<OsString>> = Mutex::new(BTreeSet::new());

fn active() -> MutexGuard<'static, BTreeSet<OsString>> {
    ACTIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder's entry in [`ACTIVE`] while the folder is being written.
struct Active(OsString);

impl Active {
    fn new(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_os_string();
        active().insert(name.clone());
        Active(name)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        active().remove(&self.0);
    }
}

/// Whether a temporary folder is left over: its process has ended, or has the number of this one (as in a container, where every run has
/// the same number) without being in [`ACTIVE`], or the folder is a day old.
fn abandoned(owner: &str, path: &Path) -> bool {
    let process = owner.split('-').next().and_then(|p| p.parse::<u32>().ok());
    let alive = match process {
        Some(id) if id == std::process::id() => return path.file_name().is_none_or(|n| !active().contains(n)),
        Some(id) if cfg!(target_os = "linux") => Path::new("/proc").join(id.to_string()).exists(),
        Some(_) => true,
        None => false,
    };
    let modified = fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    !alive || modified.elapsed().is_ok_and(|age| age > Duration::from_secs(24 * 3600))
}

/// Adds files to a checkpoint that is being written.
#[derive(Debug)]
pub struct CheckpointWriter {
    folder: PathBuf,
    files: Vec<FileRecord>,
}

impl CheckpointWriter {
    /// Adds a safetensors file, such as `model.safetensors`.
    pub fn tensors(&mut self, name: &str, entries: &[Entry<'_>], metadata: &BTreeMap<String, String>) -> Result<()> {
        let plan = Plan::new(entries, metadata)?;
        self.file(name, |mut out| plan.write(&mut out))
    }

    /// Adds a JSON file, such as `state.json`.
    pub fn json(&mut self, name: &str, value: &impl Serialize) -> Result<()> {
        let bytes = super::json_bytes(&self.folder.join(name), value)?;
        self.file(name, |out| out.write_all(&bytes))
    }

    /// Adds a file with these bytes.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.file(name, |out| out.write_all(bytes))
    }

    /// Adds a file that is produced piece by piece; its size and checksum are computed while it is written.
    pub fn file(&mut self, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        check_name(name)?;
        if name == MANIFEST || self.files.iter().any(|f| f.name == name) {
            return Err(Error::invalid("checkpoint", format!("the file name '{name}' is taken; choose another")));
        }
        let mut record = FileRecord { name: name.to_string(), bytes: 0, crc32: 0 };
        write_synced(&self.folder.join(name), |file| {
            let mut out = Counting { inner: file, crc: crc32fast::Hasher::new(), bytes: 0 };
            write(&mut out)?;
            record.bytes = out.bytes;
            record.crc32 = out.crc.finalize();
            Ok(())
        })?;
        self.files.push(record);
        Ok(())
    }
}

/// Refuses a file name that could lead out of the folder.
fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
        return Err(Error::invalid("checkpoint", format!("'{name}' is not a plain file name")));
    }
    Ok(())
}

struct Counting<W> {
    inner: W,
    crc: crc32fast::Hasher,
    bytes: u64,
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buffer)?;
        self.crc.update(&buffer[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A complete checkpoint: every file has been compared with its checksum.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Opens and verifies a checkpoint folder; reads every byte of it once.
    ///
    /// # Errors
    /// [`Error::Format`] naming the file that is missing, cut off or changed.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let manifest = read_manifest(&path)?;
        for record in &manifest.files {
            verify(&path.join(&record.name), record)?;
        }
        Ok(Checkpoint { path, manifest })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// The training step of the checkpoint.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }
    /// The score, if it has one; lower is better.
    pub fn score(&self) -> Option<f64> {
        self.manifest.score
    }
    /// The names of its files, in the order in which they were written.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.manifest.files.iter().map(|f| f.name.as_str())
    }

    /// Opens one of its safetensors files.
    pub fn tensors(&self, name: &str) -> Result<SafeTensors> {
        SafeTensors::open(self.file(name)?)
    }
    /// Reads one of its JSON files.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        super::read_json(self.file(name)?)
    }
    /// Reads one of its files.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.file(name)?;
        fs::read(&path).map_err(|e| Error::io("read", &path, e))
    }
    /// The path of one of its files.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        if self.files().any(|f| f == name) {
            return Ok(self.path.join(name));
        }
        let files: Vec<&str> = self.files().collect();
        Err(Error::format(&self.path, format!("this checkpoint has no '{name}'; it has {}", files.join(", "))))
    }
}

fn read_manifest(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    if !path.is_file() {
        return Err(Error::format(folder, "is not a checkpoint, or was not finished: it has no manifest.json"));
    }
    let manifest: Manifest = super::read_json(&path)?;
    if manifest.format != FORMAT {
        let message =
            format!("format {} is not known to this version, which reads {FORMAT}; update it", manifest.format);
        return Err(Error::format(&path, message));
    }
    for file in &manifest.files {
        check_name(&file.name).map_err(|e| Error::format(&path, e.to_string()))?;
    }
    Ok(manifest)
}

fn verify(path: &Path, record: &FileRecord) -> Result<()> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::format(path, "is missing")),
        other => other.map_err(|e| Error::io("open", path, e))?,
    };
    let size = file.metadata().map_err(|e| Error::io("read the size of", path, e))?.len();
    if size != record.bytes {
        return Err(Error::format(path, format!("has {size} bytes instead of {}", record.bytes)));
    }
    let mut crc = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(|e| Error::io("read", path, e))?;
        if n == 0 {
            break;
        }
        crc.update(&buffer[..n]);
    }
    if crc.finalize() != record.crc32 {
        return Err(Error::format(path, "its content has changed: the checksum is wrong"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{ElementType, Scratch};
    use super::*;

    fn save(folder: &CheckpointFolder, step: u64, score: Option<f64>) -> PathBuf {
        folder
            .save(step, score, |w| {
                let entry = Entry::new("w", ElementType::U8, [4], vec![step as u8; 4]);
                w.tensors("model.safetensors", &[entry], &BTreeMap::new())?;
                w.json("state.json", &step)?;
                w.bytes("noise.bin", b"xyz")
            })
            .unwrap()
    }

    #[test]
    fn saved_and_read_back() {
        let scratch = Scratch::new("ckpt");
        let folder = CheckpointFolder::open(scratch.join("a/b")).unwrap();
        assert!(folder.latest().unwrap().checkpoint.is_none());
        save(&folder, 7, Some(0.5));
        let checkpoint = folder.latest().unwrap().checkpoint.unwrap();
        assert_eq!((checkpoint.step(), checkpoint.score()), (7, Some(0.5)));
        assert_eq!(checkpoint.json::<u64>("state.json").unwrap(), 7);
        assert_eq!(checkpoint.bytes("noise.bin").unwrap(), b"xyz");
        assert_eq!(checkpoint.tensors("model.safetensors").unwrap().read("w").unwrap(), [7; 4]);
        assert!(checkpoint.bytes("other").unwrap_err().to_string().contains("noise.bin"));
        save(&folder, 7, Some(f64::NAN));
        assert_eq!(folder.at(7).unwrap().score(), None);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_last_and_the_best_are_kept() {
        let scratch = Scratch::new("ckpt-keep");
        let folder = CheckpointFolder::open(scratch.path()).unwrap().keep_last(2);
        for (step, score) in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.7)] {
            save(&folder, step, Some(score));
        }
        assert_eq!(folder.steps().unwrap(), [2, 4, 5]);
        assert_eq!(folder.best().unwrap().unwrap().step(), 2);
        let folder = folder.keep_best(false);
        save(&folder, 6, None);
        assert_eq!(folder.steps().unwrap(), [5, 6]);
    }

    #[test]
    fn damage_of_any_kind_falls_back_to_the_one_before() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 6] = [
            ("bytes instead of", |p| {
                let file = fs::OpenOptions::new().write(true).open(p.join("model.safetensors")).unwrap();
                file.set_len(20).unwrap();
            }),
            ("checksum", |p| {
                let path = p.join("model.safetensors");
                let mut bytes = fs::read(&path).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(path, bytes).unwrap();
            }),
            ("missing", |p| fs::remove_file(p.join("state.json")).unwrap()),
            ("no manifest", |p| fs::remove_file(p.join(MANIFEST)).unwrap()),
            ("JSON", |p| fs::write(p.join(MANIFEST), b"{\"format\":1").unwrap()),
            ("format 9", |p| {
                let text = fs::read_to_string(p.join(MANIFEST)).unwrap();
                fs::write(p.join(MANIFEST), text.replace("\"format\": 1", "\"format\": 9")).unwrap();
            }),
        ];
        for (expected, damage) in damages {
            let scratch = Scratch::new("ckpt-damage");
            let folder = CheckpointFolder::open(scratch.path()).unwrap();
            save(&folder, 1, None);
            damage(&save(&folder, 2, None));
            let latest = folder.latest().unwrap();
            assert_eq!(latest.checkpoint.unwrap().step(), 1, "{expected}");
            assert!(latest.warnings[0].contains(expected), "{expected}: {:?}", latest.warnings);
        }
    }

    #[test]
    fn damaged_checkpoints_do_not_push_out_whole_ones() {
        let scratch = Scratch::new("ckpt-push");
        let folder = CheckpointFolder::open(scratch.path()).unwrap().keep_last(1);
        save(&folder, 1, None);
        fs::create_dir(scratch.join("step-0000000009")).unwrap();
        save(&folder, 2, None);
        assert_eq!(folder.steps().unwrap(), [2, 9]);
        assert_eq!(folder.latest().unwrap().checkpoint.unwrap().step(), 2);
    }

    #[test]
    fn what_a_killed_process_left_is_cleaned_up() {
        let scratch = Scratch::new("ckpt-stale");
        let folder = CheckpointFolder::open(scratch.path()).unwrap();
        save(&folder, 1, None);
        // No process has this number, because Linux assigns numbers below 2^22.
        fs::create_dir(scratch.join("step-0000000002.tmp-4294967295-0")).unwrap();
        fs::create_dir(scratch.join("step-0000000003.tmp-1-0")).unwrap();
        fs::create_dir(scratch.join("mine.tmp-4294967295-0")).unwrap();
        let own = scratch.join(&format!("step-0000000004.tmp-{}-x", std::process::id()));
        fs::create_dir(&own).unwrap();
        fs::rename(scratch.join("step-0000000001"), scratch.join("step-0000000001.replaced")).unwrap();
        let folder = CheckpointFolder::open(scratch.path()).unwrap();
        assert!(!scratch.join("step-0000000002.tmp-4294967295-0").exists() && !own.exists());
        folder.save(5, None, |_| CheckpointFolder::open(scratch.path()).map(drop)).unwrap();
        fs::remove_dir_all(scratch.join("step-0000000005")).unwrap();
        assert_eq!(scratch.join("step-0000000003.tmp-1-0").exists(), Path::new("/proc/1").exists());
        assert!(scratch.join("mine.tmp-4294967295-0").exists(), "other people's files are left alone");
        assert_eq!(folder.latest().unwrap().checkpoint.unwrap().step(), 1);
    }

    #[test]
    fn a_failed_save_changes_nothing() {
        let scratch = Scratch::new("ckpt-fail");
        let folder = CheckpointFolder::open(scratch.path()).unwrap();
        save(&folder, 1, None);
        type Attempt = fn(&mut CheckpointWriter) -> Result<()>;
        let attempts: [Attempt; 4] = [
            |w| w.file("big", |out| out.write_all(&[0; 100]).and(Err(io::Error::other("No space left on device")))),
            |w| w.bytes("../escape", b""),
            |w| w.bytes(MANIFEST, b""),
            |w| w.bytes("a", b"").and_then(|()| w.bytes("a", b"")),
        ];
        for attempt in attempts {
            assert!(folder.save(1, None, attempt).is_err());
            assert_eq!(folder.at(1).unwrap().json::<u64>("state.json").unwrap(), 1);
            assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn an_unusable_folder_is_named() {
        let scratch = Scratch::new("ckpt-blocked");
        fs::write(scratch.join("file"), b"").unwrap();
        let error = CheckpointFolder::open(scratch.join("file")).unwrap_err().to_string();
        assert!(error.contains("file"), "{error}");
        let folder = CheckpointFolder::open(scratch.join("gone")).unwrap();
        fs::remove_dir(scratch.join("gone")).unwrap();
        fs::write(scratch.join("gone"), b"").unwrap();
        let error = folder.save(1, None, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("create checkpoint") && error.contains("gone"), "{error}");
    }
}
