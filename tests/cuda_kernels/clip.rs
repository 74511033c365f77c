//! Clip factors and the counts beside them, of norms that no small model has.
use crate::common::*;
use prismgrad::device::cuda::layouts::ClipShape;
use prismgrad::privacy::ClipFn;

#[test]
fn clip() {
    let _g = setup();
    let sq: Vec<f64> =
        [0.0, 1e-9, 0.25, 1.0, 9.0, 1e30, f64::NAN, f64::INFINITY].into_iter().cycle().take(300).collect();
    let b = Buf::from(&sq);
    for (kind, f) in
        [ClipFn::Abadi, ClipFn::Reparameterised, ClipFn::AutoV, ClipFn::AutoS { gamma: 0.01 }, ClipFn::Global]
            .into_iter()
            .enumerate()
    {
        let (w, stats) = (Buf::<f64>::new(300), Buf::from(&[5u64, 6, 7]));
        let s = ClipShape { count: 300, threshold: 0.5, gamma: 0.01, kind: kind as i32, reserved: 0 };
        go!("clip_weights_f64", [1, 1, 1]; b.ptr, w.ptr, stats.ptr, s);
        assert_eq!(w.get(), sq.iter().map(|&s| f.factor(s, 0.5)).collect::<Vec<_>>(), "{f:?}");
        let n = |p: &dyn Fn(f64) -> bool| sq.iter().filter(|&&x| p(x)).count() as u64;
        assert_eq!(stats.get(), [5 + 300, 6 + n(&|x| x.is_finite() && x.sqrt() > 0.5), 7 + n(&|x| !x.is_finite())]);
        let w = Buf::<f32>::new(300);
        go!("clip_weights_f32", [1, 1, 1]; b.ptr, w.ptr, nullm::<u64>(), s);
        // Rounded towards zero.
        let down = |w: f64| if (w as f32) as f64 > w { (w as f32).next_down() } else { w as f32 };
        assert_eq!(w.get(), sq.iter().map(|&s| down(f.factor(s, 0.5))).collect::<Vec<_>>(), "{f:?}");
    }
}
