// A masked language model, as BERT is. The tokens are the 17 grey levels of 8×8 digits, of which a sixth is hidden and predicted.
use prismgrad::data::{Images, digits, shuffled};
use prismgrad::prelude::*;

const MASK: u32 = 17;

/// Tokens with some of them hidden, and targets in which the others are ignored.
fn batch(images: &Images, indices: &[usize], seed: u64) -> Result<(Tensor, Tensor)> {
    let levels: Vec<u32> = images.batch(indices)?.0.iter().map(|p| (p * 16.0).round() as u32).collect();
    let mut hidden = vec![false; levels.len()];
    shuffled(levels.len(), seed)[..levels.len() / 6].iter().for_each(|&i| hidden[i] = true);
    let pick = |yes: bool, other: u32| levels.iter().zip(&hidden).map(move |(&l, &h)| if h == yes { l } else { other });
    let tensor = |x: Vec<u32>| Tensor::from_slice(&x, &[indices.len(), 64]);
    Ok((tensor(pick(false, MASK).collect())?, tensor(pick(true, u32::MAX).collect())?))
}

fn main() -> Result<()> {
    let (train, test) = digits()?.shuffled(0).split(0.8);
    let params = Params::new(0, DType::F32);
    let tokens = Embedding::builder(18, 32).init(Init::Normal { std: 0.1 }).build(&params.at("tokens"))?;
    let positions = params.param("positions", &[64, 32], Init::Normal { std: 0.1 })?;
    let model = Sequential::new()
        .then(move |ids: &Tensor, ctx: &Ctx| {
            (&tokens.forward(ids, ctx)? + &positions.per_sample(ids.shape()[0])?).tensor()
        })
        .then(TransformerBlock::new(&params.at("block.0"), 32, 4)?)
        .then(TransformerBlock::new(&params.at("block.1"), 32, 4)?)
        .then(LayerNorm::new(&params.at("norm"), 32)?)
        .then(Linear::new(&params.at("head"), 32, 17)?);
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(3e-3))?;
    for epoch in 0..8 {
        for (i, indices) in shuffled(train.len(), epoch).chunks(64).enumerate() {
            let (x, hidden) = batch(&train, indices, 100 * epoch + i as u64)?;
            let losses = || cross_entropy(&model.forward(&x, &Ctx::train(epoch))?, &hidden, &CrossEntropy::default());
            step.run_one(losses)?;
        }
    }
    let (x, hidden) = batch(&test, &(0..test.len()).collect::<Vec<usize>>(), 1)?;
    let guess = no_grad(|| model.forward(&x, &Ctx::eval()))?.argmax(-1)?.array().to_f64();
    let pairs: Vec<(f64, f64)> = guess.into_iter().zip(hidden.array().to_f64()).filter(|(_, h)| *h < 17.0).collect();
    println!("accuracy {:.4}", pairs.iter().filter(|(g, h)| g == h).count() as f64 / pairs.len() as f64);
    Ok(())
}
