//! What kernels find wrong in the data (ids out of range), reported when the host next reads something: no kernel waits for
//! the host, and no host for a kernel.

use super::context::lock;
use super::{Block, Gpu};
use crate::base::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

/// Kinds of checks that are told apart; later ones share the last word.
const KINDS: usize = 256;

/// The words that checks write to, and what each of them means.
#[derive(Default)]
pub(crate) struct DeferredErrors {
    /// A u64 for each kind of check: all ones while all is well, else the first position that is wrong.
    words: OnceLock<Block>,
    kinds: Mutex<Vec<String>>,
    /// Checks have been queued since the words were last read.
    pending: AtomicBool,
}

impl Gpu {
    /// The words, made at the first call.
    pub(crate) fn deferred_words(self: &Arc<Self>) -> Result<&Block> {
        if let Some(words) = self.deferred.words.get() {
            return Ok(words);
        }
        self.refuse_in_capture("check ids for the first time")?;
        let words = self.alloc(8 * KINDS)?;
        self.fill(&words, 0, 8 * KINDS, 0xff)?;
        Ok(self.deferred.words.get_or_init(|| words))
    }
    /// The word of a kind of check. The caller queues one next.
    pub(crate) fn deferred_word(self: &Arc<Self>, kind: &str) -> Result<(&Block, usize)> {
        let words = self.deferred_words()?;
        let mut kinds = lock(&self.deferred.kinds);
        let at = kinds.iter().position(|k| k == kind).unwrap_or_else(|| {
            if kinds.len() < KINDS {
                kinds.push(kind.to_string());
            }
            kinds.len() - 1
        });
        self.deferred.pending.store(true, Relaxed);
        Ok((words, 8 * at))
    }

    /// A recorded step may hold checks.
    pub(crate) fn expect_deferred_errors(&self) {
        self.deferred.pending.store(true, Relaxed);
    }

    /// Reads the words if checks have been queued; an error names the first one that failed. Waits: to be called where
    /// the host waits anyway.
    pub(crate) fn report_deferred_errors(&self) -> Result<()> {
        let Some(words) = self.deferred.words.get() else { return Ok(()) };
        if !self.deferred.pending.swap(false, Relaxed) {
            return Ok(());
        }
        let found: Vec<u64> = self.download(words, 0, KINDS)?;
        let kinds = lock(&self.deferred.kinds);
        let Some((kind, position)) = kinds.iter().zip(&found).find(|(_, p)| **p != u64::MAX) else { return Ok(()) };
        self.fill(words, 0, 8 * KINDS, 0xff)?;
        Err(Error::invalid("ids", format!("the id at position {position} is outside {kind} (it was read as 0)")))
    }
}
