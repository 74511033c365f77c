//! Where the masks of dropout, and other random factors, come from while a private step runs its forward pass.
//!
//! A record's mask must not depend on who else is in the batch. Masks follow the place in the batch, so that taking one record out
//! gives the others the masks of their neighbours; that is no loss of privacy as long as masks are independent of each other and
//! nobody knows them: exchanging them changes no probability. A seed that the caller gives is known, such as the step's number. A
//! private step therefore mixes it with a secret of its own, which follows from the noise key and the step.

use super::philox;
use std::cell::Cell;

#[derive(Clone, Copy)]
enum Masks {
    /// Of the caller's seed alone.
    Known,
    /// Of the caller's seed and this.
    Secret(u64),
    /// None: nothing is random.
    Off,
}

thread_local! {
    static MASKS: Cell<Masks> = const { Cell::new(Masks::Known) };
}

/// Puts back what was there before, also after a panic.
struct Scope(Masks);

impl Drop for Scope {
    fn drop(&mut self) {
        MASKS.set(self.0);
    }
}

/// Runs `f` with masks that nobody knows without `secret`.
pub(crate) fn secret<R>(secret: u64, f: impl FnOnce() -> R) -> R {
    let _scope = Scope(MASKS.replace(Masks::Secret(secret)));
    f()
}

/// Runs `f` without dropout.
pub(crate) fn off<R>(f: impl FnOnce() -> R) -> R {
    let _scope = Scope(MASKS.replace(Masks::Off));
    f()
}

/// Whether this is the forward pass of a private step: layers then refuse what mixes samples.
pub(crate) fn in_private_step() -> bool {
    !matches!(MASKS.get(), Masks::Known)
}

/// The seed of a mask for the caller's seed; `None` where there is to be no dropout.
pub(crate) fn seed(given: u64) -> Option<u64> {
    match MASKS.get() {
        Masks::Known => Some(given),
        Masks::Secret(secret) => Some(philox::bits(secret, 0x6d61_736b, given)),
        Masks::Off => None,
    }
}
