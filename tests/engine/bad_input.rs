//! Wrong input gives an error that names the thing, never a panic.

use crate::common::scratch::Scratch;
use prismgrad::models::{Gpt, GptConfig, Sampling, generate};
use prismgrad::nn::Ctx;
use prismgrad::ops::attention::{AttentionOptions, Span, attention};
use prismgrad::ops::embedding::embedding;
use prismgrad::ops::linear::{Activation, Layout, linear};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::ops::norm::layer_norm;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::PlainStep;
use prismgrad::{Array, DType, Param, Result, Tensor};
use std::fs;

fn says<T>(r: Result<T>, words: &[&str]) {
    let e = r.err().expect("should be refused").to_string();
    words.iter().for_each(|w| assert!(e.contains(w), "{e:?} does not mention {w:?}"));
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32)
}

#[test]
fn shapes_and_dtypes() {
    let w = Param::new("layer.weight", Array::zeros(&[4, 3], DType::F32));
    let lin = |x: &Tensor| linear(x, &w, Layout::OutIn, None, Activation::None, None);
    says(lin(&zeros(&[2, 5])), &["linear", "[2, 5]", "layer.weight", "3"]);
    says(lin(&Tensor::zeros(&[2, 3], DType::I64)), &["linear", "i64", "cast"]);
    says(zeros(&[2, 3]).add(&zeros(&[4])), &["add", "[2, 3]", "[4]"]);
    says(zeros(&[2, 3]).add(&Tensor::zeros(&[3], DType::F64)), &["f32", "f64"]);
    says(zeros(&[2, 3]).matmul(&zeros(&[2, 3])), &["matmul", "[2, 3]"]);
    says(zeros(&[2, 3]).reshape(&[4]), &["reshape", "4"]);
    says(zeros(&[2, 3]).sum(&[5], false), &["sum", "5"]);
    says(zeros(&[2, 3]).slice(1, 2..9), &["slice", "2..9"]);
    says(Tensor::from_slice(&[1f32, 2.0], &[3]), &["2 elements", "[3]"]);
    says(zeros(&[2]).backward(), &["no history"]);
    says(zeros(&[2, 3]).dropout(1.0, 0), &["dropout", "1"]);
    let q = zeros(&[1, 4, 2, 8]);
    says(attention(&q, &zeros(&[1, 4, 3, 8]), &zeros(&[1, 4, 3, 8]), &AttentionOptions::new(Span::Causal)), &["heads"]);
    says(attention(&q, &q, &q, &AttentionOptions::new(Span::Window(0))), &["span"]);
    let targets = |t: &[u32]| Array::from_slice(t, &[t.len()]).unwrap();
    says(
        cross_entropy(&zeros(&[2, 3]), targets(&[0, 7]), &CrossEntropy::default()),
        &["target 7", "row 1", "3 classes"],
    );
    says(cross_entropy(&zeros(&[2, 3]), targets(&[0]), &CrossEntropy::default()), &["[1]", "[2]"]);
    let labels = |v: &[i64]| Array::from_slice(v, &[v.len()]).unwrap();
    says(cross_entropy(&zeros(&[2, 3]), labels(&[0, -1]), &CrossEntropy::default()), &["target -1", "row 1"]);
    says(cross_entropy(&zeros(&[2, 3]), zeros(&[2]), &CrossEntropy::default()), &["f32", "u32 or i64"]);
}

#[test]
fn empty_tensors() {
    let w = Param::new("w", Array::zeros(&[4, 3], DType::F32));
    let gain = Param::new("g", Array::ones(&[4], DType::F32));
    let table = Param::new("t", Array::ones(&[5, 3], DType::F32));
    let ids = Tensor::zeros(&[0, 2], DType::U32);
    let x = embedding(&table, &ids, None, None).unwrap();
    assert_eq!(x.shape(), [0, 2, 3]);
    let y = linear(&x, &w, Layout::OutIn, None, Activation::Gelu, None).unwrap();
    let y = layer_norm(&y, Some(&gain), None, 1e-5, None).unwrap().softmax(-1).unwrap();
    let l = cross_entropy(&y, Array::zeros(&[0, 2], DType::U32), &CrossEntropy::default()).unwrap();
    assert_eq!(l.shape(), [0]);
    let grads = l.backward().unwrap();
    assert!(grads.param(&w).unwrap().sum().unwrap().to_f64().iter().all(|&g| g == 0.0));
    assert!(grads.param(&table).unwrap().sample_sq_norms().unwrap().is_empty());
    let q = zeros(&[0, 4, 2, 8]);
    assert_eq!(attention(&q, &q, &q, &AttentionOptions::new(Span::Full)).unwrap().shape(), [0, 4, 2, 8]);
    assert_eq!(zeros(&[3, 0]).matmul(&zeros(&[0, 2])).unwrap().array().to_f64(), [0.0; 6]);
    assert_eq!(zeros(&[0, 3]).sum(&[0], false).unwrap().array().to_f64(), [0.0; 3]);
    says(zeros(&[2, 0]).max(&[1], false), &["nothing to reduce"]);
}

fn model() -> Gpt {
    Gpt::new(GptConfig::small(40, 12, 2, 8, 2), 5).unwrap()
}

#[test]
fn models_on_disk() {
    let scratch = Scratch::new("bad-input");
    let dir = scratch.join("model");
    says(Gpt::load(&dir), &["config.json"]);
    let m = model();
    m.save(&dir).unwrap();
    let back = Gpt::load(&dir).unwrap();
    for (a, b) in m.params().all().iter().zip(back.params().all()) {
        assert_eq!(a.value().to_bytes(), b.value().to_bytes(), "{}", a.name());
    }
    let file = dir.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    says(Gpt::load(&dir), &["model.safetensors"]);
    fs::write(&file, b"not tensors").unwrap();
    says(Gpt::load(&dir), &["model.safetensors"]);
    fs::remove_file(&file).unwrap();
    says(Gpt::load(&dir), &["model.safetensors"]);
    fs::write(&file, &whole).unwrap();
    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    let edit = |from: &str, to: &str| fs::write(dir.join("config.json"), config.replace(from, to)).unwrap();
    edit("\"n_layer\": 2", "\"n_layer\": 3");
    says(Gpt::load(&dir), &["h.2.", "missing"]);
    edit("\"vocab_size\": 40", "\"vocab_size\": 41");
    says(Gpt::load(&dir), &["wte.weight", "[40, 8]", "[41, 8]"]);
    edit("\"n_head\": 2", "\"n_head\": 3");
    says(Gpt::load(&dir), &["n_head", "3"]);
    edit("\"gelu\"", "\"mish\"");
    says(Gpt::load(&dir), &["mish", "gelu_new"]);
    edit("{", "[");
    says(Gpt::load(&dir), &["config.json"]);
    let taken = scratch.join("taken");
    fs::write(&taken, "a file").unwrap();
    says(m.save(&taken), &["taken"]);
}

#[test]
fn generation() {
    let m = model();
    let s = Sampling::default();
    says(generate(&m, &[], 3, &s, None), &["prompt"]);
    says(generate(&m, &[99], 3, &s, None), &["99", "40"]);
    says(generate(&m, &[1], 3, &Sampling { temperature: -1.0, ..s.clone() }, None), &["temperature"]);
    says(generate(&m, &[1], 3, &Sampling { top_p: 0.0, ..s.clone() }, None), &["top_p"]);
    says(m.forward(Array::zeros(&[1, 13], DType::U32), &Ctx::eval()), &["13", "12"]);
    says(m.forward(Array::zeros(&[3], DType::U32), &Ctx::eval()), &["[B, T]"]);
    says(m.forward(Array::full(&[1, 2], 77.0, DType::U32), &Ctx::eval()), &["77"]);
}

#[test]
fn the_cache_changes_nothing() {
    for span in [Span::Causal, Span::Window(3), Span::Block(4)] {
        let mut c = GptConfig::small(40, 12, 2, 8, 2);
        c.spans = Some(vec![span, Span::Causal]);
        c.initializer_range = 0.5;
        let m = Gpt::new(c, 5).unwrap();
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let cached = generate(&m, &[3, 1, 4], 9, &greedy, None).unwrap();
        let mut text = vec![3u32, 1, 4];
        for _ in 0..9 {
            let ids = Array::from_slice(&text, &[1, text.len()]).unwrap();
            let logits = m.forward(&ids, &Ctx::eval()).unwrap();
            let last = logits.array().slice(1, text.len() - 1..text.len()).unwrap().to_f64();
            text.push((0..40).fold(0, |b, i| if last[i] > last[b] { i } else { b }) as u32);
        }
        assert_eq!(cached, text[3..], "{span:?}");
    }
}

/// NaN in the data stops plain training at the sample that has it, with everything learnt so far intact.
#[test]
fn not_a_number_in_the_data() {
    let w = Param::new("w", Array::generate(&[2, 3], DType::F32, |i| i as f64 * 0.1));
    let mut step = PlainStep::new(std::slice::from_ref(&w), AdamW::default(), Schedule::constant(0.1)).unwrap();
    let mut x = vec![0.5f32; 12];
    let mut run = |x: &[f32]| {
        let y = linear(&Tensor::from_slice(x, &[4, 3])?, &w, Layout::OutIn, None, Activation::None, None)?;
        let losses = cross_entropy(&y, Array::zeros(&[4], DType::U32), &CrossEntropy::default())?;
        step.run([losses], Ok).map(|r| r.step)
    };
    run(&x).unwrap();
    let before = w.value().to_bytes();
    for bad in [f32::NAN, f32::INFINITY] {
        x[7] = bad;
        says(run(&x), &["step 2", "sample 2", "learning rate"]);
        assert_eq!(w.value().to_bytes(), before);
    }
    x[7] = 0.5;
    assert_eq!(run(&x).unwrap(), 2);
}
