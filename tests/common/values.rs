//! What is in parameters.

use prismgrad::Param;

/// The values of all these parameters, one after the other.
pub fn values(params: &[Param]) -> Vec<f64> {
    params.iter().flat_map(|p| p.value().to_f64()).collect()
}
