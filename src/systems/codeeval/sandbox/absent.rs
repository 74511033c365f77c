//! Where there is no sandbox: every way to make one is refused.

use super::{Judge, Layer, Limits, Program, Report, Verdict};
use crate::base::{Error, Result};
use std::path::Path;

/// A sandbox, which cannot be made on this system or without the feature `sandbox`.
#[derive(Clone, Debug)]
pub struct Sandbox(std::convert::Infallible);

impl Sandbox {
    /// Always an error.
    ///
    /// # Errors
    /// [`Error::Device`] with what is missing.
    pub fn new(_limits: Limits) -> Result<Sandbox> {
        Err(Error::device(
            "Sandbox",
            "generated programs run on Linux (x86-64, AArch64) with the feature `sandbox` alone; nothing else confines them here",
        ))
    }
    /// As [`Sandbox::new`].
    ///
    /// # Errors
    /// As [`Sandbox::new`].
    pub fn with_python(_python: impl AsRef<Path>, limits: Limits) -> Result<Sandbox> {
        Sandbox::new(limits)
    }
    /// Nothing holds.
    pub fn layers(&self) -> &[Layer] {
        match self.0 {}
    }
    /// No interpreter is known.
    pub fn python_version(&self) -> &str {
        match self.0 {}
    }
    /// Runs nothing.
    pub fn run(&self, _program: &Program) -> Report {
        match self.0 {}
    }
    /// Runs nothing.
    pub fn run_all(&self, _programs: &[Program]) -> Vec<Report> {
        match self.0 {}
    }
}

impl Judge for Sandbox {
    fn judge(&self, _programs: &[Program]) -> Result<Vec<Verdict>> {
        match self.0 {}
    }
}
