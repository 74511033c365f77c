//! CUDA: whether there is a driver. The kernels are not there yet; everything runs on the CPU.

/// Whether the NVIDIA driver library can be loaded. Never panics, with or without one.
pub fn driver_present() -> bool {
    // SAFETY: opens and closes the library, calls nothing in it.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn asking_for_a_driver_is_safe_without_one() {
        assert_eq!(super::driver_present(), super::driver_present());
    }
}
