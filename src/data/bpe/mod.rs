//! Byte-level byte-pair encoding as in GPT-2. Tokenizers are trained here and saved as `tokenizer.json` for Hugging Face's tools.
//!
//! Radford et al., "Language models are unsupervised multitask learners" (2019); Sennrich et al., "Neural machine
//! translation of rare words with subword units" (2016). Every text can be encoded, and comes back byte for byte.
//!
//! It does not use the `tokenizers` crate, because that crate and its dependencies would double the time of a clean build. The results are
//! the same: vocabulary, merges and ids of a trained tokenizer agree with it.

mod json;
mod split;
mod train;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::path::Path;

use super::tokenizer::Tokenizer;
use crate::base::{Error, Result};

/// The special token at the end of a document.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// A byte-level BPE tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bpe {
    /// Bytes of each id; `None` for an id that the vocabulary skips. Special tokens have no bytes.
    tokens: Vec<Option<Vec<u8>>>,
    specials: Vec<(u32, String)>,
    /// The id of each single byte.
    bytes: Box<[u32; 256]>,
    /// Merged pairs in the order they were learnt.
    merges: Vec<(u32, u32)>,
    /// Rank and result of each merge.
    ranks: HashMap<(u32, u32), (u32, u32)>,
    end_of_text: u32,
    prefix_space: bool,
}

impl Bpe {
    /// Learns a vocabulary of `vocab_size` ids, which include the special token and the 256 bytes.
    ///
    /// The same texts give the same vocabulary in any order: the most frequent pair is merged first, and of equally frequent pairs the one
    /// with the lower ids. The vocabulary is smaller only if the texts have no more pairs.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the size is too small for the special token and the bytes.
    pub fn train<T: AsRef<str>>(texts: impl IntoIterator<Item = T>, vocab_size: usize) -> Result<Self> {
        const BASE: usize = 256 + 1;
        if !(BASE..=1 << 24).contains(&vocab_size) {
            let message = format!("a vocabulary of {vocab_size}; it must be {BASE} (bytes and end of text) to 2^24");
            return Err(Error::invalid("Bpe::train", message));
        }
        let mut tokens = vec![Some(Vec::new())];
        let mut bytes = Box::new([0; 256]);
        for byte in alphabet() {
            bytes[usize::from(byte)] = tokens.len() as u32;
            tokens.push(Some(vec![byte]));
        }
        let specials = vec![(0, END_OF_TEXT.to_string())];
        let merges = train::learn(texts, &bytes, &mut tokens, vocab_size);
        Self::assemble(tokens, specials, bytes, merges, 0, false)
            .map_err(|message| Error::invalid("Bpe::train", message))
    }

    /// Reads a `tokenizer.json` with a byte-level BPE in GPT-2's form.
    ///
    /// # Errors
    /// [`Error::Format`] if the file needs anything that this tokenizer does not support, which the error names. A vocabulary used with the
    /// wrong rules would silently give wrong ids.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read(path).map_err(|e| Error::io("read tokenizer", path, e))?;
        json::parse(&text).map_err(|message| Error::format(path, message))
    }

    /// Writes a `tokenizer.json`, atomically.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        crate::io::write_json(path, &json::file(self))
    }

    /// The id of a special token.
    pub fn special(&self, name: &str) -> Option<u32> {
        self.specials.iter().find(|(_, n)| n == name).map(|(id, _)| *id)
    }

    fn assemble(
        tokens: Vec<Option<Vec<u8>>>,
        specials: Vec<(u32, String)>,
        bytes: Box<[u32; 256]>,
        merges: Vec<(u32, u32)>,
        end_of_text: u32,
        prefix_space: bool,
    ) -> Result<Self, String> {
        let text_of = |id: u32| tokens.get(id as usize).and_then(Option::as_deref).unwrap_or(&[]);
        let ids: HashMap<&[u8], u32> =
            tokens.iter().enumerate().filter_map(|(i, t)| Some((t.as_deref()?, i as u32))).collect();
        let mut ranks = HashMap::with_capacity(merges.len());
        for (rank, &(a, b)) in merges.iter().enumerate() {
            let joined = [text_of(a), text_of(b)].concat();
            let id = ids.get(joined.as_slice()).ok_or_else(|| {
                format!("merge {rank} gives '{}', which is not in the vocabulary", String::from_utf8_lossy(&joined))
            })?;
            ranks.entry((a, b)).or_insert((rank as u32, *id));
        }
        Ok(Bpe { tokens, specials, bytes, merges, ranks, end_of_text, prefix_space })
    }

    /// Encodes one piece of text: it always applies the merge that was learnt earliest, and of several places the leftmost.
    fn encode_piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        const DEAD: u32 = u32::MAX;
        let mut ids: Vec<u32> = piece.iter().map(|&b| self.bytes[usize::from(b)]).collect();
        let mut next: Vec<usize> = (1..=ids.len()).collect();
        let mut before: Vec<usize> = (0..ids.len()).map(|i| i.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        let candidate = |ids: &[u32], left: usize, right: usize| {
            let pair = (*ids.get(left)?, *ids.get(right)?);
            let &(rank, id) = self.ranks.get(&pair)?;
            Some(Reverse((rank, left, pair, id)))
        };
        heap.extend((1..ids.len()).filter_map(|i| candidate(&ids, i - 1, i)));
        while let Some(Reverse((_, left, pair, id))) = heap.pop() {
            let right = next[left];
            if ids[left] != pair.0 || ids.get(right) != Some(&pair.1) {
                continue;
            }
            ids[left] = id;
            ids[right] = DEAD;
            next[left] = next[right];
            if let Some(b) = before.get_mut(next[right]) {
                *b = left;
            }
            heap.extend(candidate(&ids, before[left], left));
            heap.extend(candidate(&ids, left, next[left]));
        }
        out.extend(ids.into_iter().filter(|&id| id != DEAD));
    }
}

impl Tokenizer for Bpe {
    fn encode(&self, text: &str) -> Vec<u32> {
        let spaced;
        let text = if self.prefix_space && !text.is_empty() && !text.starts_with(' ') {
            spaced = format!(" {text}");
            &spaced
        } else {
            text
        };
        let mut out = Vec::with_capacity(text.len() / 3);
        // Words repeat, so each is merged only once per call. The cache borrows from the text and makes no copies.
        let mut known: HashMap<&str, (usize, usize)> = HashMap::new();
        for piece in split::pieces(text) {
            if let Some(&(start, end)) = known.get(piece) {
                out.extend_from_within(start..end);
                continue;
            }
            let start = out.len();
            self.encode_piece(piece.as_bytes(), &mut out);
            known.insert(piece, (start, out.len()));
        }
        out
    }
    fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.get(id as usize).map(|t| t.as_deref().unwrap_or(&[]))
    }
    fn vocab_size(&self) -> usize {
        self.tokens.len()
    }
    fn end_of_text(&self) -> u32 {
        self.end_of_text
    }
}

/// Whether a byte is its own character in the file; the others are shown as characters from U+0100 on.
fn printable(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff)
}

/// All bytes in the order of the characters that represent them in the file. This is the order of their ids.
fn alphabet() -> impl Iterator<Item = u8> {
    (0..=255).filter(|&b| printable(b)).chain((0..=255).filter(|&b| !printable(b)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;

    const TEXTS: [&str; 3] = [
        "fn main() {\n    let x = 1;\n    println!(\"{x}\");\n}\n",
        "the cat sat on the mat; the hat's that\n",
        "fn other() {\n    let y = 22;\n}\n",
    ];

    #[test]
    fn every_text_comes_back() {
        let bpe = Bpe::train(TEXTS, 300).unwrap();
        assert_eq!(bpe.vocab_size(), 300);
        let strange = "  ε\t\u{a0}日本語 it's WE'LL <|endoftext|>\r\n\n\n   x\u{0}\u{10ffff}  ";
        for text in TEXTS.iter().copied().chain([strange, "", " ", "\n\n", "'", "=======", "a  b   c"]) {
            let ids = bpe.encode(text);
            assert_eq!(bpe.decode(&ids).unwrap(), text);
            assert!(!ids.contains(&bpe.end_of_text()), "special tokens are never read out of a text");
        }
        assert!(bpe.encode(TEXTS[0]).len() < TEXTS[0].len() * 2 / 3);
        assert_eq!(bpe.decode(&[bpe.end_of_text()]).unwrap(), "");
        assert!(bpe.decode(&[300]).is_err());
    }

    #[test]
    fn the_order_of_the_texts_does_not_matter() {
        let forward = Bpe::train(TEXTS, 320).unwrap();
        let backward = Bpe::train(TEXTS.iter().rev(), 320).unwrap();
        assert_eq!(forward, backward);
        assert!(Bpe::train(TEXTS, 256).is_err() && Bpe::train(TEXTS, usize::MAX).is_err());
        assert_eq!(Bpe::train(["ab"], 1000).unwrap().vocab_size(), 258, "nothing more to merge");
        assert_eq!(Bpe::train([""; 0], 300).unwrap().vocab_size(), 257);
    }

    /// The worked example of Sennrich et al.: with these words "es", "est" and "lo", "low" come first.
    #[test]
    fn the_most_frequent_pairs_are_merged_first() {
        let words = [("low", 5), ("lower", 2), ("newest", 6), ("widest", 3)];
        let text: Vec<String> = words.iter().flat_map(|(w, n)| vec![w.to_string(); *n]).collect();
        let bpe = Bpe::train(&text, 257 + 4).unwrap();
        let learnt: Vec<&[u8]> = (257..261).map(|id| bpe.token_bytes(id).unwrap()).collect();
        assert_eq!(learnt, [b"es".as_slice(), b"est", b"lo", b"low"]);
        assert_eq!(bpe.encode("lowest").len(), 2);
    }

    #[test]
    fn long_runs_take_no_quadratic_time() {
        let bpe = Bpe::train(["a".repeat(64).as_str()], 270).unwrap();
        let text = "a".repeat(1 << 20);
        assert_eq!(bpe.decode(&bpe.encode(&text)).unwrap(), text);
    }

    #[test]
    fn saved_and_loaded() {
        let folder = Scratch::new("bpe");
        let path = folder.join("tokenizer.json");
        let bpe = Bpe::train(TEXTS, 310).unwrap();
        bpe.save(&path).unwrap();
        assert_eq!(Bpe::load(&path).unwrap(), bpe);
        assert_eq!(bpe.special(END_OF_TEXT), Some(0));
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to, expected) in [
            ("\"BPE\"", "\"Unigram\"", "Unigram"),
            ("\"use_regex\": true", "\"use_regex\": false", "use_regex"),
            ("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", "normalizer"),
            ("\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback"),
            ("<|endoftext|>", "<|other|>", "end-of-text"),
            ("\"special\": true", "\"special\": false", "special"),
            ("\"version\": \"1.0\"", "\"version\"", "JSON"),
            ("\"!\": 1", "\"!!!!\": 1", "0x21"),
            ("\"!\": 1,", "\"!\": 4000000000,", "4000000000"),
        ] {
            assert!(text.contains(from), "{from}");
            std::fs::write(&path, text.replace(from, to)).unwrap();
            let error = Bpe::load(&path).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("tokenizer.json"), "{expected}: {error}");
        }
    }
}
