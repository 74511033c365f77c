//! Comparison of a device's results with those of the CPU.

/// Describes a value that differs by more than the tolerance times the largest absolute value of the finite wanted values (at least 1);
/// `None` if there is none. NaN agrees with NaN, and an infinity with itself.
pub fn differs(what: &str, got: &[f64], want: &[f64], tolerance: f64) -> Option<String> {
    if got.len() != want.len() {
        return Some(format!("{what}: {} values for {}", got.len(), want.len()));
    }
    let scale = want.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
    let off = |(g, w): (&f64, &f64)| match g.is_finite() && w.is_finite() {
        true => (g - w).abs() > tolerance * scale,
        false => g != w && !(g.is_nan() && w.is_nan()),
    };
    let i = got.iter().zip(want).position(off)?;
    Some(format!("{what}[{i}]: {} on the device, {} on the CPU", got[i], want[i]))
}

/// Fails if [`differs`] finds something, or if a value is NaN.
#[track_caller]
pub fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert!(!want.iter().any(|x| x.is_nan()), "{what}: NaN on the CPU");
    assert_eq!(differs(what, got, want, tolerance), None);
}
