//! Data sets: text and its tokenizers, windows of tokens with owners, small images, tables and hypergraphs.
//!
//! Loaders return plain vectors; the training code puts them on a device. Everything is deterministic: the same files give
//! the same samples in the same order, whatever the file system or the number of threads.

#[cfg(feature = "bpe")]
pub mod bpe;
pub mod crates;
pub mod hypergraph;
pub mod images;
pub mod tables;
pub mod text;
pub mod tokenizer;
pub mod tokens;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result};

#[cfg(feature = "bpe")]
pub use bpe::Bpe;
pub use crates::CrateSources;
pub use hypergraph::{Hypergraph, Repeats};
pub use images::{Images, digits};
pub use tables::{TabFact, Table, TableCounts};
pub use text::{Corpus, Document, Folder};
pub use tokenizer::{ByteTokenizer, Tokenizer};
pub use tokens::{IGNORE, TokenSet, Windows};

/// Finds a data file by name: in `$PRISMGRAD_DATA`, else in `examples/data` of the running project.
///
/// # Errors
/// [`Error::Format`] if the file is in neither place; the error names both and says what to do.
pub fn data_file(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("PRISMGRAD_DATA").map(PathBuf::from);
    let project = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let places = folder.into_iter().chain([project.join("examples").join("data")]);
    for place in places {
        let path = place.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    let message = "not found in the folder that PRISMGRAD_DATA names, nor in examples/data; put the file there, or set \
                   PRISMGRAD_DATA to its folder";
    Err(Error::format(name, message))
}

/// Reads a whole file. If its content starts like gzip it is unpacked, whatever its name.
///
/// At most `limit` bytes are accepted, so that a malicious archive cannot fill the memory.
pub fn read_maybe_gzip(path: impl AsRef<Path>, limit: usize) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut magic = Vec::new();
    (&mut file).take(2).read_to_end(&mut magic).map_err(|e| Error::io("read", path, e))?;
    let packed = magic == [0x1f, 0x8b];
    let whole = magic.chain(file);
    let reader: Box<dyn Read> =
        if packed { Box::new(flate2::read::MultiGzDecoder::new(whole)) } else { Box::new(whole) };
    let mut bytes = Vec::new();
    let read = reader.take(limit as u64 + 1).read_to_end(&mut bytes);
    match read {
        Err(e) if packed => Err(Error::format(path, format!("is not a whole gzip file ({e}); fetch it again"))),
        Err(e) => Err(Error::io("read", path, e)),
        Ok(_) if bytes.len() > limit => Err(Error::format(path, format!("holds more than {limit} bytes"))),
        Ok(_) => Ok(bytes),
    }
}

/// The numbers `0..count` in an order that depends on the seed alone (Fisher–Yates over SplitMix64).
pub fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let mut state = seed;
    for i in (1..count).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // Multiply-shift maps 64 bits to 0..=i; its bias of i/2^64 is far too small to matter in a shuffle.
        let j = ((u128::from(mix(state)) * (i as u128 + 1)) >> 64) as usize;
        order.swap(i, j);
    }
    order
}

/// A hash that is the same on every machine and in every release. Every bit of it depends on the seed.
pub(crate) fn stable_hash(name: &str, seed: u64) -> u64 {
    mix(crate::base::hash(name) ^ mix(seed))
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    #[test]
    fn a_shuffle_is_a_permutation_fixed_by_its_seed() {
        let order = shuffled(1000, 1);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_eq!(order, shuffled(1000, 1));
        assert_ne!(order, shuffled(1000, 2));
        assert_eq!(shuffled(5, 0), [2, 3, 0, 1, 4], "the order must not change between releases");
        assert!(shuffled(0, 0).is_empty());
    }

    #[test]
    fn gzip_is_unpacked_and_damage_is_named() {
        let folder = Scratch::new("gzip");
        let path = folder.join("a.gz");
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(b"hello hello hello").unwrap();
        let packed = encoder.finish().unwrap();
        std::fs::write(&path, &packed).unwrap();
        assert_eq!(read_maybe_gzip(&path, 100).unwrap(), b"hello hello hello");
        assert!(read_maybe_gzip(&path, 16).unwrap_err().to_string().contains("more than 16"));
        std::fs::write(&path, &packed[..packed.len() - 3]).unwrap();
        assert!(read_maybe_gzip(&path, 100).unwrap_err().to_string().contains("a.gz"));
        std::fs::write(&path, b"x").unwrap();
        assert_eq!(read_maybe_gzip(&path, 100).unwrap(), b"x");
        assert!(data_file("no such file").unwrap_err().to_string().contains("PRISMGRAD_DATA"));
    }
}
