//! Documents: the groups of positions of a sequence that attend to each other.

use crate::base::{Error, Result};
use std::sync::Arc;

/// Documents of packed sequences, or the lengths of padded ones. Attention stays within a document, and the computation of one reads no
/// other: its values and gradients have the same bits as if it were alone, whatever the other documents contain. Positions of no document
/// are padding: their outputs and gradients are zero.
///
/// ```
/// use prismgrad::ops::attention::{AttentionOptions, Documents, Span, attention};
/// use prismgrad::{Array, DType, Tensor};
/// # fn main() -> prismgrad::Result<()> {
/// let x = Tensor::new(Array::generate(&[2, 5, 1, 4], DType::F32, |i| (i as f64).sin())); // two sequences of five positions
/// let options = AttentionOptions { documents: Some(Documents::lengths(&[5, 3])), ..AttentionOptions::new(Span::Full) };
/// let y = attention(&x, &x, &x, &options)?; // the last two positions of the second sequence are padding
/// assert!(y.slice(0, 1..2)?.slice(1, 3..5)?.array().to_f64().iter().all(|y| *y == 0.0));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents(Of);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Of {
    /// The same offsets for every sequence.
    All(Arc<[usize]>),
    /// The offsets of each sequence.
    Each(Arc<[Vec<usize>]>),
}

impl Documents {
    /// Sequences that are all divided at the same positions: document i is the positions `offsets[i]..offsets[i + 1]`, and the first offset
    /// is 0. Positions after the last offset are padding.
    pub fn packed(offsets: &[usize]) -> Documents {
        Documents(Of::All(offsets.into()))
    }
    /// Sequences with individual offsets, each as for [`Documents::packed`].
    pub fn packed_each(offsets: Vec<Vec<usize>>) -> Documents {
        Documents(Of::Each(offsets.into()))
    }
    /// Sequences of different lengths that are padded to a common one: the first `lengths[b]` positions of sequence b are its tokens.
    pub fn lengths(lengths: &[usize]) -> Documents {
        Documents::packed_each(lengths.iter().map(|n| vec![0, *n]).collect())
    }
    /// The offsets of sequence b.
    fn offsets(&self, b: usize) -> &[usize] {
        match &self.0 {
            Of::All(offsets) => offsets,
            Of::Each(each) => &each[b],
        }
    }
    /// Returns an error unless they match `batch` sequences of `positions` positions.
    pub(super) fn check(&self, batch: usize, positions: usize) -> Result<()> {
        if let Of::Each(each) = &self.0
            && each.len() != batch
        {
            let message = format!("documents of {} sequences for a batch of {batch}", each.len());
            return Err(Error::shape("attention", message));
        }
        let count = if matches!(self.0, Of::All(_)) { batch.min(1) } else { batch };
        for b in 0..count {
            let o = self.offsets(b);
            if o.first() != Some(&0) || o.last() > Some(&positions) || o.windows(2).any(|w| w[0] > w[1]) {
                let message = format!(
                    "document offsets {o:?} of sequence {b} must begin with 0, must not fall, and must not exceed its \
                     {positions} positions"
                );
                return Err(Error::shape("attention", message));
            }
        }
        Ok(())
    }
    /// Whether some of the positions are padding.
    pub(super) fn has_padding(&self, batch: usize, positions: usize) -> bool {
        (0..batch).any(|b| self.offsets(b).last() != Some(&positions))
    }
    /// Sequence, first position and length of every non-empty document.
    pub(super) fn parts(&self, batch: usize) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let each = move |b| self.offsets(b).windows(2).map(move |w| (b, w[0], w[1] - w[0]));
        (0..batch).flat_map(each).filter(|part| part.2 > 0)
    }
}
