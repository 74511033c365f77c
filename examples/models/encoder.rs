// A transformer encoder that reads 8×8 digits as sequences of eight rows.
use prismgrad::data::{digits, shuffled};
use prismgrad::prelude::*;

fn main() -> Result<()> {
    let (train, test) = digits()?.shuffled(0).split(0.8);
    let params = Params::new(0, DType::F32);
    let embed = Linear::new(&params.at("embed"), 8, 32)?;
    let positions = params.param("positions", &[8, 32], Init::Normal { std: 0.1 })?;
    let model = Sequential::new()
        .then(move |x: &Tensor, ctx: &Ctx| {
            let rows = embed.forward(&x.reshape(&[x.shape()[0], 8, 8])?, ctx)?;
            (&rows + &positions.per_sample(x.shape()[0])?).tensor()
        })
        .then(TransformerBlock::new(&params.at("block.0"), 32, 4)?)
        .then(TransformerBlock::new(&params.at("block.1"), 32, 4)?)
        .then(LayerNorm::new(&params.at("norm"), 32)?)
        .then(|x: &Tensor, _: &Ctx| x.mean(&[1], false))
        .then(Linear::new(&params.at("head"), 32, 10)?);
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(3e-3))?;
    for epoch in 0..12 {
        for batch in shuffled(train.len(), epoch).chunks(64) {
            let (x, labels) = train.tensors(batch)?;
            let losses = || cross_entropy(&model.forward(&x, &Ctx::train(epoch))?, &labels, &CrossEntropy::default());
            step.run_one(losses)?;
        }
    }
    println!("accuracy {:.4}", test.accuracy(|x| model.forward(x, &Ctx::eval()))?);
    Ok(())
}
