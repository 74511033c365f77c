//! The accountant against numbers computed with other people's tools.

use prismgrad::privacy::{Accountant, Neighbouring};

fn run(steps: &[(f64, f64, u64)]) -> Accountant {
    let mut a = Accountant::new();
    steps.iter().for_each(|&(s, q, n)| a.record(s, q, n).unwrap());
    a
}

/// Agrees to 10⁻³ and is never below the printed value (but for its last digit).
fn safe(what: &str, got: f64, want: f64, digit: f64) {
    assert!((got - want).abs() <= 1e-3 * want, "{what}: {got} against {want}");
    assert!(got >= want - digit, "{what}: {got} is below {want}");
}

#[test]
fn epsilon_of_subsampled_gaussians() {
    let rows = [
        (1.0, 0.01, 1000, 1e-5, 1.82824),
        (0.8, 0.01, 1000, 1e-5, 3.14102),
        (1.0, 256.0 / 60000.0, 3515, 1e-5, 1.35123),
        (1.3, 0.01, 6000, 1e-5, 2.96441),
        (2.0, 0.02, 150, 1e-5, 0.49552),
        (1.0, 0.001, 100_000, 1e-6, 1.86200),
        (2.0, 0.05, 500, 1e-6, 2.87263),
        (0.6, 1024.0 / 42061.0, 410, 8e-6, 11.41036),
        (0.8, 4096.0 / 10.5e6, 51_000, 1.0 / 21e6, 0.88888),
        (5.0, 1.0, 100, 1e-5, 9.99726),
    ];
    for (sigma, q, n, delta, want) in rows {
        let start = std::time::Instant::now();
        let got = run(&[(sigma, q, n)]).epsilon(delta).unwrap();
        safe(&format!("σ {sigma} q {q} n {n}"), got, want, 1e-5);
        assert!(start.elapsed().as_secs_f64() < 2.0, "σ {sigma} q {q}: {:?}", start.elapsed());
    }
}

#[test]
fn delta_at_epsilon() {
    let a = run(&[(1.0, 0.01, 1000)]);
    for (e, want) in
        [(0.5, 3.056848e-2), (1.0, 2.612497e-3), (1.5, 1.092607e-4), (2.0, 2.665722e-6), (3.0, 9.222664e-10)]
    {
        safe(&format!("ε {e}"), a.delta(e).unwrap(), want, want * 1e-6);
    }
}

#[test]
fn mixed_runs_in_any_order() {
    let a = run(&[(1.0, 0.01, 500), (0.8, 0.02, 300)]);
    let b = run(&[(0.8, 0.02, 300), (1.0, 0.01, 200), (1.0, 0.01, 300)]);
    safe("mixed", a.epsilon(1e-5).unwrap(), 3.97844, 1e-5);
    safe("mixed δ", a.delta(3.0).unwrap(), 2.160431e-4, 1e-9);
    assert!((a.epsilon(1e-5).unwrap() - b.epsilon(1e-5).unwrap()).abs() < 1e-9);
}

#[test]
fn finer_grids_fall_towards_the_truth() {
    let mut last = f64::INFINITY;
    for (h, want) in [(1e-2, 1.901436), (1e-3, 1.828934), (1e-4, 1.828244), (1e-5, 1.828237)] {
        let mut a = run(&[(1.0, 0.01, 1000)]);
        a.interval = h;
        let got = a.epsilon(1e-5).unwrap();
        assert!((got - want).abs() < 2e-6 && got < last, "h {h}: {got} against {want}");
        last = got;
    }
}

#[test]
fn replacing_one_record() {
    for (s, q, n, delta, want) in [(1.0, 0.01, 1000, 1e-5, 2.84345), (2.0, 0.05, 500, 1e-6, 5.55101)] {
        let mut a = run(&[(s, q, n)]);
        a.neighbouring = Neighbouring::ReplaceOne;
        safe("replace one", a.epsilon(delta).unwrap(), want, 1e-5);
    }
}

#[test]
fn calibrated_noise() {
    for (e, delta, q, n, want) in [
        (1.0, 1e-5, 0.01, 1000, 1.41464),
        (8.0, 1e-5, 0.01, 1000, 0.58626),
        (8.0, 1e-5, 0.02, 150, 0.56056),
        (8.0, 8e-6, 1024.0 / 42061.0, 410, 0.68250),
        (8.0, 1.0 / 1437.0, 64.0 / 1437.0, 450, 0.77101),
    ] {
        let sigma = Accountant::calibrate(e, delta, q, n).unwrap();
        assert!((sigma - want).abs() < 1e-3 * want && sigma >= want - 2e-5, "ε {e} q {q}: σ {sigma} against {want}");
        assert!(run(&[(sigma, q, n)]).epsilon(delta).unwrap() <= e);
    }
}

#[test]
fn what_is_refused() {
    let mut a = Accountant::new();
    for (s, q) in [(0.0, 0.1), (-1.0, 0.1), (f64::NAN, 0.1), (1.0, 1.5), (1.0, -0.1), (1.0, f64::NAN)] {
        assert!(a.record(s, q, 1).is_err(), "σ {s} q {q}");
    }
    assert_eq!(a.epsilon(1e-5).unwrap(), 0.0);
    assert!(a.epsilon(0.0).is_err() && a.epsilon(1.0).is_err() && a.epsilon(f64::NAN).is_err());
    assert!(Accountant::calibrate(0.0, 1e-5, 0.1, 10).is_err());
    assert!(Accountant::calibrate(f64::INFINITY, 1e-5, 0.1, 10).is_err());
}
