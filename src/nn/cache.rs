//! Keys and values of earlier positions, for generation: as many as the layer's span can still see.

use crate::Tensor;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::ops::attention::{AttentionOptions, Span};
use std::ops::Range;

/// Keys and values of the positions seen so far, for generation. A causal layer keeps all of them, a window of w positions the last w in a
/// ring, a block layer those of the current block, and a window with sinks keeps the sinks as well. Gradients do not flow into the cached
/// values.
///
/// [`KvCache::bytes`] is 2 · positions · B · H_kv · D · (bytes of an element).
#[derive(Clone, Default)]
pub struct KvCache {
    /// `[slots, B, H_kv, D]` each.
    kv: Option<[Array; 2]>,
    span: Option<Span>,
    seen: usize,
    reserve: usize,
}

/// The positions that a later query may see after `seen` positions, in order.
fn live(span: Span, seen: usize) -> [Range<usize>; 2] {
    match span {
        Span::Full | Span::Causal => [0..0, 0..seen],
        Span::Window(w) => [0..0, seen.saturating_sub(w)..seen],
        Span::Block(b) => [0..0, seen / b * b..seen],
        Span::Sinks { window, sinks } => {
            let first = sinks.min(seen);
            [0..first, seen.saturating_sub(window).max(first)..seen]
        }
    }
}

/// The slot in which position `p` is stored.
fn slot(span: Span, p: usize) -> usize {
    match span {
        Span::Full | Span::Causal => p,
        Span::Window(n) | Span::Block(n) => p % n,
        Span::Sinks { window, sinks } if p >= sinks => sinks + (p - sinks) % window,
        Span::Sinks { .. } => p,
    }
}

/// Splits positions into stretches that are contiguous in memory as well. Each is (position, slot, length).
fn runs(span: Span, positions: Range<usize>) -> Vec<(usize, usize, usize)> {
    let (mut out, mut p) = (Vec::new(), positions.start);
    while p < positions.end {
        let left = match span {
            Span::Full | Span::Causal => usize::MAX,
            Span::Window(n) | Span::Block(n) => n - p % n,
            Span::Sinks { window, sinks } if p >= sinks => window - (p - sinks) % window,
            Span::Sinks { sinks, .. } => sinks - p,
        };
        let length = left.min(positions.end - p);
        out.push((p, slot(span, p), length));
        p += length;
    }
    out
}

impl KvCache {
    /// An empty cache that allocates memory for `positions` positions at once (a million at most), or for as many as the span can see if
    /// that is less. Otherwise, and beyond that size, the memory grows by half whenever it is full.
    pub fn reserving(positions: usize) -> KvCache {
        KvCache { reserve: positions.min(1 << 20), ..KvCache::default() }
    }
    /// The number of positions held.
    pub fn len(&self) -> usize {
        self.span.map_or(0, |span| live(span, self.seen).iter().map(Range::len).sum())
    }
    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The number of positions that have been added, including those that a window or block layer no longer holds. The next position has
    /// this number.
    pub fn seen(&self) -> usize {
        self.seen
    }
    /// The size in bytes of the positions held.
    pub fn bytes(&self) -> usize {
        self.len() * self.bytes_each()
    }
    /// The size in bytes of the allocated memory.
    pub fn capacity_bytes(&self) -> usize {
        self.kv.as_ref().map_or(0, |[k, _]| k.shape()[0]) * self.bytes_each()
    }
    fn bytes_each(&self) -> usize {
        let each = |[k, _]: &[Array; 2]| 2 * k.shape()[1..].iter().product::<usize>() * k.dtype().size();
        self.kv.as_ref().map_or(0, each)
    }
    /// Refuses keys `[B, H_kv, D]` whose batch, layer or dtype differs from that of the keys held, and a different span.
    pub(crate) fn check(&self, keys: &[usize; 3], dtype: DType, span: Span) -> Result<()> {
        if let Some([held, _]) = &self.kv
            && (held.shape()[1..] != *keys || held.dtype() != dtype)
        {
            let (s, d) = (&held.shape()[1..], held.dtype());
            let message = format!(
                "keys [B, heads, width] of {keys:?} {dtype} for a cache of {s:?} {d}; a cache belongs to one layer and one batch"
            );
            return Err(Error::shape("KvCache", message));
        }
        if self.span.is_some_and(|s| s != span) {
            let message = format!("a span of {span:?} over a cache for {:?}; begin with an empty cache", self.span);
            return Err(Error::invalid("KvCache", message));
        }
        Ok(())
    }
    /// Adds the keys and values `[B, T, H_kv, D]` of new positions, and returns the keys and values that their queries attend over.
    /// `options.span` is set to the span that is valid for these.
    pub(crate) fn extend(&mut self, k: Tensor, v: Tensor, options: &mut AttentionOptions) -> Result<(Tensor, Tensor)> {
        let span = options.span;
        span.validate()?;
        let (b, t) = (k.shape()[0], k.shape()[1]);
        self.check(&[b, k.shape()[2], k.shape()[3]], k.dtype(), span)?;
        let before = self.seen;
        if before == 0 {
            self.store(span, [k.array(), v.array()], 0)?;
            return Ok((k, v));
        }
        // The slots of a ring are not in the order of positions, which matters only where scores depend on distance.
        let ordered = match span {
            Span::Window(w) => before < w,
            Span::Sinks { window, sinks } => before < window.saturating_add(sinks),
            _ => true,
        };
        if t == 1 && (ordered || !options.alibi) {
            self.store(span, [k.array(), v.array()], before)?;
            options.span = Span::Full;
            // Everything that is held, including a block that this position completes.
            let count = match span {
                Span::Block(n) => before % n + 1,
                _ => self.len(),
            };
            let part = |a: &Array| -> Result<Tensor> { Ok(Tensor::new(a.slice(0, 0..count)?.permute(&[1, 0, 2, 3])?)) };
            let [k, v] = self.kv.as_ref().ok_or_else(|| Error::invalid("KvCache", "nothing was stored"))?;
            return Ok((part(k)?, part(v)?));
        }
        let [first, rest] = live(span, before);
        options.skipped = rest.start - first.end;
        let all = [self.in_order(span, &k, 0)?, self.in_order(span, &v, 1)?];
        self.store(span, [k.array(), v.array()], before)?;
        let [k, v] = all;
        Ok((k, v))
    }
    /// The keys (`which` = 0) or values (1) held, in the order of positions, followed by the new ones: `[B, held + T, H_kv, D]`.
    fn in_order(&self, span: Span, new: &Tensor, which: usize) -> Result<Tensor> {
        let held = &self.kv.as_ref().ok_or_else(|| Error::invalid("KvCache", "an empty cache"))?[which];
        let (n, each) = (self.len(), held.shape()[1..].iter().product::<usize>());
        let mut shape = held.shape().to_vec();
        shape[0] = n + new.shape()[1];
        let mut out = Array::zeros(&shape, (held.dtype(), &held.device()));
        let mut at = 0;
        for (_, slot, length) in live(span, self.seen).into_iter().flat_map(|r| runs(span, r)) {
            out.write(at * each, &held.slice(0, slot..slot + length)?)?;
            at += length;
        }
        out.write(n * each, &new.array().permute(&[1, 0, 2, 3])?)?;
        Ok(Tensor::new(out.permute(&[1, 0, 2, 3])?))
    }
    /// Stores those of the new positions that later queries can see. `before` is the number of the first new position.
    fn store(&mut self, span: Span, new: [&Array; 2], before: usize) -> Result<()> {
        let (t, seen) = (new[0].shape()[1], before + new[0].shape()[1]);
        // A single position that completes a block is seen only by its own query, which reads it from here.
        let ranges = match span {
            Span::Block(_) if t == 1 => [0..0, before..seen],
            _ => live(span, seen),
        };
        let runs: Vec<_> = ranges.into_iter().flat_map(|r| runs(span, r.start.max(before)..r.end)).collect();
        let needed = runs.iter().map(|(_, slot, length)| slot + length).max().unwrap_or(0);
        self.grow(span, needed, new[0])?;
        let each: usize = new[0].shape()[0] * new[0].shape()[2..].iter().product::<usize>();
        if let Some(kv) = &mut self.kv {
            for (held, new) in kv.iter_mut().zip(new) {
                for (p, slot, length) in &runs {
                    let part = new.slice(1, p - before..p - before + length)?.permute(&[1, 0, 2, 3])?;
                    held.write(slot * each, &part)?;
                }
            }
        }
        (self.seen, self.span) = (seen, Some(span));
        Ok(())
    }
    /// Enlarges the memory to `needed` slots.
    fn grow(&mut self, span: Span, needed: usize, like: &Array) -> Result<()> {
        let limit = span.reach().unwrap_or(usize::MAX);
        let have = self.kv.as_ref().map_or(0, |[k, _]| k.shape()[0]);
        if self.kv.is_some() && needed <= have {
            return Ok(());
        }
        let slots = limit.min(needed.max(self.reserve).max(have + have / 2));
        let s = like.shape();
        let bigger = |old: Option<&Array>| -> Result<Array> {
            let mut new = Array::zeros(&[slots, s[0], s[2], s[3]], (like.dtype(), &like.device()));
            old.map_or(Ok(()), |old| new.write(0, old))?;
            Ok(new)
        };
        let old = self.kv.as_ref();
        let [k, v] = [bigger(old.map(|[k, _]| k))?, bigger(old.map(|[_, v]| v))?];
        self.kv = Some([k, v]);
        Ok(())
    }
}
