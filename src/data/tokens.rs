//! Token streams cut into training samples of one length, each of which has an owner.

use std::sync::Arc;

use crate::base::{Error, Result};

/// The target at positions without a loss: the padding of a short chunk.
pub const IGNORE: u32 = u32::MAX;

/// Tokens of all documents, one document after the other, each followed by the end-of-text token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSet {
    tokens: Arc<[u32]>,
    offsets: Arc<[usize]>,
    end_of_text: u32,
}

impl TokenSet {
    /// Joins the documents and adds `end_of_text` after each.
    pub fn new(documents: impl IntoIterator<Item = Vec<u32>>, end_of_text: u32) -> Self {
        let (mut tokens, mut offsets) = (Vec::new(), vec![0]);
        for document in documents {
            tokens.extend(document);
            tokens.push(end_of_text);
            offsets.push(tokens.len());
        }
        TokenSet { tokens: tokens.into(), offsets: offsets.into(), end_of_text }
    }

    /// All tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.offsets.len() - 1
    }
    /// Where each document starts in [`tokens`](Self::tokens), and the end of the last.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }
    /// The tokens of one document with its end-of-text token.
    ///
    /// # Panics
    /// If `i` is not below [`documents`](Self::documents), as with a slice.
    pub fn document(&self, i: usize) -> &[u32] {
        &self.tokens[self.offsets[i]..self.offsets[i + 1]]
    }

    /// Cuts the stream into windows of `seq_len` targets regardless of documents. Every position is used once, there is no padding, and the
    /// incomplete window at the end is dropped. This is for training that is not private.
    ///
    /// # Errors
    /// [`Error::Invalid`] if not even one window fits.
    pub fn windows(&self, seq_len: usize) -> Result<Windows> {
        check_length("TokenSet::windows", seq_len)?;
        let count = self.tokens.len().saturating_sub(1) / seq_len;
        if count == 0 {
            let message = format!("{} tokens do not fill one window of {seq_len} + 1", self.tokens.len());
            return Err(Error::invalid("TokenSet::windows", message));
        }
        let owner = |start| self.offsets.partition_point(|&o| o <= start) as u32 - 1;
        let cut = |i| Cut { start: i * seq_len, targets: seq_len, owner: owner(i * seq_len) };
        Ok(Windows { set: self.clone(), seq_len, cuts: (0..count).map(cut).collect() })
    }

    /// Cuts each document separately: no sample has tokens of two documents, so that each sample belongs to one owner.
    ///
    /// The last chunk of a document is filled up with the end-of-text token, and its targets with [`IGNORE`]. For private training, a
    /// sample is the unit of record-level privacy, and its [owner](Windows::owner) that of user-level privacy.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no token to predict.
    pub fn chunks(&self, seq_len: usize) -> Result<Windows> {
        check_length("TokenSet::chunks", seq_len)?;
        let mut cuts = Vec::new();
        for (document, range) in self.offsets.windows(2).enumerate() {
            let (mut start, last) = (range[0], range[1] - 1);
            while start < last {
                let targets = seq_len.min(last - start);
                cuts.push(Cut { start, targets, owner: document as u32 });
                start += targets;
            }
        }
        if cuts.is_empty() {
            return Err(Error::invalid("TokenSet::chunks", "no document has a token; check the text set"));
        }
        Ok(Windows { set: self.clone(), seq_len, cuts })
    }
}

fn check_length(op: &'static str, seq_len: usize) -> Result<()> {
    if seq_len == 0 {
        return Err(Error::invalid(op, "a sequence length of 0; use at least 1"));
    }
    Ok(())
}

/// The position of a sample: `targets` predictions from `start` on.
#[derive(Clone, Copy, Debug)]
struct Cut {
    start: usize,
    targets: usize,
    owner: u32,
}

/// Samples of one length over a [`TokenSet`]. Clones are cheap.
#[derive(Clone, Debug)]
pub struct Windows {
    set: TokenSet,
    seq_len: usize,
    cuts: Vec<Cut>,
}

impl Windows {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.cuts.len()
    }
    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.cuts.is_empty()
    }
    /// The number of tokens per sample.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// One sample: `seq_len` inputs, and for each the token after it as its target. Targets of the padding are [`IGNORE`].
    ///
    /// # Panics
    /// If `i` is not below [`len`](Self::len), as with a slice.
    pub fn sample(&self, i: usize) -> (Vec<u32>, Vec<u32>) {
        let (mut inputs, mut targets) = (Vec::with_capacity(self.seq_len), Vec::with_capacity(self.seq_len));
        self.push(self.cuts[i], &mut inputs, &mut targets);
        (inputs, targets)
    }

    /// Several samples as inputs and targets of shape [n, seq_len].
    pub fn batch(&self, indices: &[usize]) -> Result<(Vec<u32>, Vec<u32>)> {
        let size = indices.len() * self.seq_len;
        let (mut inputs, mut targets) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for &i in indices {
            let cut = self.cuts.get(i).ok_or_else(|| {
                Error::invalid("Windows::batch", format!("index {i}, but there are {} samples", self.cuts.len()))
            })?;
            self.push(*cut, &mut inputs, &mut targets);
        }
        Ok((inputs, targets))
    }

    fn push(&self, cut: Cut, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
        let padding = self.seq_len - cut.targets;
        inputs.extend_from_slice(&self.set.tokens[cut.start..cut.start + cut.targets]);
        inputs.extend(std::iter::repeat_n(self.set.end_of_text, padding));
        targets.extend_from_slice(&self.set.tokens[cut.start + 1..=cut.start + cut.targets]);
        targets.extend(std::iter::repeat_n(IGNORE, padding));
    }

    /// How many targets of a sample are not [`IGNORE`].
    pub fn target_count(&self, i: usize) -> usize {
        self.cuts[i].targets
    }

    /// The owner of a sample: the number of its document, unless [`with_owners`](Self::with_owners) changed it.
    pub fn owner(&self, i: usize) -> u32 {
        self.cuts[i].owner
    }
    /// The owner of every sample.
    pub fn owners(&self) -> Vec<u32> {
        self.cuts.iter().map(|c| c.owner).collect()
    }

    /// Assigns the samples of document `d` to `owners[d]`, such as the project or person that a file belongs to.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `owners` has not one entry per document.
    pub fn with_owners(mut self, owners: &[u32]) -> Result<Self> {
        if owners.len() != self.set.documents() {
            let message = format!("{} owners for {} documents", owners.len(), self.set.documents());
            return Err(Error::invalid("Windows::with_owners", message));
        }
        for cut in &mut self.cuts {
            let document = self.set.offsets.partition_point(|&o| o <= cut.start) - 1;
            cut.owner = owners[document];
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> TokenSet {
        TokenSet::new([vec![1, 2, 3, 4, 5], vec![], vec![6, 7]], 0)
    }

    #[test]
    fn windows_use_every_position_once() {
        let set = set();
        assert_eq!(set.tokens(), [1, 2, 3, 4, 5, 0, 0, 6, 7, 0]);
        assert_eq!(set.offsets(), [0, 6, 7, 10]);
        let windows = set.windows(4).unwrap();
        assert_eq!(windows.len(), 2);
        assert_eq!(windows.sample(0), (vec![1, 2, 3, 4], vec![2, 3, 4, 5]));
        assert_eq!(windows.sample(1), (vec![5, 0, 0, 6], vec![0, 0, 6, 7]));
        assert_eq!(set.windows(3).unwrap().owners(), [0, 0, 1]);
        assert!(set.windows(10).is_err() && set.windows(0).is_err());
        assert_eq!(set.windows(9).unwrap().len(), 1);
    }

    #[test]
    fn chunks_never_cross_documents() {
        let chunks = set().chunks(4).unwrap();
        assert_eq!(chunks.len(), 3);
        assert_eq!(chunks.sample(0), (vec![1, 2, 3, 4], vec![2, 3, 4, 5]));
        assert_eq!(chunks.sample(1), (vec![5, 0, 0, 0], vec![0, IGNORE, IGNORE, IGNORE]));
        assert_eq!(chunks.sample(2), (vec![6, 7, 0, 0], vec![7, 0, IGNORE, IGNORE]));
        assert_eq!(chunks.owners(), [0, 0, 2]);
        assert_eq!(chunks.target_count(2), 2);
        let (inputs, targets) = chunks.batch(&[2, 0]).unwrap();
        assert_eq!((inputs.len(), targets[4]), (8, 2));
        assert!(chunks.batch(&[3]).is_err());
        assert_eq!(chunks.clone().with_owners(&[9, 8, 9]).unwrap().owners(), [9, 9, 9]);
        assert!(chunks.with_owners(&[1]).is_err());
        assert!(TokenSet::new([vec![], vec![]], 0).chunks(4).is_err());
        let targets: usize = (0..3).map(|i| set().chunks(4).unwrap().target_count(i)).sum();
        assert_eq!(targets, 5 + 2, "every token after the first of its document is predicted once");
    }
}
