//! A text set that every user already has: the sources of the crates on which their own build depends.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use serde::Deserialize;

use super::stable_hash;
use super::text::{Corpus, Document, FoundFile, LEFT_OUT, list_files, read_text};
use crate::base::{Error, Result};

/// Rust sources of the crates on which the running project depends.
///
/// They are found through `cargo metadata`, offline. If cargo does not answer, the sources that cargo has unpacked
/// (`$CARGO_HOME/registry/src`) are used. The project's own packages are left out. The set is the same for the same lock file and platform.
#[derive(Clone, Debug)]
pub struct CrateSources {
    max_bytes: usize,
    max_file_bytes: usize,
    project: Option<PathBuf>,
}

/// A package whose sources can be read.
#[derive(Debug)]
struct Package {
    /// `name-version`.
    name: String,
    folder: PathBuf,
}

impl Default for CrateSources {
    fn default() -> Self {
        Self::new()
    }
}

impl CrateSources {
    /// A set of up to 8 MiB, in files of at most 128 KiB (larger ones are mostly generated tables).
    pub fn new() -> Self {
        CrateSources { max_bytes: 8 << 20, max_file_bytes: 128 << 10, project: None }
    }

    /// Sets the size of the whole set. Small crates are taken as a whole, and large ones contribute the same number of bytes each, in files
    /// chosen by the hash of their names.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Leaves out files above this size.
    pub fn max_file_bytes(mut self, bytes: usize) -> Self {
        self.max_file_bytes = bytes;
        self
    }

    /// Sets the folder of the project whose dependencies are read, which is the running project by default.
    pub fn project(mut self, folder: impl AsRef<Path>) -> Self {
        self.project = Some(folder.as_ref().to_path_buf());
        self
    }

    /// Reads the set, sorted by crate, version and path. Names look like `serde-1.0.200/src/lib.rs`.
    ///
    /// # Errors
    /// [`Error::Format`] if no sources are found; the error says where they were looked for.
    pub fn load(&self) -> Result<Corpus> {
        let mut packages = self.packages()?;
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        packages.dedup_by(|a, b| a.name == b.name);
        let mut listed = Vec::new();
        for package in &packages {
            let mut files = list_files(&package.folder, &["rs".to_string()], &LEFT_OUT.map(String::from))?;
            files.retain(|f| f.bytes > 0 && f.bytes <= self.max_file_bytes as u64);
            listed.push(files);
        }
        let sizes: Vec<u64> = listed.iter().map(|files| files.iter().map(|f| f.bytes).sum()).collect();
        let share = fair_share(&sizes, self.max_bytes as u64);
        let mut documents = Vec::new();
        for (package, files) in packages.iter().zip(listed) {
            for file in choose(files, share) {
                if let Some(text) = read_text(&file.path)? {
                    documents.push(Document { name: format!("{}/{}", package.name, file.name), text });
                }
            }
        }
        if documents.is_empty() {
            let message = format!(
                "no Rust source of at most {} bytes in {} crates; raise the limits, or use Folder on a folder of yours",
                self.max_file_bytes,
                packages.len()
            );
            return Err(Error::format("crate sources", message));
        }
        Ok(Corpus { documents })
    }

    fn packages(&self) -> Result<Vec<Package>> {
        let projects = match &self.project {
            Some(folder) => vec![folder.clone()],
            None => [
                env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from),
                env::current_dir().ok(),
                Some(PathBuf::from(env!("CARGO_MANIFEST_DIR"))),
            ]
            .into_iter()
            .flatten()
            .collect(),
        };
        let mut reasons = Vec::new();
        for project in projects {
            match from_metadata(&project) {
                Ok(packages) if !packages.is_empty() => return Ok(packages),
                Ok(_) => reasons.push(format!("{} depends on no crate", project.display())),
                Err(reason) => reasons.push(reason),
            }
        }
        match from_registry() {
            Ok(packages) => Ok(packages),
            Err(reason) => {
                reasons.push(reason);
                reasons.dedup();
                let message = format!(
                    "none found ({}); run inside a cargo project that has been built once, or use Folder on any folder",
                    reasons.join("; ")
                );
                Err(Error::format("crate sources", message))
            }
        }
    }
}

/// The size to which each package is cut, so that together they stay within `limit`.
fn fair_share(sizes: &[u64], limit: u64) -> u64 {
    let mut sorted = sizes.to_vec();
    sorted.sort_unstable();
    let mut left = limit;
    for (i, &size) in sorted.iter().enumerate() {
        let share = left / (sorted.len() - i) as u64;
        if size > share {
            return share;
        }
        left -= size;
    }
    u64::MAX
}

/// Files within the share, chosen by the hash of their names and returned in the order of their names. The first files by name would be
/// mostly benchmarks and build scripts.
fn choose(mut files: Vec<FoundFile>, share: u64) -> Vec<FoundFile> {
    files.sort_by_cached_key(|f| (stable_hash(&f.name, 0), f.name.clone()));
    let mut left = share;
    files.retain(|f| {
        let fits = f.bytes <= left;
        left -= if fits { f.bytes } else { 0 };
        fits
    });
    files.sort_by(|a, b| a.name.cmp(&b.name));
    files
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<MetadataPackage>,
}

#[derive(Deserialize)]
struct MetadataPackage {
    name: String,
    version: String,
    manifest_path: PathBuf,
    /// It is absent for the project's own packages and its path dependencies.
    source: Option<String>,
}

fn from_metadata(project: &Path) -> Result<Vec<Package>, String> {
    if !project.is_dir() {
        return Err(format!("{} is not a folder", project.display()));
    }
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let ask = |args: &[&str]| -> Result<Vec<u8>, String> {
        let output = Command::new(&cargo)
            .args(args)
            .current_dir(project)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("{} cannot be run: {e}", cargo.to_string_lossy()))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let first = text.lines().next().unwrap_or("no message").trim_start_matches("error: ");
        Err(format!("cargo {} in {}: {first}", args[0], project.display()))
    };
    // Without the filter, cargo would also need the crates of every other platform, which are not downloaded.
    let version = ask(&["-vV"])?;
    let version = String::from_utf8_lossy(&version);
    let host = version.lines().find_map(|l| l.strip_prefix("host: ")).map(str::trim);
    let mut args = vec!["metadata", "--format-version", "1", "--offline"];
    args.extend(host.into_iter().flat_map(|h| ["--filter-platform", h]));
    let metadata: Metadata =
        serde_json::from_slice(&ask(&args)?).map_err(|e| format!("cargo metadata is not understood: {e}"))?;
    let package = |p: MetadataPackage| {
        let folder = p.manifest_path.parent().filter(|f| p.source.is_some() && f.is_dir())?.to_path_buf();
        Some(Package { name: format!("{}-{}", p.name, p.version), folder })
    };
    Ok(metadata.packages.into_iter().filter_map(package).collect())
}

/// The packages of every crate that cargo has unpacked.
fn from_registry() -> Result<Vec<Package>, String> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| env::home_dir().map(|h| h.join(".cargo")));
    let root = home.ok_or("no home folder")?.join("registry").join("src");
    let list = |folder: &Path| -> Result<Vec<PathBuf>, String> {
        let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect())
    };
    let mut packages = Vec::new();
    for registry in list(&root)? {
        for folder in list(&registry)? {
            let name = folder.file_name().and_then(|n| n.to_str()).map(str::to_string);
            packages.extend(name.map(|name| Package { name, folder }));
        }
    }
    if packages.is_empty() { Err(format!("{} is empty", root.display())) } else { Ok(packages) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;

    #[test]
    fn the_build_s_own_dependencies_are_read_alike_twice() {
        let set = CrateSources::new().max_bytes(1 << 20).load().unwrap();
        assert!(set.bytes() <= 1 << 20 && set.bytes() > 1 << 19, "{}", set.bytes());
        assert_eq!(set, CrateSources::new().max_bytes(1 << 20).load().unwrap());
        let names: Vec<&str> = set.documents.iter().map(|d| d.name.as_str()).collect();
        assert!(names.is_sorted_by(|a, b| a.split('/').next() <= b.split('/').next()));
        assert!(names.iter().any(|n| n.starts_with("serde_json-1.")));
        assert!(names.iter().all(|n| n.ends_with(".rs") && !n.starts_with('/') && !n.starts_with("prismgrad-")));
        let crates = set.top_folder_owners().into_iter().max().unwrap();
        assert!(crates > 10, "the cap is to be spread over the crates, not spent on the first");
    }

    #[test]
    fn shares_are_fair() {
        assert_eq!(fair_share(&[10, 100, 1000], 200), 95);
        assert_eq!(fair_share(&[10, 20], 100), u64::MAX);
        assert_eq!(fair_share(&[], 5), u64::MAX);
        assert_eq!(fair_share(&[50, 50], 0), 0);
    }

    #[test]
    fn a_folder_that_is_no_project_falls_back_or_says_why() {
        let scratch = Scratch::new("no-project");
        assert!(from_metadata(scratch.path()).unwrap_err().contains("metadata"));
        assert!(from_metadata(&scratch.join("absent")).is_err());
        // The registry's sources are on every machine that built these tests.
        assert!(!CrateSources::new().project(scratch.path()).max_bytes(1 << 16).load().unwrap().documents.is_empty());
    }
}
