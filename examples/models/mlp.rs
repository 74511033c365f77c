// A multilayer perceptron on 8×8 digits.
use prismgrad::data::{digits, shuffled};
use prismgrad::prelude::*;

fn main() -> Result<()> {
    let (train, test) = digits()?.shuffled(0).split(0.8);
    let params = Params::new(0, DType::F32);
    let model = Sequential::new()
        .then(Linear::new(&params.at("0"), 64, 64)?)
        .then(Activation::Relu)
        .then(Linear::new(&params.at("1"), 64, 32)?)
        .then(Activation::Relu)
        .then(Linear::new(&params.at("2"), 32, 10)?);
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(5e-3))?;
    for epoch in 0..15 {
        for batch in shuffled(train.len(), epoch).chunks(64) {
            let (x, labels) = train.tensors(batch)?;
            let losses = || cross_entropy(&model.forward(&x, &Ctx::train(epoch))?, &labels, &CrossEntropy::default());
            step.run_one(losses)?;
        }
    }
    println!("accuracy {:.4}", test.accuracy(|x| model.forward(x, &Ctx::eval()))?);
    Ok(())
}
