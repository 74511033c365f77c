//! Running one test body on every device.

use crate::Device;

/// Runs `body` on the CPU, and on the first GPU if one can be used. In a build with the feature `emulator`, it runs on the emulated device
/// instead of a GPU, with all checks on, under four schedules (one in program order, two adverse ones, and one that switches threads
/// between accesses), unless `PRISMGRAD_ON_CARD=1` selects the GPU.
pub fn on_every_device(body: impl Fn(&Device)) {
    body(&Device::Cpu);
    #[cfg(feature = "emulator")]
    if !crate::device::emulator::on_card() {
        let _one = crate::device::emulator::lock();
        let device = Device::cuda(0).expect("the emulated device is built in");
        for (seed, preempt) in [(0, 0), (1, 0), (2, 0), (3, 20)] {
            crate::device::emulator::config("seed", seed);
            crate::device::emulator::config("preempt", preempt);
            body(&device);
        }
        return;
    }
    if crate::device::cuda::driver().is_ok() {
        body(&Device::cuda(0).expect("there is a driver; unset CUDA_VISIBLE_DEVICES or install NVRTC"));
    }
}

/// Defines tests whose bodies take a device and run on all devices: see [`check::on_every_device`](crate::check::on_every_device).
///
/// ```
/// prismgrad::device_tests! {
///     /// The sum of ones.
///     fn ones_add_up(device) {
///         let x = prismgrad::Tensor::ones(&[7], (prismgrad::DType::F32, device));
///         assert_eq!(x.sum_all().unwrap().array().to_f64(), [7.0]);
///     }
/// }
/// ```
#[macro_export]
macro_rules! device_tests {
    ($($(#[$note:meta])* fn $name:ident($device:ident) $body:block)*) => {$(
        $(#[$note])*
        #[test]
        fn $name() {
            $crate::check::on_every_device(|$device: &$crate::Device| $body);
        }
    )*};
}
