//! Convolutions as layers.

use super::{Ctx, Init, Params};
use crate::base::{Error, Result};
use crate::ops::conv::{Conv, conv1d, conv2d};
use crate::{Param, Tensor};

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
            /// From `channels.0` to `channels.1` channels with a window of `kernel`; `conv` says how it slides. Weights
            /// start as `init`, the bias, if asked for, at zero.
            pub fn new(
                params: &Params,
                channels: (usize, usize),
                kernel: [usize; $rank],
                conv: Conv,
                bias: bool,
                init: Init,
            ) -> Result<Self> {
                let (cin, cout) = channels;
                if conv.groups == 0 || !cin.is_multiple_of(conv.groups) || !cout.is_multiple_of(conv.groups) {
                    let message = format!("{} groups do not divide {cin} and {cout} channels", conv.groups);
                    return Err(Error::invalid(stringify!($name), message));
                }
                let shape: Vec<usize> = [cout, cin / conv.groups].into_iter().chain(kernel).collect();
                Ok($name {
                    weight: params.param("weight", &shape, init)?,
                    bias: if bias { Some(params.param("bias", &[cout], Init::Zeros)?) } else { None },
                    conv,
                })
            }
            /// The weight.
            pub fn weight(&self) -> &Param {
                &self.weight
            }
            /// The bias, if there is one.
            pub fn bias(&self) -> Option<&Param> {
                self.bias.as_ref()
            }
            /// The convolution of `x`; every image is a sample unless the context maps them otherwise.
            pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
                $op(x, &self.weight, self.bias.as_ref(), self.conv, ctx.samples.as_ref())
            }
        }
    };
}

layer! {
    /// `[B, Cin, T]` to `[B, Cout, T′]` with a weight `[Cout, Cin/groups, k]` and a bias `[Cout]`.
    Conv1d, 1, conv1d
}
layer! {
    /// `[B, Cin, H, W]` to `[B, Cout, H′, W′]` with a weight `[Cout, Cin/groups, kh, kw]` and a bias `[Cout]`.
    Conv2d, 2, conv2d
}
