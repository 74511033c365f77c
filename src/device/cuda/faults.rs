//! What kernels find wrong in the data (ids out of range), told when the host next reads something: no kernel waits for
//! the host, and no host for a kernel.

use super::context::lock;
use super::{Block, Gpu, Launch};
use crate::error::{Error, Result};
use crate::tensor::{Array, DType};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

/// Kinds of checks that are told apart; later ones share the last word.
const KINDS: usize = 256;

/// The words that checks write to, and what each of them means.
#[derive(Default)]
pub(crate) struct Faults {
    /// A u64 for each kind of check: all ones while all is well, else the first position that is wrong.
    words: OnceLock<Block>,
    kinds: Mutex<Vec<String>>,
    /// Checks have been queued since the words were last read.
    pending: AtomicBool,
}

impl Gpu {
    /// The words, made at the first call.
    pub(crate) fn fault_words(self: &Arc<Self>) -> Result<&Block> {
        if let Some(words) = self.faults.words.get() {
            return Ok(words);
        }
        self.refuse_in_capture("check ids for the first time")?;
        let words = self.alloc(8 * KINDS)?;
        self.fill(&words, 0, 8 * KINDS, 0xff)?;
        Ok(self.faults.words.get_or_init(|| words))
    }
    /// The word of a kind of check. Whoever asks is about to queue one.
    fn fault_word(self: &Arc<Self>, kind: &str) -> Result<(&Block, usize)> {
        let words = self.fault_words()?;
        let mut kinds = lock(&self.faults.kinds);
        let at = kinds.iter().position(|k| k == kind).unwrap_or_else(|| {
            if kinds.len() < KINDS {
                kinds.push(kind.to_string());
            }
            kinds.len() - 1
        });
        self.faults.pending.store(true, Relaxed);
        Ok((words, 8 * at))
    }

    /// A recorded step may hold checks.
    pub(crate) fn expect_faults(&self) {
        self.faults.pending.store(true, Relaxed);
    }

    /// Reads the words if checks have been queued; an error names the first one that failed. Waits: to be called where
    /// the host waits anyway.
    pub(crate) fn tell_faults(&self) -> Result<()> {
        let Some(words) = self.faults.words.get() else { return Ok(()) };
        if !self.faults.pending.swap(false, Relaxed) {
            return Ok(());
        }
        let found: Vec<u64> = self.download(words, 0, KINDS)?;
        let kinds = lock(&self.faults.kinds);
        let Some((kind, position)) = kinds.iter().zip(&found).find(|(_, p)| **p != u64::MAX) else { return Ok(()) };
        self.fill(words, 0, 8 * KINDS, 0xff)?;
        Err(Error::invalid("ids", format!("the id at position {position} is outside {kind} (it was read as 0)")))
    }
}

/// Ids (u32 or i64, on the GPU) as u32 below `below`; one outside is read as 0, and told when the host next reads
/// something. `what` names the thing they point into.
pub(crate) fn ids_below(gpu: &Arc<Gpu>, ids: &Array, below: usize, what: &str) -> Result<Array> {
    let ids = ids.contiguous();
    let name = match ids.dtype() {
        DType::U32 => "ids_u32",
        DType::I64 => "ids_i64",
        other => {
            return Err(Error::dtype("ids", format!("indices must be u32 or i64, got {other}; cast them first")));
        }
    };
    let out = Array::uninit_on(gpu, ids.shape(), DType::U32)?;
    let n = ids.numel();
    let (words, at) = gpu.fault_word(&format!("{what}: ids must be in 0..{below}"))?;
    let l = Launch::new(gpu, "move", name)?.grid(n.div_ceil(1024), 1, 1).array(&ids).array(&out);
    l.val(n as i64).val(below as i64).buf(words, at).run()?;
    Ok(out)
}
