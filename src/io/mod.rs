//! Files: tensors in safetensors, checkpoints that survive a kill, and atomic writes.
//!
//! Everything here works on bytes and JSON values, so that it can be tested (and used) without a tensor. Every writer keeps the old file
//! intact until the new one is on the disk.

mod arrays;
pub mod checkpoint;
pub mod safetensors;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
#[cfg(test)]
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::{Error, Result};

pub use arrays::{array_of, arrays_of, entry, load_arrays, save_arrays};
pub use checkpoint::{Checkpoint, CheckpointFolder, CheckpointWriter};
pub use safetensors::{ElementType, Entry, SafeTensors, TensorInfo};

/// Writes a file so that a reader sees either the old content or all of the new one.
///
/// The bytes go to a temporary file in the same folder, which is synced and renamed; then the folder is synced. On any
/// error the temporary file is removed and the old file is untouched.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes))
}

/// [`write_atomic`] for content that is produced piece by piece.
pub fn write_atomic_with(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let Some(name) = path.file_name() else {
        return Err(Error::invalid("write_atomic", format!("{} does not name a file", path.display())));
    };
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(unique_suffix());
    let temporary = path.with_file_name(temporary);
    let result = write_synced(&temporary, write).and_then(|()| {
        fs::rename(&temporary, path).map_err(|e| Error::io("put in place", path, e))?;
        sync_folder(parent(path))
    });
    if result.is_err() {
        // The temporary file may not exist. The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Makes a folder that is either complete or absent: `fill` writes into a temporary folder beside it, which is then renamed.
///
/// If the folder exists, this is an error, unless `replace` is set: then the new folder takes its place. On any error the temporary folder
/// is removed and the old folder is untouched. A killed process leaves a folder `.NAME.tmp-…`, which may be deleted.
///
/// # Errors If the folder exists and `replace` is not set, if `fill` fails, or if writing fails.
pub fn write_folder(path: impl AsRef<Path>, replace: bool, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let path = path.as_ref();
    let Some(name) = path.file_name() else {
        return Err(Error::invalid("write_folder", format!("{} does not name a folder", path.display())));
    };
    if path.exists() && !(replace && path.is_dir()) {
        let message = format!("{} is there already: choose another name, or have it replaced", path.display());
        return Err(Error::invalid("write_folder", message));
    }
    create_folder(parent(path))?;
    let beside = |suffix: String| {
        let mut beside = OsString::from(".");
        beside.push(name);
        beside.push(suffix);
        path.with_file_name(beside)
    };
    let temporary = beside(unique_suffix());
    let in_place = || {
        let old = path.exists().then(|| beside(unique_suffix()));
        if let Some(old) = &old {
            fs::rename(path, old).map_err(|e| Error::io("move aside", path, e))?;
        }
        if let Err(error) = fs::rename(&temporary, path) {
            if let Some(old) = &old {
                let _ = fs::rename(old, path);
            }
            return Err(Error::io("put in place", path, error));
        }
        sync_folder(parent(path))?;
        old.map_or(Ok(()), |old| fs::remove_dir_all(&old).map_err(|e| Error::io("remove", &old, e)))
    };
    let made = fs::create_dir(&temporary).map_err(|e| Error::io("create folder", &temporary, e));
    let result = made.and_then(|()| fill(&temporary)).and_then(|()| sync_folder(&temporary)).and_then(|()| in_place());
    if result.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_dir_all(&temporary);
    }
    result
}

/// Serialises `value` as indented JSON and writes it with [`write_atomic`].
pub fn write_json(path: impl AsRef<Path>, value: &impl serde::Serialize) -> Result<()> {
    let path = path.as_ref();
    write_atomic(path, &json_bytes(path, value)?)
}

/// Reads a JSON file.
pub fn read_json<T: serde::de::DeserializeOwned>(path: impl AsRef<Path>) -> Result<T> {
    let path = path.as_ref();
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::format(path, format!("not the expected JSON: {e}")))
}

/// Indented JSON with a newline at its end; `path` only names the file in the error.
pub(crate) fn json_bytes(path: &Path, value: &impl serde::Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::format(path, format!("the value to be written cannot be put as JSON: {e}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Creates a new file, writes it and syncs it to the disk.
pub(crate) fn write_synced(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let file = File::create(path).map_err(|e| Error::io("create", path, e))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    write(&mut writer).map_err(|e| Error::io("write", path, e))?;
    let file = writer.into_inner().map_err(|e| Error::io("write", path, e.into_error()))?;
    file.sync_all().map_err(|e| Error::io("sync", path, e))
}

/// Makes renames and new names inside a folder durable. Only on Unix can a folder be synced, and only there it has to be.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io("sync folder", path, e))?;
    }
    Ok(())
}

/// Creates a folder with its parents. An empty path is refused, because it would mean the current working folder.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    if path.as_os_str().is_empty() {
        return Err(Error::invalid("create folder", "an empty path; name a folder ('.' for the current one)"));
    }
    fs::create_dir_all(path).map_err(|e| Error::io("create folder", path, e))
}

/// The folder of a file; "." for a name without a folder.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// `.tmp-<process>-<n>`, with another `n` at each call.
pub(crate) fn unique_suffix() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(".tmp-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A fresh folder for a test, removed when dropped.
#[cfg(test)]
pub(crate) struct Scratch(PathBuf);

#[cfg(test)]
impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("prismgrad-{name}{}", unique_suffix()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

#[cfg(test)]
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_nothing_behind() {
        let folder = Scratch::new("atomic");
        let path = folder.join("state.json");
        write_atomic(&path, b"old").unwrap();
        let error = write_atomic_with(&path, |w| {
            w.write_all(b"half of the new")?;
            Err(io::Error::other("no space left"))
        })
        .unwrap_err();
        assert!(error.to_string().contains("no space left"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let scratch = Scratch::new("folder");
        let path = scratch.join("model");
        let fill = |text: &'static [u8]| move |dir: &Path| write_atomic(dir.join("a"), text);
        write_folder(&path, false, fill(b"old")).unwrap();
        assert!(write_folder(&path, false, fill(b"new")).unwrap_err().to_string().contains("already"));
        let half = write_folder(&path, true, |dir| {
            write_atomic(dir.join("a"), b"half")?;
            Err(Error::invalid("test", "stopped"))
        });
        assert!(half.unwrap_err().to_string().contains("stopped"));
        assert_eq!(fs::read(path.join("a")).unwrap(), b"old");
        write_folder(&path, true, fill(b"new")).unwrap();
        assert_eq!(fs::read(path.join("a")).unwrap(), b"new");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
        assert!(write_folder(path.join("a"), true, fill(b"x")).is_err(), "a file is not replaced");
    }

    #[test]
    fn a_file_where_a_folder_should_be_is_an_error_that_names_it() {
        let folder = Scratch::new("blocked");
        fs::write(folder.join("runs"), b"").unwrap();
        let error = write_atomic(folder.join("runs").join("a.json"), b"x").unwrap_err();
        assert!(error.to_string().contains("a.json"), "{error}");
        assert!(write_atomic("/", b"x").is_err());
    }
}
