//! What spans cost: FLOPs against pairs, and memory against the tokens.

use prismgrad::device::cpu::pool;
use prismgrad::models::{Gpt, GptConfig, Positions, span_cost};
use prismgrad::nn::Ctx;
use prismgrad::ops::attention::{AttentionOptions, Documents, Span, attention};
use prismgrad::profile::{self, Kind};
use prismgrad::{Array, DType, Device, Gradients, Result, Tensor, no_grad};

/// FLOPs that the ops of these names count, forwards and backwards.
fn counted(names: &[&str], run: &dyn Fn() -> Result<()>) -> [u64; 2] {
    let session = profile::start(&Device::Cpu).unwrap();
    run().unwrap();
    let report = session.finish().unwrap();
    [Kind::Forward, Kind::Backward].map(|kind| {
        let lines = report.lines().iter().filter(|l| l.kind == kind && names.contains(&l.name.as_str()));
        (lines.map(|l| l.gflop).sum::<f64>() * 1e9).round() as u64
    })
}

fn config(tokens: usize) -> GptConfig {
    let list = vec![Span::Block(48), Span::Causal, Span::Window(17), Span::Sinks { window: 9, sinks: 4 }];
    let mut c = GptConfig::small(64, tokens, 4, 32, 4).with_spans(list);
    c.layer_positions = Some(vec![Positions::Rotary, Positions::Alibi, Positions::None, Positions::Rotary]);
    c.n_head_kv = Some(2);
    c
}

#[test]
fn flops_are_those_of_the_pairs() {
    let _alone = crate::alone();
    let n = 133;
    let (model, cost) = (Gpt::new(config(n), 1).unwrap(), span_cost(&config(n), n));
    let ids = Array::generate(&[3, n], DType::U32, |i| (i * i % 64) as f64);
    let [forward, backward] = counted(&["attention"], &|| model.losses(&ids, &ids, &Ctx::eval())?.backward().map(drop));
    assert_eq!([forward, backward], [3 * cost.attention_flops, 3 * cost.attention_flops / 2 * 5]);
    let whole = counted(&["attention", "linear"], &|| no_grad(|| model.forward(&ids, &Ctx::eval())).map(drop));
    assert_eq!(whole, [3 * cost.model_flops, 0]);
    // Documents: only pairs within one.
    let x = Tensor::leaf(Array::generate(&[2, n, 2, 8], DType::F32, |i| (i as f64).sin()));
    let o = AttentionOptions {
        documents: Some(Documents::packed_each(vec![vec![0, 50, n], vec![0, 7, 8, 90]])),
        ..AttentionOptions::new(Span::Causal)
    };
    let [forward, _] = counted(&["attention"], &|| attention(&x, &x, &x, &o).map(drop));
    let pairs: u64 = [50, n - 50, 7, 1, 82].map(|n| Span::Causal.pairs(n)).iter().sum();
    assert_eq!(forward, 4 * 8 * 2 * pairs);
}

#[test]
fn memory_is_linear_in_the_tokens() {
    let _alone = crate::alone();
    // What a forward pass keeps is what the cost says.
    for n in [256, 1024] {
        let model = Gpt::new(config(n), 1).unwrap();
        let ids = Array::generate(&[2, n], DType::U32, |i| (i * i % 64) as f64);
        let before = pool::usage().live;
        let losses = model.losses(&ids, &ids, &Ctx::train(0)).unwrap();
        let kept = (pool::usage().live - before) as f64;
        let said = 2.0 * span_cost(&config(n), n).activation_bytes as f64;
        assert!((kept / said - 1.0).abs() < 0.06, "{n} tokens: {kept} bytes kept, {said} said");
        drop(losses);
    }
    // Forwards and backwards of one head at 16,384 and 65,536 positions: four times the bytes, not sixteen.
    let peak = |n: usize, span: Span| {
        let x = Tensor::leaf(Array::full(&[1, n, 1, 4], 0.1, DType::F32));
        let seed = Array::full(&[1, n, 1, 4], 0.1, DType::F32);
        let (before, _) = pool::watermark();
        let y = attention(&x, &x, &x, &AttentionOptions::new(span)).unwrap();
        y.backward_from(seed, false, &mut Gradients::default()).unwrap();
        pool::watermark().1 - before
    };
    for span in [Span::Window(64), Span::Block(64), Span::Sinks { window: 60, sinks: 4 }] {
        let (short, long) = (peak(16_384, span), peak(65_536, span));
        assert!(long < 5 * short && long < 64 << 20, "{span:?}: {short} and {long} bytes");
    }
}
