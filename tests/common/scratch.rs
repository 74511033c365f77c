//! Folders for what tests write.

use std::ops::Deref;
use std::path::{Path, PathBuf};

/// An empty folder under the system's temporary one, gone when this is dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Tests that run at once need different names; processes are told apart by their ids.
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
