//! The values of parameters.

use prismgrad::Param;

/// The values of all these parameters, joined in order.
pub fn values(params: &[Param]) -> Vec<f64> {
    params.iter().flat_map(|p| p.value().to_f64()).collect()
}
