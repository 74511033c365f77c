// A residual network with group norm on 8×8 digits.
use prismgrad::data::{digits, shuffled};
use prismgrad::prelude::*;

fn block(params: &Params, width: usize) -> Result<impl Module + use<>> {
    let conv = |name: &str| Conv2d::builder(width, width, 3).padding(1).bias(false).build(&params.at(name));
    let inner = Sequential::new()
        .then(conv("conv1")?)
        .then(GroupNorm::new(&params.at("norm1"), 4, width)?)
        .then(Activation::Relu)
        .then(conv("conv2")?)
        .then(GroupNorm::new(&params.at("norm2"), 4, width)?);
    Ok(move |x: &Tensor, ctx: &Ctx| (x + &inner.forward(x, ctx)?).tensor()?.relu())
}

fn main() -> Result<()> {
    let (train, test) = digits()?.shuffled(0).split(0.8);
    let params = Params::new(0, DType::F32);
    let model = Sequential::new()
        .then(|x: &Tensor, _: &Ctx| x.reshape(&[x.shape()[0], 1, 8, 8]))
        .then(Conv2d::builder(1, 16, 3).padding(1).build(&params.at("stem"))?)
        .then(block(&params.at("block1"), 16)?)
        .then(block(&params.at("block2"), 16)?)
        .then(|x: &Tensor, _: &Ctx| x.max_pool2d(4)?.flatten(1))
        .then(Linear::new(&params.at("head"), 64, 10)?);
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(5e-3))?;
    for epoch in 0..5 {
        for batch in shuffled(train.len(), epoch).chunks(64) {
            let (x, labels) = train.tensors(batch)?;
            let losses = || cross_entropy(&model.forward(&x, &Ctx::train(epoch))?, &labels, &CrossEntropy::default());
            step.run_one(losses)?;
        }
    }
    println!("accuracy {:.4}", test.accuracy(|x| model.forward(x, &Ctx::eval()))?);
    Ok(())
}
