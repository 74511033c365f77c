//! The sandbox of systems that have none: its constructors return an error.

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
    /// [`Error::Device`] that names what is missing.
    pub fn new(_limits: Limits) -> Result<Sandbox> {
        Err(Error::device(
            "Sandbox",
            "generated programs run on Linux (x86-64, AArch64) with the feature `sandbox` alone; nothing else confines them here",
        ))
    }
    /// The same as [`Sandbox::new`].
    ///
    /// # Errors
    /// Those of [`Sandbox::new`].
    pub fn with_python(_python: impl AsRef<Path>, limits: Limits) -> Result<Sandbox> {
        Sandbox::new(limits)
    }
    /// Never called: no sandbox exists.
    pub fn layers(&self) -> &[Layer] {
        match self.0 {}
    }
    /// Never called: no sandbox exists.
    pub fn python_version(&self) -> &str {
        match self.0 {}
    }
    /// Never called: no sandbox exists.
    pub fn run(&self, _program: &Program) -> Report {
        match self.0 {}
    }
    /// Never called: no sandbox exists.
    pub fn run_all(&self, _programs: &[Program]) -> Vec<Report> {
        match self.0 {}
    }
}

impl Judge for Sandbox {
    fn judge(&self, _programs: &[Program]) -> Result<Vec<Verdict>> {
        match self.0 {}
    }
}
