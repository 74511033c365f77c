//! Every op and whole steps on the emulated device and on a card, beside the CPU. None of these tests launches a kernel itself but
//! those of `hardware`.
#![cfg(feature = "emulator")]

#[path = "../common"]
mod common {
    pub mod close;
    pub mod gpt;
    pub mod privacy;
    pub mod scratch;
    pub mod texts;
    pub mod tokens;
    pub mod values;
}

mod hardware;
mod registry;
mod steps;
