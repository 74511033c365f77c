//! Ctrl-C and SIGTERM: the first requests a clean stop, the second ends the process at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::base::{Error, Result};

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

fn stop() -> &'static Arc<AtomicBool> {
    STOP.get_or_init(Arc::default)
}

/// Handles Ctrl-C and SIGTERM from now on. It may be called more than once.
///
/// # Errors
/// [`Error::Io`] if the system does not allow the handlers.
pub fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let register = || {
        for signal in [SIGINT, SIGTERM] {
            // The order matters: at the first signal the flag is not set yet, so only the second line acts and sets it; the second signal
            // exits.
            flag::register_conditional_shutdown(signal, 128 + signal, stop().clone()).map_err(|e| e.to_string())?;
            flag::register(signal, stop().clone()).map_err(|e| e.to_string())?;
        }
        Ok(())
    };
    let installed = INSTALLED.get_or_init(register).clone();
    installed.map_err(|message| Error::io("listen for", "SIGINT and SIGTERM", std::io::Error::other(message)))
}

/// Whether a stop has been requested. The check is cheap, so make it after every step.
pub fn interrupted() -> bool {
    stop().load(Ordering::Relaxed)
}

/// Requests a clean stop from inside the program, as a signal would.
pub fn request_stop() {
    stop().store(true, Ordering::Relaxed);
}

/// Clears an earlier request, for a program that starts another run after a clean stop.
pub fn clear() {
    stop().store(false, Ordering::Relaxed);
}
