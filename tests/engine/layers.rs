//! How layers are made: defaults, options, and what construction refuses.

use prismgrad::nn::{Conv2d, Ctx, Dropout, Embedding, EmbeddingBag, GroupNorm, Init, LayerNorm, Linear, Mlp};
use prismgrad::nn::{Module, MultiHeadAttention, Params, RmsNorm, Sequential, TransformerBlock};
use prismgrad::ops::embedding::BagMode;
use prismgrad::ops::linear::Layout;
use prismgrad::ops::segment::Segments;
use prismgrad::{Array, DType, Param, Tensor};

fn params() -> Params {
    Params::new(0, DType::F32)
}

/// The largest absolute value of a parameter.
fn largest(p: &Param) -> f64 {
    p.value().to_f64().iter().fold(0.0, |m, x| m.max(x.abs()))
}

#[test]
fn the_fan_in_is_the_number_of_inputs_whatever_the_layout() {
    let p = params();
    for layout in [Layout::OutIn, Layout::InOut] {
        let layer = Linear::builder(400, 10).layout(layout).build(&p.at(&format!("{layout:?}"))).unwrap();
        let bound = largest(layer.weight());
        assert!(bound > 0.049 && bound <= 0.05, "{layout:?}: {bound}, not 1/√400");
    }
    Mlp::new(&p.at("mlp"), 400, 10).unwrap();
    let bound = largest(&p.get("mlp.c_fc.weight").unwrap());
    assert!(bound > 0.049 && bound <= 0.05, "{bound}");
    let conv = Conv2d::new(&p.at("conv"), 4, 8, 5).unwrap();
    let bound = largest(conv.weight());
    assert!(bound > 0.099 && bound <= 0.1, "{bound}, not 1/√(4·25)");
    let experts = p.param_with_fan_in("experts", &[3, 10, 400], Init::KaimingUniform, 400).unwrap();
    let bound = largest(&experts);
    assert!(bound > 0.049 && bound <= 0.05, "{bound}");
}

#[test]
fn defaults_have_a_bias_and_options_take_it_away() {
    let p = params();
    let names = |p: &Params| p.all().iter().map(|q| format!("{} {:?}", q.name(), q.shape())).collect::<Vec<_>>();
    Linear::new(&p.at("a"), 3, 2).unwrap();
    Linear::builder(3, 2).bias(false).layout(Layout::InOut).build(&p.at("b")).unwrap();
    Conv2d::builder(4, 6, [3, 1]).groups(2).bias(false).build(&p.at("c")).unwrap();
    LayerNorm::builder(4).bias(false).build(&p.at("d")).unwrap();
    RmsNorm::new(&p.at("e"), 4).unwrap();
    let want =
        ["a.weight [2, 3]", "a.bias [2]", "b.weight [3, 2]", "c.weight [6, 2, 3, 1]", "d.weight [4]", "e.weight [4]"];
    assert_eq!(names(&p), want);
    let again = Linear::new(&p.at("a"), 3, 2).err().unwrap().to_string();
    assert!(again.contains("a.weight exists already"), "{again}");
}

#[test]
fn a_mistake_is_noticed_at_construction() {
    let p = params();
    let swapped = GroupNorm::new(&p.at("a"), 16, 4).err().unwrap().to_string();
    assert!(
        swapped.contains("4 channels do not divide into 16 groups") && swapped.contains("(groups, channels)"),
        "{swapped}"
    );
    GroupNorm::new(&p.at("a"), 4, 16).unwrap();
    let heads = MultiHeadAttention::new(&p.at("b"), 10, 3).err().unwrap().to_string();
    assert!(heads.contains("width 10 does not divide into 3 heads"), "{heads}");
    let dropout = TransformerBlock::builder(8, 2).attn_dropout(1.0).build(&p.at("c")).err().unwrap().to_string();
    assert!(dropout.contains("[0, 1)"), "{dropout}");
    assert!(Dropout::new(&p.at("d"), -0.1).is_err());
    let groups = Conv2d::builder(3, 4, 3).groups(2).build(&p.at("e")).err().unwrap().to_string();
    assert!(groups.contains("2 groups do not divide 3 and 4 channels"), "{groups}");
    let padding = Embedding::builder(5, 2).padding(5).build(&p.at("f")).err().unwrap().to_string();
    assert!(padding.contains("padding id 5"), "{padding}");
    Embedding::new(&p.at("f"), 5, 2).unwrap();
    let flat = Embedding::tied(Param::new("w", Array::zeros(&[5], DType::F32))).err().unwrap().to_string();
    assert!(flat.contains("[rows, size]"), "{flat}");
}

#[test]
fn embeddings() {
    let (p, ctx) = (params(), Ctx::eval());
    let table = Embedding::builder(5, 2).padding(1).build(&p.at("a")).unwrap();
    let weight = table.weight().value().to_f64();
    assert!(weight[2..4] == [0.0; 2] && weight[..2] != [0.0; 2], "{weight:?}");
    let ids = Tensor::from_slice(&[0i64, 1, 1, 4], &[2, 2]).unwrap();
    // The padding's row is 0 and has no gradient, although the losses depend on what it is.
    let y = table.forward(&ids, &ctx).unwrap().add_scalar(1.0).unwrap();
    let grads = y.square().unwrap().sum(&[1, 2], false).unwrap().backward().unwrap();
    let g = grads.param(table.weight()).unwrap().sum().unwrap().to_f64();
    assert!(g[2..4] == [0.0; 2] && g[..2].iter().all(|g| *g != 0.0), "{g:?}");
    // A tied table is the same parameter.
    let head = Linear::builder(2, 5).bias(false).build(&p.at("head")).unwrap();
    let tied = Embedding::tied(head.weight().clone()).unwrap();
    assert_eq!(tied.weight(), head.weight());
    // Bags of one length, and the same as bags of any length.
    let bags = EmbeddingBag::builder(5, 2).mode(BagMode::Sum).build(&p.at("bags")).unwrap();
    let y = bags.forward(&ids, &ctx).unwrap().array().to_f64();
    let flat = ids.reshape(&[4]).unwrap();
    let z = bags.forward_bags(&flat, &Segments::lengths(&[2, 2]), None, &ctx).unwrap().array().to_f64();
    assert_eq!(y, z);
    let shape = bags.forward(&flat, &ctx).err().unwrap().to_string();
    assert!(shape.contains("forward_bags"), "{shape}");
}

#[test]
fn the_dtype_of_activations_reaches_layers_outside_a_model() {
    let (p, ctx) = (params(), Ctx::eval().with_dtype(DType::BF16));
    let x = Tensor::zeros(&[2, 3], DType::F32);
    assert_eq!(Linear::new(&p.at("a"), 3, 4).unwrap().forward(&x, &ctx).unwrap().dtype(), DType::BF16);
    let ids = Tensor::zeros(&[2, 3], DType::U32);
    assert_eq!(Embedding::new(&p.at("b"), 3, 4).unwrap().forward(&ids, &ctx).unwrap().dtype(), DType::BF16);
    let image = Tensor::zeros(&[2, 3, 4, 4], DType::F32);
    assert_eq!(Conv2d::new(&p.at("c"), 3, 4, 3).unwrap().forward(&image, &ctx).unwrap().dtype(), DType::BF16);
}

/// Models go to other threads, and are used by several.
#[test]
fn models_are_sent_to_other_threads() {
    let p = params();
    let layer = Linear::new(&p.at("a"), 4, 3).unwrap();
    let model = Sequential::new().then(layer).then(|x: &Tensor, _: &Ctx| x.square());
    let x = Tensor::full(&[2, 4], 0.5, DType::F32);
    let here = model.forward(&x, &Ctx::eval()).unwrap().array().to_f64();
    let there = std::thread::spawn(move || model.forward(&x, &Ctx::eval()).unwrap().array().to_f64()).join().unwrap();
    assert_eq!(here, there);
}
