//! Devices.
#![allow(missing_docs)]
pub mod cpu;
