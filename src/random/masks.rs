//! The source of dropout masks and other random factors during the forward pass of a private step.
//!
//! A record's mask must not depend on the other records of the batch. Masks depend on the position in the batch, so that removing one
//! record shifts the masks of the records after it. That loses no privacy as long as masks are independent of each other and secret:
//! exchanging them then changes no probability. A seed given by the caller, such as the step's number, is not secret. A private step
//! therefore combines it with a secret of its own, which is derived from the noise key and the step.

use super::philox;
use std::cell::Cell;

#[derive(Clone, Copy)]
enum Masks {
    /// Masks depend on the caller's seed alone.
    Known,
    /// Masks depend on the caller's seed and this secret.
    Secret(u64),
    /// No masks: dropout is disabled.
    Off,
}

thread_local! {
    static MASKS: Cell<Masks> = const { Cell::new(Masks::Known) };
}

/// Restores the previous state, also after a panic.
struct Scope(Masks);

impl Drop for Scope {
    fn drop(&mut self) {
        MASKS.set(self.0);
    }
}

/// Runs `f` with masks that cannot be computed without `secret`.
pub(crate) fn secret<R>(secret: u64, f: impl FnOnce() -> R) -> R {
    let _scope = Scope(MASKS.replace(Masks::Secret(secret)));
    f()
}

/// Runs `f` without dropout.
pub(crate) fn off<R>(f: impl FnOnce() -> R) -> R {
    let _scope = Scope(MASKS.replace(Masks::Off));
    f()
}

/// Whether this is the forward pass of a private step: layers then refuse operations that mix samples.
pub(crate) fn in_private_step() -> bool {
    !matches!(MASKS.get(), Masks::Known)
}

/// The seed of a mask for the caller's seed; `None` if dropout is disabled.
pub(crate) fn seed(given: u64) -> Option<u64> {
    match MASKS.get() {
        Masks::Known => Some(given),
        Masks::Secret(secret) => Some(philox::bits(secret, 0x6d61_736b, given)),
        Masks::Off => None,
    }
}
