//! A cache of compiled kernels on disk.
//!
//! There is one file per kernel file, architecture and content. `PRISMGRAD_CACHE` names the folder, else `XDG_CACHE_HOME`, else `~/.cache`.
//! Entries are written to a temporary file and renamed, so that a reader sees a whole entry or none. They carry a checksum, so that a
//! damaged one is recompiled. Only their owner may read or write them, and an entry that other users may write is not used. Nothing here
//! returns an error: without a usable folder there is no cache.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

const MAGIC: [u8; 4] = *b"PGK1";
const HEADER: usize = 4 + 8 + 16 + 8 + 4;
/// Entries with older contents of the same file are deleted after this time.
const KEEP: Duration = Duration::from_secs(30 * 24 * 3600);

/// A 128-bit hash of the inputs of a compilation. It guards against accidents, not against attackers: file permissions do that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key(u128);

impl Key {
    /// The key of these texts, in order.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Key {
        // FNV-1a with 128 bits; each part is followed by its length.
        let mut h = 0x6c62272e07bb014262b821756295c58d_u128;
        let mut add = |bytes: &[u8]| {
            for b in bytes {
                h = (h ^ u128::from(*b)).wrapping_mul(0x0000000001000000000000000000013B);
            }
        };
        for part in parts {
            add(part.as_bytes());
            add(&(part.len() as u64).to_le_bytes());
        }
        Key(h)
    }
}

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct KernelCache {
    folder: Option<PathBuf>,
}

impl KernelCache {
    /// The folder that the environment variables name; there is no cache when they name none.
    pub fn from_env() -> KernelCache {
        let of = |name| std::env::var_os(name).filter(|v: &std::ffi::OsString| !v.is_empty()).map(PathBuf::from);
        let folder = of("PRISMGRAD_CACHE")
            .or_else(|| of("XDG_CACHE_HOME").map(|p| p.join("prismgrad")))
            .or_else(|| of("HOME").map(|p| p.join(".cache/prismgrad")));
        KernelCache { folder: folder.map(|f| f.join("kernels")) }
    }

    /// The cache in this folder.
    pub fn at(folder: impl Into<PathBuf>) -> KernelCache {
        KernelCache { folder: Some(folder.into()) }
    }

    /// The folder, if there is one.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    fn path(&self, name: &str, target: &str, key: Key) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{name}-{target}-{:032x}.cubin", key.0)))
    }

    /// The image of this key made by this NVRTC version; by any version when `version` is `None`.
    pub fn load(&self, name: &str, target: &str, key: Key, version: Option<(u32, u32)>) -> Option<Vec<u8>> {
        let path = self.path(name, target, key)?;
        if !private(&path) || !private(path.parent()?) {
            return None;
        }
        let mut bytes = fs::read(&path).ok()?;
        if bytes.len() < HEADER || bytes[..4] != MAGIC {
            return None;
        }
        let u32_at = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().expect("four bytes"));
        let made_by = (u32_at(4), u32_at(8));
        let whole = bytes[12..28] == key.0.to_le_bytes()
            && bytes[28..36] == ((bytes.len() - HEADER) as u64).to_le_bytes()
            && u32_at(36) == crc32fast::hash(&bytes[HEADER..]);
        if !whole || version.is_some_and(|v| v != made_by) {
            return None;
        }
        bytes.drain(..HEADER);
        Some(bytes)
    }

    /// Stores an image. Returns false when the folder cannot be written.
    pub fn store(&self, name: &str, target: &str, key: Key, version: (u32, u32), image: &[u8]) -> bool {
        let Some(path) = self.path(name, target, key) else { return false };
        let Some(folder) = path.parent() else { return false };
        let written = write(folder, &path, key, version, image).is_ok();
        if written {
            self.forget_old(folder, &format!("{name}-{target}-"), &path);
        }
        written
    }

    fn forget_old(&self, folder: &Path, start: &str, except: &Path) {
        let now = SystemTime::now();
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let ours = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(start));
            let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| now.duration_since(t).ok());
            if ours && path != except && age.is_some_and(|a| a > KEEP) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn write(folder: &Path, path: &Path, key: Key, version: (u32, u32), image: &[u8]) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        builder.mode(0o700);
        options.mode(0o600);
    }
    builder.create(folder)?;
    // Unique among the threads and processes that compile at the same time.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let aside = folder.join(format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    let done = (|| {
        let mut file = options.open(&aside)?;
        let mut head = Vec::with_capacity(HEADER);
        head.extend(MAGIC);
        head.extend(version.0.to_le_bytes());
        head.extend(version.1.to_le_bytes());
        head.extend(key.0.to_le_bytes());
        head.extend((image.len() as u64).to_le_bytes());
        head.extend(crc32fast::hash(image).to_le_bytes());
        file.write_all(&head)?;
        file.write_all(image)?;
        drop(file);
        fs::rename(&aside, path)
    })();
    if done.is_err() {
        let _ = fs::remove_file(&aside);
    }
    done
}

/// Whether only the owner may write the path.
#[cfg(unix)]
fn private(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).is_ok_and(|m| m.mode() & 0o022 == 0)
}

#[cfg(not(unix))]
fn private(_: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("prismgrad-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn keys_tell_parts_apart() {
        assert_eq!(Key::of(["ab", "c"]), Key::of(["ab", "c"]));
        assert_ne!(Key::of(["ab", "c"]), Key::of(["a", "bc"]));
        assert_ne!(Key::of(["ab"]), Key::of(["ab", ""]));
    }

    #[test]
    fn what_is_stored_comes_back_and_damage_does_not() {
        let folder = scratch("damage");
        let cache = KernelCache::at(folder.join("a/b"));
        let key = Key::of(["source"]);
        assert!(cache.load("f", "sm_90a", key, None).is_none());
        assert!(cache.store("f", "sm_90a", key, (13, 0), b"image"));
        assert_eq!(cache.load("f", "sm_90a", key, Some((13, 0))).unwrap(), b"image");
        assert_eq!(cache.load("f", "sm_90a", key, None).unwrap(), b"image");
        assert!(cache.load("f", "sm_90a", key, Some((13, 1))).is_none(), "another compiler");
        assert!(cache.load("f", "sm_90a", Key::of(["other"]), None).is_none());
        assert!(fs::read_dir(folder.join("a/b")).unwrap().count() == 1, "nothing is left aside");

        let path = cache.path("f", "sm_90a", key).unwrap();
        let good = fs::read(&path).unwrap();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            fs::write(&path, &bad).unwrap();
            // The version is compared; it is not part of the checksum.
            let expected = if (4..12).contains(&i) { Some((13, 0)) } else { None };
            assert!(cache.load("f", "sm_90a", key, expected).is_none(), "byte {i}");
        }
        for n in 0..good.len() {
            fs::write(&path, &good[..n]).unwrap();
            assert!(cache.load("f", "sm_90a", key, None).is_none(), "cut to {n}");
        }
        assert!(cache.store("f", "sm_90a", key, (13, 0), b"image"), "written over the damaged one");
        assert!(cache.load("f", "sm_90a", key, None).is_some());
        fs::remove_dir_all(folder).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_touch_entries() {
        use std::os::unix::fs::PermissionsExt;
        let folder = scratch("owner");
        let cache = KernelCache::at(&folder);
        let key = Key::of(["source"]);
        cache.store("f", "sm_80", key, (13, 0), b"image");
        let path = cache.path("f", "sm_80", key).unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&path)), (0o700, 0o600));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(cache.load("f", "sm_80", key, None).is_none(), "others could have written it");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_is_no_cache() {
        let file = scratch("file");
        fs::write(&file, b"").unwrap();
        let cache = KernelCache::at(file.join("below"));
        assert!(!cache.store("f", "sm_80", Key::of(["x"]), (13, 0), b"image"));
        assert!(cache.load("f", "sm_80", Key::of(["x"]), None).is_none());
        let none = KernelCache { folder: None };
        assert!(!none.store("f", "sm_80", Key::of(["x"]), (13, 0), b"image"));
        fs::remove_file(file).unwrap();
    }
}
