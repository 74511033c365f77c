use prismgrad::prelude::*;

fn main() -> Result<()> {
    let (train, test) = prismgrad::data::digits()?.shuffled(0).split(0.8);
    let params = Params::new(0, DType::F32);
    let model = Linear::new(&params.at("layer"), 64, 10)?;
    let config = PrivacyConfig::target(3.0, 1e-4).records(train.len()).expected_batch(256.0).steps(100);
    let privacy = Privacy::new(config, NoiseKey::from_os()?)?; // sampler, clipper, noise and accountant, calibrated
    let mut step = PrivateStep::new(&params.all(), privacy, Sgd::default(), Schedule::constant(2.0))?;
    for t in 0..100 {
        let losses = |(x, y)| cross_entropy(&model.forward(&x, &Ctx::train(t))?, y, &CrossEntropy::default());
        step.run(512, |records| losses(train.tensors(records)?))?; // one loss for each record of the batch it draws
    }
    println!("accuracy {:.4}", test.accuracy(|x| model.forward(x, &Ctx::eval()))?);
    Ok(())
}
