//! Launches of `cuda/route.cu`. Nothing is read back.

use super::{Choice, Gate};
use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::autograd::Owners;
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch, layouts};
use std::sync::Arc;

/// The choice as a kernel argument.
fn shape(c: &Choice, x: &Array) -> layouts::RouteShape {
    layouts::RouteShape {
        tokens: x.shape()[0] as i64,
        experts: x.shape()[1] as i64,
        k: c.top_k as i64,
        sigmoid: (c.gate == Gate::Sigmoid) as i32,
        renormalise: c.renormalise as i32,
    }
}

/// Choices `[T, k]` u32 and their weights from logits `x [T, E]` (f32 or f64).
pub(crate) fn choose(gpu: &Arc<Gpu>, x: &Array, bias: Option<&Array>, c: &Choice) -> Result<(Array, Array)> {
    let of = [x.shape()[0], c.top_k];
    let (choices, weights) = (Array::uninit_on(gpu, &of, DType::U32)?, Array::uninit_on(gpu, &of, x.dtype())?);
    let l = Launch::new(gpu, "route", &format!("route_{}", suffix(x.dtype())))?.grid(of[0].div_ceil(8), 1, 1);
    l.array(x).optional(bias).array(&choices).array(&weights).val(shape(c, x)).run()?;
    Ok((choices, weights))
}

/// The gradient of the logits from the gradient of the weights.
pub(crate) fn choose_back(gpu: &Arc<Gpu>, x: &Array, c: &Choice, choices: &Array, g: &Array) -> Result<Array> {
    let dx = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let l = Launch::new(gpu, "route", &format!("route_grad_{}", suffix(x.dtype())))?;
    let l = l.grid(x.shape()[0].div_ceil(8), 1, 1);
    l.array(x).array(choices).array(g).array(&dx).val(shape(c, x)).run()?;
    Ok(dx)
}

/// From the pairs sorted by expert: the token of each row, and the row of each pair `[T, k]`.
pub(crate) fn places(gpu: &Arc<Gpu>, order: &Array, (tokens, k): (usize, usize)) -> Result<(Array, Array)> {
    let n = tokens * k;
    let (token, place) = (Array::uninit_on(gpu, &[n], DType::U32)?, Array::uninit_on(gpu, &[tokens, k], DType::U32)?);
    let l = Launch::new(gpu, "route", "route_places")?.grid(n.div_ceil(256), 1, 1);
    l.array(order).array(&token).array(&place).val(n as i64).val(k as i64).run()?;
    Ok((token, place))
}

/// The owner of each row, and the start of each sample among the rows sorted by owner; `old` is the map of the tokens.
pub(crate) fn owners(gpu: &Arc<Gpu>, token: &Array, old: &Owners, k: usize) -> Result<(Array, Array)> {
    let n = token.numel();
    let (owner, offsets) =
        (Array::uninit_on(gpu, &[n], DType::U32)?, Array::uninit_on(gpu, &[old.count + 1], DType::I64)?);
    let l = Launch::new(gpu, "route", "route_owners")?.grid(n.max(old.count + 1).div_ceil(256), 1, 1);
    let l = l.array(token).optional(old.owner.as_ref()).optional(old.offsets.as_ref()).array(&owner).array(&offsets);
    l.val(n as i64).val(old.count as i64).val(old.each as i64).val(k as i64).run()?;
    Ok((owner, offsets))
}

/// Number of choices by sample and expert: `[B, E]` f32.
pub(crate) fn load(gpu: &Arc<Gpu>, choices: &Array, o: &Owners, (b, e): (usize, usize)) -> Result<Array> {
    let out = Array::uninit_on(gpu, &[b, e], DType::F32)?;
    let l = Launch::new(gpu, "route", "route_load")?.grid(b * e, 1, 1);
    let l = l.array(choices).optional(o.offsets.as_ref()).optional(o.order.as_ref()).array(&out);
    l.val((b * e) as i64).val(e as i64).val(o.each as i64).val(choices.shape()[1] as i64).run()?;
    Ok(out)
}

/// 1 for each choice among the first `capacity` rows of its expert, otherwise 0.
pub(crate) fn within(
    gpu: &Arc<Gpu>,
    choices: &Array,
    place: &Array,
    offsets: &Array,
    capacity: usize,
) -> Result<Array> {
    let out = Array::uninit_on(gpu, choices.shape(), DType::F32)?;
    let n = out.numel();
    let l = Launch::new(gpu, "route", "route_within")?.grid(n.div_ceil(256), 1, 1);
    l.array(choices).array(place).array(offsets).array(&out).val(n as i64).val(capacity as i64).run()?;
    Ok(out)
}
