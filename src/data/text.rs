//! Text sets: documents with names, read from a folder of the user.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::stable_hash;
use super::tokenizer::Tokenizer;
use super::tokens::TokenSet;
use crate::base::{Error, Result};

/// One text, usually a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Path relative to the root of the set, with `/` between its parts.
    pub name: String,
    /// The text.
    pub text: String,
}

/// A set of documents in a fixed order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corpus {
    /// The documents.
    pub documents: Vec<Document>,
}

impl Corpus {
    /// The number of bytes of text.
    pub fn bytes(&self) -> usize {
        self.documents.iter().map(|d| d.text.len()).sum()
    }

    /// The texts, for example to train a tokenizer on.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.documents.iter().map(|d| d.text.as_str())
    }

    /// Training and validation documents.
    ///
    /// Whether a document is held out depends on its name and the seed alone, so it stays in its part when documents are added or removed.
    /// About `validation` of the documents are held out, and at least one of two or more.
    pub fn split(self, validation: f64, seed: u64) -> (Corpus, Corpus) {
        let hash = |d: &Document| stable_hash(&d.name, seed);
        let limit = (validation.clamp(0.0, 1.0) * u64::MAX as f64) as u64;
        let lowest = self.documents.iter().map(&hash).min().unwrap_or(0);
        let limit =
            if self.documents.len() > 1 && validation > 0.0 { limit.max(lowest.saturating_add(1)) } else { limit };
        let (held, train) = self.documents.into_iter().partition(|d| hash(d) < limit);
        (Corpus { documents: train }, Corpus { documents: held })
    }

    /// Tokenises all documents, in parallel; each is followed by the tokenizer's end-of-text token.
    pub fn tokenize(&self, tokenizer: &dyn Tokenizer) -> TokenSet {
        let documents: Vec<Vec<u32>> = self.documents.par_iter().map(|d| tokenizer.encode(&d.text)).collect();
        TokenSet::new(documents, tokenizer.end_of_text())
    }

    /// For each document, the number of the top folder that contains it. This is for sets made of several projects, if the privacy of a
    /// whole project is to be protected.
    pub fn top_folder_owners(&self) -> Vec<u32> {
        let top = |d: &Document| d.name.split('/').next().unwrap_or("").to_string();
        let names: BTreeSet<String> = self.documents.iter().map(top).collect();
        let names: Vec<String> = names.into_iter().collect();
        self.documents.iter().map(|d| names.binary_search(&top(d)).unwrap_or(0) as u32).collect()
    }
}

/// Folders with these names contain nothing that was written by hand.
pub(super) const LEFT_OUT: [&str; 2] = ["target", "node_modules"];

/// Reads the text files of a folder and of the folders in it.
///
/// Hidden files, `target`, `node_modules`, links, binary files and files above the size limit are left out.
#[derive(Clone, Debug)]
pub struct Folder {
    root: PathBuf,
    extensions: Vec<String>,
    without: Vec<String>,
    max_file_bytes: usize,
    max_bytes: usize,
}

impl Folder {
    /// All text files of at most 1 MiB below `root`.
    pub fn new(root: impl AsRef<Path>) -> Self {
        let root = root.as_ref().to_path_buf();
        let without = LEFT_OUT.map(String::from).to_vec();
        Folder { root, extensions: Vec::new(), without, max_file_bytes: 1 << 20, max_bytes: usize::MAX }
    }

    /// Restricts the set to files with one of these extensions, given without the dot; case does not matter.
    pub fn extensions<S: AsRef<str>>(mut self, extensions: impl IntoIterator<Item = S>) -> Self {
        self.extensions =
            extensions.into_iter().map(|e| e.as_ref().trim_start_matches('.').to_ascii_lowercase()).collect();
        self
    }

    /// Leaves out folders with these names as well, at any depth.
    pub fn without<S: Into<String>>(mut self, folders: impl IntoIterator<Item = S>) -> Self {
        self.without.extend(folders.into_iter().map(Into::into));
        self
    }

    /// Leaves out files above this size.
    pub fn max_file_bytes(mut self, bytes: usize) -> Self {
        self.max_file_bytes = bytes;
        self
    }

    /// Limits the size of the whole set: reading stops before it is exceeded.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Reads the set, sorted by relative path.
    ///
    /// # Errors
    /// [`Error::Io`] for a folder that cannot be read, [`Error::Format`] if no file is left, which says why.
    pub fn load(&self) -> Result<Corpus> {
        let files = list_files(&self.root, &self.extensions, &self.without)?;
        let (mut large, mut binary, mut total) = (0, 0, 0usize);
        let mut documents = Vec::new();
        for file in &files {
            if file.bytes > self.max_file_bytes as u64 {
                large += 1;
                continue;
            }
            let Some(text) = read_text(&file.path)? else {
                binary += 1;
                continue;
            };
            if total.saturating_add(text.len()) > self.max_bytes {
                break;
            }
            total += text.len();
            documents.push(Document { name: file.name.clone(), text });
        }
        if documents.is_empty() {
            let wanted =
                if self.extensions.is_empty() { "any".into() } else { format!(".{}", self.extensions.join(", .")) };
            let message = format!(
                "no text file to train on: {} files with a wanted extension ({wanted}), {large} too large, {binary} not \
                 text; check the folder, the extensions and the size limits",
                files.len()
            );
            return Err(Error::format(&self.root, message));
        }
        Ok(Corpus { documents })
    }
}

/// A file found by [`list_files`].
pub(super) struct FoundFile {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
}

/// Files below a folder with one of the extensions (or any, if there are none), but not in folders named in `without`, sorted by name.
pub(super) fn list_files(root: &Path, extensions: &[String], without: &[String]) -> Result<Vec<FoundFile>> {
    let mut files = Vec::new();
    let mut folders = vec![(root.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(|e| Error::io("list folder", &folder, e))? {
            let entry = entry.map_err(|e| Error::io("list folder", &folder, e))?;
            // A name that is not Unicode cannot be sorted or hashed alike on every machine.
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with('.') {
                continue;
            }
            let kind = entry.file_type().map_err(|e| Error::io("examine", entry.path(), e))?;
            let relative = format!("{prefix}{name}");
            if kind.is_dir() {
                if !without.contains(&name) {
                    folders.push((entry.path(), relative + "/"));
                }
            } else if kind.is_file() {
                let extension = name.rsplit_once('.').map_or("", |(_, e)| e).to_ascii_lowercase();
                if extensions.is_empty() || extensions.contains(&extension) {
                    let bytes = entry.metadata().map_err(|e| Error::io("examine", entry.path(), e))?.len();
                    files.push(FoundFile { name: relative, path: entry.path(), bytes });
                }
            }
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

/// The content of a file, or `None` if it is not text.
pub(super) fn read_text(path: &Path) -> Result<Option<String>> {
    let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    Ok(String::from_utf8(bytes).ok().filter(|text| !text.is_empty() && !text.contains('\0')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ByteTokenizer;
    use crate::io::Scratch;

    fn corpus(count: usize) -> Corpus {
        let document = |i| Document { name: format!("p{}/f{i}", i % 3), text: format!("text {i}") };
        Corpus { documents: (0..count).map(document).collect() }
    }

    #[test]
    fn a_folder_is_read_in_order_and_rubbish_is_left_out() {
        let scratch = Scratch::new("folder");
        let put = |name: &str, bytes: &[u8]| {
            let path = scratch.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        put("z.RS", b"fn z() {}");
        put("sub/a.rs", b"fn a() {}");
        put("sub/notes.md", b"notes");
        put("binary.rs", b"a\0b");
        put("latin.rs", b"\xe9\xff");
        put("empty.rs", b"");
        put("large.rs", &[b'x'; 200]);
        put(".git/config.rs", b"no");
        put("target/debug/out.rs", b"no");
        put(".hidden.rs", b"no");
        let names = |c: &Corpus| c.documents.iter().map(|d| d.name.clone()).collect::<Vec<_>>();
        let set = Folder::new(scratch.path()).extensions([".rs"]).max_file_bytes(100).load().unwrap();
        assert_eq!(names(&set), ["sub/a.rs", "z.RS"]);
        assert_eq!(set.bytes(), 18);
        let all = Folder::new(scratch.path()).load().unwrap();
        assert_eq!(names(&all), ["large.rs", "sub/a.rs", "sub/notes.md", "z.RS"]);
        assert_eq!(names(&Folder::new(scratch.path()).max_bytes(210).load().unwrap()), ["large.rs", "sub/a.rs"]);
        assert_eq!(names(&Folder::new(scratch.path()).without(["sub"]).load().unwrap()), ["large.rs", "z.RS"]);
        let error = Folder::new(scratch.path()).extensions(["py"]).load().unwrap_err().to_string();
        assert!(error.contains("0 files with a wanted extension (.py)"), "{error}");
        let error = Folder::new(scratch.join("absent")).load().unwrap_err().to_string();
        assert!(error.contains("absent"), "{error}");
        assert!(Folder::new(scratch.join("z.RS")).load().is_err());
    }

    #[test]
    fn the_split_depends_on_names_alone() {
        let (train, held) = corpus(1000).split(0.1, 7);
        assert_eq!(train.documents.len() + held.documents.len(), 1000);
        assert!((60..140).contains(&held.documents.len()), "{}", held.documents.len());
        let (_, fewer) = corpus(500).split(0.1, 7);
        assert!(fewer.documents.iter().all(|d| held.documents.contains(d)));
        let (train, held) = corpus(2).split(1e-12, 0);
        assert_eq!((train.documents.len(), held.documents.len()), (1, 1));
        let (train, held) = corpus(5).split(0.0, 0);
        assert_eq!((train.documents.len(), held.documents.len()), (5, 0));
        assert_eq!(Corpus::default().split(0.5, 0).1.documents.len(), 0);
    }

    #[test]
    fn tokens_and_owners() {
        let set = corpus(4).tokenize(&ByteTokenizer);
        assert_eq!(set.documents(), 4);
        assert_eq!(ByteTokenizer.decode(&set.document(2)[..6]).unwrap(), "text 2");
        assert_eq!(corpus(4).top_folder_owners(), [0, 1, 2, 0]);
    }
}
