//! Convolutions as layers.

use super::{Ctx, Init, Params};
use crate::base::{Error, Result};
use crate::ops::conv::{Conv, Sides, conv1d, conv2d};
use crate::{Param, Tensor};

macro_rules! layer {
    ($(#[$doc:meta])* $name:ident, $builder:ident, $rank:literal, $op:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name {
            weight: Param,
            bias: Option<Param>,
            conv: Conv,
        }

        #[doc = concat!("Options of a [`", stringify!($name), "`], from [`", stringify!($name), "::builder`].")]
        #[derive(Clone, Copy, Debug)]
        pub struct $builder {
            channels: (usize, usize),
            kernel: [usize; $rank],
            conv: Conv,
            bias: bool,
            init: Init,
        }

        impl $builder {
            setters! {
                /// Whether the layer adds a bias, which starts at zero. The default is `true`.
                bias: bool,
                /// Initial values of the weight; [`Init::KaimingUniform`] if not given.
                init: Init,
            }
            /// Step between neighbouring windows; 1 if not given.
            pub fn stride(mut self, stride: impl Into<Sides<$rank>>) -> Self {
                self.conv.stride = stride.into().pair(1);
                self
            }
            /// Number of zeros added before and after; none if not given.
            pub fn padding(mut self, padding: impl Into<Sides<$rank>>) -> Self {
                self.conv.padding = padding.into().pair(0);
                self
            }
            /// Step between the elements of a window; 1 if not given.
            pub fn dilation(mut self, dilation: impl Into<Sides<$rank>>) -> Self {
                self.conv.dilation = dilation.into().pair(1);
                self
            }
            /// The number of groups of channels, each of which is convolved by itself; 1 if not given.
            pub fn groups(mut self, groups: usize) -> Self {
                self.conv.groups = groups;
                self
            }
            /// Makes the layer, with the parameters `weight` and `bias`. Fails if these names are taken in `params`, or if the groups do
            /// not divide both numbers of channels.
            pub fn build(self, params: &Params) -> Result<$name> {
                params.whole(|params| {
                    let ((cin, cout), conv) = (self.channels, self.conv);
                    if conv.groups == 0 || !cin.is_multiple_of(conv.groups) || !cout.is_multiple_of(conv.groups) {
                        let message = format!("{} groups do not divide {cin} and {cout} channels", conv.groups);
                        return Err(Error::invalid(stringify!($name), message));
                    }
                    let shape: Vec<usize> = [cout, cin / conv.groups].into_iter().chain(self.kernel).collect();
                    Ok($name {
                        weight: params.param("weight", &shape, self.init)?,
                        bias: if self.bias { Some(params.param("bias", &[cout], Init::Zeros)?) } else { None },
                        conv,
                    })
                })
            }
        }

        impl $name {
            /// A layer from `cin` to `cout` channels with a window of `kernel` that moves by 1, without padding, with a bias. Fails if the
            /// names `weight` and `bias` are taken in `params`.
            pub fn new(params: &Params, cin: usize, cout: usize, kernel: impl Into<Sides<$rank>>) -> Result<Self> {
                $name::builder(cin, cout, kernel).build(params)
            }
            /// Options for a layer from `cin` to `cout` channels with a window of `kernel`.
            pub fn builder(cin: usize, cout: usize, kernel: impl Into<Sides<$rank>>) -> $builder {
                let (kernel, conv) = (kernel.into().0, Conv::default());
                $builder { channels: (cin, cout), kernel, conv, bias: true, init: Init::KaimingUniform }
            }
            /// The weight.
            pub fn weight(&self) -> &Param {
                &self.weight
            }
            /// The bias, if there is one.
            pub fn bias(&self) -> Option<&Param> {
                self.bias.as_ref()
            }
            /// The convolution of `x`; each entry of dimension 0 is a sample unless the context maps them otherwise.
            pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
                $op(&ctx.activations(x)?, &self.weight, self.bias.as_ref(), self.conv, ctx.samples.as_ref())
            }
        }
    };
}

layer! {
    /// `[B, Cin, T]` to `[B, Cout, T′]` with a weight `[Cout, Cin/groups, k]` and a bias `[Cout]`.
    Conv1d, Conv1dBuilder, 1, conv1d
}
layer! {
    /// `[B, Cin, H, W]` to `[B, Cout, H′, W′]` with a weight `[Cout, Cin/groups, kh, kw]` and a bias `[Cout]`.
    ///
    /// ```
    /// use prismgrad::nn::{Conv2d, Ctx, Params};
    /// use prismgrad::{DType, Tensor};
    /// # fn main() -> prismgrad::Result<()> {
    /// let params = Params::new(0, DType::F32);
    /// let conv = Conv2d::builder(3, 16, 3).padding(1).stride([2, 1]).build(&params.at("conv"))?;
    /// let y = conv.forward(&Tensor::zeros(&[4, 3, 8, 8], DType::F32), &Ctx::eval())?;
    /// assert_eq!(y.shape(), [4, 16, 4, 8]);
    /// # Ok(()) }
    /// ```
    Conv2d, Conv2dBuilder, 2, conv2d
}
