//! Folders for the files of tests.

use std::ops::Deref;
use std::path::{Path, PathBuf};

/// An empty folder in the system's temporary folder, which is removed when this is dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes a folder. Tests that run at the same time must use different names; the process id is part of the folder's name.
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("prismgrad-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Deref for Scratch {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
