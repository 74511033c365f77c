//! Errors in the data that kernels find (ids out of range). They are reported when the host next reads from the device, so that neither the
//! kernels nor the host waits for the other.

use super::context::lock;
use super::{Block, Gpu};
use crate::base::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

/// Number of kinds of checks that are told apart; any beyond share the last word.
const KINDS: usize = 256;

/// The device words to which checks write, and the meaning of each.
#[derive(Default)]
pub(crate) struct DeferredErrors {
    /// One u64 per kind of check: all ones as long as every check passed, else the first position that failed.
    words: OnceLock<Block>,
    kinds: Mutex<Vec<String>>,
    /// Whether checks have been queued since the words were last read.
    pending: AtomicBool,
}

impl Gpu {
    /// The words, allocated at the first call.
    pub(crate) fn deferred_words(self: &Arc<Self>) -> Result<&Block> {
        if let Some(words) = self.deferred.words.get() {
            return Ok(words);
        }
        self.refuse_in_capture("check ids for the first time")?;
        let words = self.alloc(8 * KINDS)?;
        self.fill(&words, 0, 8 * KINDS, 0xff)?;
        Ok(self.deferred.words.get_or_init(|| words))
    }
    /// The word of a kind of check. The caller queues such a check next.
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

    /// Called for a replay of a captured step, which may contain checks.
    pub(crate) fn expect_deferred_errors(&self) {
        self.deferred.pending.store(true, Relaxed);
    }

    /// Reads the words if checks have been queued; the error names the first one that failed. It waits for the device, so it is called only
    /// where the host waits anyway.
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
