//! How far two lists of numbers are apart.

/// The largest absolute difference; infinite where anything is NaN. Lists of different lengths are not compared.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    apart.fold(0.0, |m, x| if x.is_nan() { f64::INFINITY } else { m.max(x) })
}
