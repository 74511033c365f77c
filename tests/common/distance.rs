//! The distance between two lists of numbers.

/// The largest absolute difference; infinite if a value is NaN. The lists must have the same length.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, |m, x| if x.is_nan() { f64::INFINITY } else { m.max(x) })
}
