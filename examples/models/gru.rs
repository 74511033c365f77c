// A gated recurrent unit that reads 8×8 digits row by row.
use prismgrad::data::{digits, shuffled};
use prismgrad::prelude::*;

fn main() -> Result<()> {
    let (train, test) = digits()?.shuffled(0).split(0.8);
    let params = Params::new(0, DType::F32);
    let (read, keep) = (Linear::new(&params.at("ih"), 8, 96)?, Linear::new(&params.at("hh"), 32, 96)?);
    let out = Linear::new(&params.at("out"), 32, 10)?;
    let forward = |x: &Tensor, ctx: &Ctx| {
        let (b, mut h) = (x.shape()[0], Tensor::zeros(&[x.shape()[0], 32], DType::F32));
        let rows = read.forward(&x.reshape(&[b, 8, 8])?, ctx)?;
        for t in 0..8 {
            let (i, k) =
                (rows.slice(1, t..t + 1)?.squeeze(1)?.split(&[32; 3], 1)?, keep.forward(&h, ctx)?.split(&[32; 3], 1)?);
            let (r, z) = ((&i[0] + &k[0]).tensor()?.sigmoid()?, (&i[1] + &k[1]).tensor()?.sigmoid()?);
            let n = (&i[2] + &r * &k[2]).tensor()?.tanh()?;
            h = ((1.0 - &z) * &n + &z * &h).tensor()?;
        }
        out.forward(&h, ctx)
    };
    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(1e-2))?;
    for epoch in 0..12 {
        for batch in shuffled(train.len(), epoch).chunks(64) {
            let (x, labels) = train.tensors(batch)?;
            step.run_one(|| cross_entropy(&forward(&x, &Ctx::train(epoch))?, &labels, &CrossEntropy::default()))?;
        }
    }
    println!("accuracy {:.4}", test.accuracy(|x| forward(x, &Ctx::eval()))?);
    Ok(())
}
