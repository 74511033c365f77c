//! The trait of tokenizers, and one that needs no training: bytes.

use crate::base::{Error, Result};

/// Converts text to token ids and back.
pub trait Tokenizer: Send + Sync {
    /// The ids of a text. No special token is added, and none is recognised in the text: text that looks like a special token stays text.
    fn encode(&self, text: &str) -> Vec<u32>;

    /// The bytes of one token; empty for a special token, `None` for an id outside the vocabulary.
    fn token_bytes(&self, id: u32) -> Option<&[u8]>;

    /// Number of ids, special tokens included: the size of the embedding.
    fn vocab_size(&self) -> usize;

    /// The token at the end of a document.
    fn end_of_text(&self) -> u32;

    /// The text of some ids. Special tokens are left out; bytes that are not UTF-8 (a character cut in two) give U+FFFD.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id outside the vocabulary.
    fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            bytes.extend_from_slice(self.token_bytes(id).ok_or_else(|| {
                Error::invalid("decode", format!("token id {id}, but the vocabulary ends at {}", self.vocab_size()))
            })?);
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// One token per byte: 256 ids for bytes, and the id 256 for the end of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByteTokenizer;

/// Every byte, so that [`Tokenizer::token_bytes`] can return a reference.
static BYTES: [u8; 256] = {
    let mut bytes = [0; 256];
    let mut i = 0;
    while i < 256 {
        bytes[i] = i as u8;
        i += 1;
    }
    bytes
};

impl Tokenizer for ByteTokenizer {
    fn encode(&self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }
    fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        match id as usize {
            256 => Some(&[]),
            i => BYTES.get(i..=i),
        }
    }
    fn vocab_size(&self) -> usize {
        257
    }
    fn end_of_text(&self) -> u32 {
        256
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_there_and_back() {
        let text = "fn ε() -> 日本 {}\n\0";
        let mut ids = ByteTokenizer.encode(text);
        assert_eq!(ids.len(), text.len());
        ids.push(ByteTokenizer.end_of_text());
        assert_eq!(ByteTokenizer.decode(&ids).unwrap(), text);
        assert_eq!(ByteTokenizer.decode(&[0xce]).unwrap(), "\u{fffd}");
        assert!(ByteTokenizer.decode(&[257]).unwrap_err().to_string().contains("257"));
        assert!(ByteTokenizer.decode(&[u32::MAX]).is_err());
    }
}
