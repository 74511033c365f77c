// A convolutional network on 8×8 digits.
use prismgrad::data::{digits, shuffled};
use prismgrad::prelude::*;

fn main() -> Result<()> {
    let (train, test) = digits()?.shuffled(0).split(0.8);
    let params = Params::new(0, DType::F32);
    let pool = |x: &Tensor, _: &Ctx| x.max_pool2d(2);
    let model = Sequential::new()
        .then(|x: &Tensor, _: &Ctx| x.reshape(&[x.shape()[0], 1, 8, 8]))
        .then(Conv2d::builder(1, 16, 3).padding(1).build(&params.at("0"))?)
        .then(Activation::Relu)
        .then(pool)
        .then(Conv2d::builder(16, 32, 3).padding(1).build(&params.at("1"))?)
        .then(Activation::Relu)
        .then(pool)
        .then(|x: &Tensor, _: &Ctx| x.flatten(1))
        .then(Linear::new(&params.at("2"), 128, 10)?);
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(5e-3))?;
    for epoch in 0..8 {
        for batch in shuffled(train.len(), epoch).chunks(64) {
            let (x, labels) = train.tensors(batch)?;
            let losses = || cross_entropy(&model.forward(&x, &Ctx::train(epoch))?, &labels, &CrossEntropy::default());
            step.run_one(losses)?;
        }
    }
    println!("accuracy {:.4}", test.accuracy(|x| model.forward(x, &Ctx::eval()))?);
    Ok(())
}
