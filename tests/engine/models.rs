//! Programs that users write: how long they are, and what they reach. Saving and loading a model of one's own; operators.

use crate::common::scratch::Scratch;
use prismgrad::nn::Expr;
use prismgrad::prelude::*;
use std::path::Path;

thread_local! {
    static SAID: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
}

// The programs below print to where the test can read it.
macro_rules! println {
    ($($text:tt)*) => {{
        let text = format!($($text)*);
        crate::models::SAID.set(text)
    }};
}

macro_rules! programs {
    ($($name:ident)*) => {
        $(mod $name {
            include!(concat!("../../examples/models/", stringify!($name), ".rs"));
            pub fn run() -> Result<()> {
                main()
            }
        })*
    };
}

programs!(mlp convnet gru resnet encoder masked private);

#[test]
fn programs_are_short_and_learn_digits() {
    type Program = (&'static str, &'static str, fn() -> Result<()>, usize, f64);
    let programs: [Program; 7] = [
        ("mlp", include_str!("../../examples/models/mlp.rs"), mlp::run, 24, 0.95),
        ("convnet", include_str!("../../examples/models/convnet.rs"), convnet::run, 34, 0.95),
        ("gru", include_str!("../../examples/models/gru.rs"), gru::run, 30, 0.95),
        ("resnet", include_str!("../../examples/models/resnet.rs"), resnet::run, 34, 0.95),
        ("encoder", include_str!("../../examples/models/encoder.rs"), encoder::run, 29, 0.95),
        // Guessing the commonest level, 0, is right for 0.489 of the pixels.
        ("masked", include_str!("../../examples/models/masked.rs"), masked::run, 40, 0.5),
        ("private", include_str!("../../examples/models/private.rs"), private::run, 15, 0.8),
    ];
    for (name, text, run, most, least) in programs {
        let lines = text.lines().filter(|l| !l.trim().is_empty()).count();
        assert!(lines <= most, "{name} has {lines} lines, more than {most}");
        run().unwrap();
        let said = SAID.take();
        let accuracy: f64 =
            said.strip_prefix("accuracy ").and_then(|a| a.parse().ok()).unwrap_or_else(|| panic!("{said}"));
        assert!(accuracy >= least, "{name} reaches {accuracy}, less than {least}");
        std::eprintln!("{name}: {lines} lines, accuracy {accuracy}");
    }
    // The README shows the private one as it is.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (readme, private) = (root.join("README.md"), root.join("examples/models/private.rs"));
    assert!(std::fs::read_to_string(readme).unwrap().contains(&std::fs::read_to_string(private).unwrap()));
}

fn model(params: &Params, width: usize) -> Sequential {
    let first = Linear::new(&params.at("first"), 3, width).unwrap();
    Sequential::new().then(first).then(Activation::Tanh).then(Linear::new(&params.at("second"), width, 2).unwrap())
}

#[test]
fn a_model_is_saved_and_loaded_in_two_lines() {
    let folder = Scratch::new("params");
    let path = folder.join("model.safetensors");
    let (a, b) = (Params::new(1, DType::F32), Params::new(2, DType::F32));
    let (from, to) = (model(&a, 4), model(&b, 4));
    let x = Tensor::from_slice(&[0.1f32, -0.4, 0.7], &[1, 3]).unwrap();
    let y = |m: &Sequential| m.forward(&x, &Ctx::eval()).unwrap().array().to_f64();
    assert_ne!(y(&from), y(&to));
    a.save(&path).unwrap();
    b.load(&path, Strict::Yes).unwrap();
    assert_eq!(y(&from), y(&to));
    // A scope alone, under names relative to it.
    a.at("first").save(&path).unwrap();
    let c = Params::new(3, DType::F32);
    model(&c.at("inner"), 4);
    c.at("inner").at("first").load(&path, Strict::Yes).unwrap();
    assert_eq!(c.get("inner.first.weight").unwrap().value().to_f64(), a.get("first.weight").unwrap().value().to_f64());
    // In half the bytes.
    a.save_as(&path, Some(DType::BF16)).unwrap();
    b.load(&path, Strict::Yes).unwrap();
    assert!(y(&from).iter().zip(y(&to)).all(|(p, q)| (p - q).abs() < 0.05));
    assert!(a.save_as(&path, Some(DType::I64)).is_err());
}

/// Every mismatch is in one error, and after it the model is as it was.
#[test]
fn what_does_not_fit_is_listed_whole() {
    let folder = Scratch::new("params-misfit");
    let path = folder.join("model.safetensors");
    let (a, b) = (Params::new(1, DType::F32), Params::new(2, DType::F32));
    model(&a, 4);
    a.param("extra", &[2], Init::Ones).unwrap();
    model(&b, 5);
    b.param("own", &[2], Init::Ones).unwrap();
    a.save(&path).unwrap();
    let before: Vec<f64> = b.all().iter().flat_map(|p| p.value().to_f64()).collect();
    let e = b.load(&path, Strict::Yes).unwrap_err().to_string();
    for word in [
        "first.weight is [4, 3]",
        "first.bias is [4]",
        "second.weight is [2, 4]",
        "own is missing",
        "extra is in the file",
    ] {
        assert!(e.contains(word), "{word}: {e}");
    }
    let e = b.load(&path, Strict::No).unwrap_err().to_string();
    assert!(e.contains("first.weight is [4, 3]") && !e.contains("own"), "{e}");
    assert_eq!(before, b.all().iter().flat_map(|p| p.value().to_f64()).collect::<Vec<f64>>());
    let c = Params::new(4, DType::F32);
    model(&c, 4);
    c.param("own", &[2], Init::Ones).unwrap();
    let taken = c.load(&path, Strict::No).unwrap();
    assert_eq!((taken.missing, taken.unexpected), (vec!["own".to_string()], vec!["extra".to_string()]));
    assert!(c.load(folder.join("none.safetensors"), Strict::Yes).unwrap_err().to_string().contains("none.safetensors"));
}

#[test]
fn operators_carry_values_gradients_and_the_first_error() {
    let t = |x: &[f64]| Tensor::from_slice(x, &[x.len()]).unwrap();
    let value = |e: Expr| e.tensor().unwrap().array().to_f64();
    let (x, y) = (t(&[1.0, 2.0]), t(&[4.0, 8.0]));
    assert_eq!(value(&x + &y), [5.0, 10.0]);
    assert_eq!(value(&x - 1.0), [0.0, 1.0]);
    assert_eq!(value(1.0 - &x), [0.0, -1.0]);
    assert_eq!(value(2.0 * &x * &y), [8.0, 32.0]);
    assert_eq!(value(&y / &x), [4.0, 4.0]);
    assert_eq!(value(8.0 / &y), [2.0, 1.0]);
    assert_eq!(value(&y / 4.0), [1.0, 2.0]);
    assert_eq!(value(-(&x) + x.clone() * y.clone()), [3.0, 14.0]);
    let leaf = Tensor::leaf(Array::from_slice(&[3.0, 5.0], &[2]).unwrap());
    let out = (&leaf * &leaf + 2.0 * &leaf).tensor().unwrap();
    let grads = out.backward().unwrap();
    assert_eq!(grads.of(&leaf).unwrap().to_f64(), [8.0, 12.0]);
    let wrong = (&x + &t(&[1.0, 2.0, 3.0])) * &y + 1.0;
    assert!(wrong.tensor().unwrap_err().to_string().contains("[3]"));
}

#[test]
fn modules_are_closures_too() {
    let twice = |x: &Tensor, _: &Ctx| x.mul_scalar(2.0);
    let model = Sequential::new().then(twice).then(Activation::Relu).then(|x: &Tensor, _: &Ctx| x.flatten(1));
    let x = Tensor::from_slice(&[-1.0, 2.0, 3.0, -4.0], &[1, 2, 2]).unwrap();
    let y = model.forward(&x, &Ctx::eval()).unwrap();
    assert_eq!((y.shape(), y.array().to_f64()), (&[1, 4][..], vec![0.0, 4.0, 6.0, 0.0]));
    assert!(x.flatten(3).unwrap_err().to_string().contains("flatten"));
}
