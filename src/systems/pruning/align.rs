//! Alignment of the hidden units of experts, and averages of experts.

use super::assign;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::nn::{ExpertKind, Moe};
use crate::{Param, Tensor};

/// The parameters of a layer's experts, each with the dimension of one expert's part that counts the hidden units, if it has one.
pub(super) fn parts(moe: &Moe) -> Result<Vec<(Param, Option<usize>)>> {
    let names: &[(&str, Option<usize>)] = match moe.config().expert {
        ExpertKind::Mlp(_) => {
            &[("c_fc.weight", Some(1)), ("c_fc.bias", Some(0)), ("c_proj.weight", Some(0)), ("c_proj.bias", None)]
        }
        ExpertKind::SwiGlu => {
            &[("gate_proj.weight", Some(0)), ("up_proj.weight", Some(0)), ("down_proj.weight", Some(1))]
        }
    };
    let experts = moe.params().at("experts");
    names
        .iter()
        .map(|&(name, dim)| {
            let p = experts.get(name).filter(|p| p.shape()[0] == moe.config().experts && !p.placed());
            p.map(|p| (p, dim)).ok_or_else(|| {
                let message = format!("{} has no {name} of all experts; are they on several ranks?", experts.prefix());
                Error::invalid("pruning", message)
            })
        })
        .collect()
}

/// One expert's part of a parameter.
pub(super) fn part(p: &Param, expert: usize) -> Result<Array> {
    p.value().to(&crate::Device::Cpu)?.slice(0, expert..expert + 1)?.squeeze(0)
}

/// The weights into and out of each hidden unit of an expert, biases included, `[hidden, features]` f64.
fn units(moe: &Moe, expert: usize) -> Result<Tensor> {
    let mut all = Vec::new();
    for (p, dim) in parts(moe)? {
        let (Some(dim), value) = (dim, part(&p, expert)?.cast(DType::F64)) else { continue };
        let value = if dim == 1 { value.transpose(0, 1)? } else { value };
        let wide = if value.rank() == 1 { value.unsqueeze(1)? } else { value };
        all.push(Tensor::new(wide.contiguous()));
    }
    Tensor::concat(&all.iter().collect::<Vec<_>>(), 1)
}

/// For each hidden unit of expert `anchor`, the matching unit of expert `other`: the permutation that maximises the sum of inner products
/// of all weights into and out of the units, biases included. SwiGLU's three matrices are summed.
///
/// It costs 2·hidden²·features FLOPs and O(hidden³) for the assignment, in f64: 0.1 s for 384 units, minutes for 4,096.
pub fn alignment(moe: &Moe, anchor: usize, other: usize) -> Result<Vec<u32>> {
    let experts = moe.config().experts;
    if let Some(e) = [anchor, other].into_iter().find(|&e| e >= experts) {
        return Err(Error::invalid("alignment", format!("expert {e} of {experts}")));
    }
    let gains = units(moe, anchor)?.matmul(&units(moe, other)?.transpose(0, 1)?)?.array().to_f64();
    let costs: Vec<f64> = gains.into_iter().map(|g| -g).collect();
    Ok(assign(&costs, moe.config().hidden)?.columns.into_iter().map(|c| c as u32).collect())
}

/// The weighted sum of several experts' parts of a parameter, in f64. Each expert's hidden units are first reordered by its permutation.
pub(super) fn merged(p: &Param, dim: Option<usize>, members: &[(usize, f64, Option<&[u32]>)]) -> Result<Vec<f64>> {
    let shape = &p.shape()[1..];
    let mut sum = vec![0f64; shape.iter().product()];
    for &(expert, weight, order) in members {
        let value = part(p, expert)?.to_f64();
        let (rows, columns) = match shape {
            [n] => (*n, 1),
            [rows, columns] => (*rows, *columns),
            _ => return Err(Error::shape("pruning", format!("{} is {:?}", p.name(), p.shape()))),
        };
        for r in 0..rows {
            for c in 0..columns {
                let from = match (dim, order) {
                    (Some(0), Some(order)) => order[r] as usize * columns + c,
                    (Some(_), Some(order)) => r * columns + order[c] as usize,
                    _ => r * columns + c,
                };
                sum[r * columns + c] += weight * value[from];
            }
        }
    }
    Ok(sum)
}
