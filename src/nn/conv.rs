//! Convolutions as layers.

use crate::error::{Error, Result};
use crate::ops::conv::{Conv, conv1d, conv2d};
use crate::{Param, Samples, Tensor};

/// What both layers check when they are made.
fn check(layer: &'static str, rank: usize, weight: &Param, bias: Option<&Param>, conv: Conv) -> Result<()> {
    let s = weight.shape();
    if s.len() != rank || conv.groups == 0 || !s[0].is_multiple_of(conv.groups) {
        return Err(Error::shape(
            layer,
            format!(
                "weight {} {s:?}: needs {rank} dimensions, and {} groups must divide Cout",
                weight.name(),
                conv.groups
            ),
        ));
    }
    match bias {
        Some(b) if b.shape() != [s[0]] => {
            Err(Error::shape(layer, format!("bias {} is {:?}, not [{}]", b.name(), b.shape(), s[0])))
        }
        _ => Ok(()),
    }
}

macro_rules! layer {
    ($(#[$doc:meta])* $name:ident, $rank:literal, $op:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name {
            weight: Param,
            bias: Option<Param>,
            conv: Conv,
        }

        impl $name {
            /// From its parameters and the way the window slides.
            pub fn new(weight: Param, bias: Option<Param>, conv: Conv) -> Result<Self> {
                check(stringify!($name), $rank, &weight, bias.as_ref(), conv)?;
                Ok($name { weight, bias, conv })
            }
            /// The weight.
            pub fn weight(&self) -> &Param {
                &self.weight
            }
            /// The bias, if there is one.
            pub fn bias(&self) -> Option<&Param> {
                self.bias.as_ref()
            }
            /// The convolution of `x`; every image is a sample unless `samples` maps them otherwise.
            pub fn forward(&self, x: &Tensor, samples: Option<&Samples>) -> Result<Tensor> {
                $op(x, &self.weight, self.bias.as_ref(), self.conv, samples)
            }
        }
    };
}

layer! {
    /// `[B, Cin, T]` to `[B, Cout, T′]` with a weight `[Cout, Cin/groups, k]` and a bias `[Cout]`.
    Conv1d, 3, conv1d
}
layer! {
    /// `[B, Cin, H, W]` to `[B, Cout, H′, W′]` with a weight `[Cout, Cin/groups, kh, kw]` and a bias `[Cout]`.
    Conv2d, 4, conv2d
}
