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

/// Far tails, very many steps, very little noise: formulas where there are any, otherwise direct integration on another way; within
/// 1 %, never below, in two seconds, or a sentence that says what to change.
#[test]
fn the_edges() {
    // Without sampling: ε of N(0, 1) against N(μ, 1), by bisection in 50 digits.
    for (sigma, n, delta, want) in [
        (100.0, 1_000_000, 1e-14, 125.7643),
        (1.0, 1, 1e-15, 8.16557),
        (0.5, 1000, 1e-5, 2268.76772),
        (1e4, 1 << 40, 1e-10, 6163.622),
    ] {
        let start = std::time::Instant::now();
        let got = run(&[(sigma, 1.0, n)]).epsilon(delta).unwrap();
        println!("σ {sigma} n {n} δ {delta}: {got} against {want}");
        assert!(got >= want * (1.0 - 1e-4) && got <= want * 1.01, "σ {sigma} n {n} δ {delta}: {got} against {want}");
        assert!(start.elapsed().as_secs_f64() < 2.0, "σ {sigma} n {n}: {:?}", start.elapsed());
    }
    // A record that is further away than the noise reaches is seen for certain.
    assert_eq!(run(&[(0.05, 1.0, 1)]).epsilon(1e-5).unwrap(), f64::INFINITY);
    // Sampled, in tails where rounding used to decide.
    for (sigma, q, n, delta, want) in [(1.0, 0.01, 1000, 1e-12, 3.914), (1.0, 0.01, 1000, 1e-14, 4.54)] {
        let start = std::time::Instant::now();
        let got = run(&[(sigma, q, n)]).epsilon(delta).unwrap();
        println!("σ {sigma} q {q} n {n} δ {delta}: {got} against {want} in {:?}", start.elapsed());
        assert!((got / want - 1.0).abs() < 0.01, "σ {sigma} q {q} n {n} δ {delta}: {got} against {want}");
        assert!(start.elapsed().as_secs_f64() < 2.0, "σ {sigma} q {q} n {n}: {:?}", start.elapsed());
    }
    // A step's losses that are much closer together than the usual grid.
    let fine = run(&[(50.0, 1e-3, 1 << 24)]).epsilon(1e-6).unwrap();
    let mu = 1e-3 * (1u64 << 24) as f64 / 50.0 / ((1u64 << 24) as f64).sqrt();
    println!("{fine} with μ {mu}");
    // Many weak steps compose to the Gaussian comparison of μ = q·√n/σ (Bu et al. 2020).
    let limit = run(&[(1.0 / mu, 1.0, 1)]).epsilon(1e-6).unwrap();
    assert!((fine / limit - 1.0).abs() < 0.01, "{fine} against {limit}");
    let e = run(&[(1.0, 1e-3, 1 << 40)]).epsilon(1e-6).map_err(|e| e.to_string());
    println!("{e:?}");
    assert!(e.as_ref().err().is_some_and(|e| e.contains("take fewer steps")) || e.as_ref().is_ok_and(|e| *e > 1e3));
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

/// Steps with the same noise at two rates stay two kinds of step: they cost what they would if their noise differed by next to nothing.
#[test]
fn rates_are_kept_apart() {
    for (sigma, q, other) in [(1.0, 0.01, 0.02), (0.8, 0.03, 0.005)] {
        let same = run(&[(sigma, q, 400), (sigma, other, 300)]);
        assert_eq!((same.history().len(), same.steps()), (2, 700));
        let got = same.epsilon(1e-5).unwrap();
        let want = run(&[(sigma, q, 400), (sigma * (1.0 + 1e-9), other, 300)]).epsilon(1e-5).unwrap();
        assert!((got - want).abs() < 1e-6 * want, "σ {sigma}, q {q} and {other}: {got}, not {want}");
        let turned = run(&[(sigma, other, 300), (sigma, q, 400)]).epsilon(1e-5).unwrap();
        assert!((got - turned).abs() < 1e-9, "σ {sigma}, q {q} and {other}: {got} {turned}");
    }
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
        let sigma = Accountant::new().calibrate(e, delta, q, n).unwrap();
        assert!((sigma - want).abs() < 1e-3 * want && sigma >= want - 2e-5, "ε {e} q {q}: σ {sigma} against {want}");
        assert!(run(&[(sigma, q, n)]).epsilon(delta).unwrap() <= e);
    }
}

/// Where a record moves more than δ past the end of the noise, at 9.49 standard deviations, no ε is enough: 100 steps at q = 0.05 and
/// δ = 10⁻⁵ need σ = 0.2050, however large ε is. It takes seconds, not a minute.
#[test]
fn large_budgets() {
    let start = std::time::Instant::now();
    let certain = |sigma: f64| run(&[(sigma, 0.05, 100)]).epsilon(1e-5).unwrap();
    assert!(
        certain(0.2049).is_infinite() && certain(0.2052).is_finite(),
        "{} and {}",
        certain(0.2049),
        certain(0.2052)
    );
    for epsilon in [1e3, 1e4, 1e6] {
        let sigma = Accountant::new().calibrate(epsilon, 1e-5, 0.05, 100).unwrap();
        assert!((sigma - 0.2050).abs() < 3e-4, "ε {epsilon}: σ {sigma}");
        assert!(certain(sigma) <= epsilon);
    }
    // The value that a grid of 10⁻⁴ gives after 42 s.
    let sigma = Accountant::new().calibrate(100.0, 1e-5, 0.01, 1000).unwrap();
    assert!((sigma - 0.26693).abs() < 1e-4, "{sigma}");
    // What is left of δ decides, and that is said.
    let e = Accountant::new().calibrate(3.0, 1e-300, 0.01, 1000).unwrap_err().to_string();
    assert!(e.contains("δ = 1e-300") && e.contains("larger δ"), "{e}");
    println!("{:?}", start.elapsed());
    assert!(start.elapsed().as_secs_f64() < 30.0, "{:?}", start.elapsed());
}

#[test]
fn what_is_refused() {
    let mut a = Accountant::new();
    for (s, q) in [(0.0, 0.1), (-1.0, 0.1), (f64::NAN, 0.1), (1.0, 1.5), (1.0, -0.1), (1.0, f64::NAN)] {
        assert!(a.record(s, q, 1).is_err(), "σ {s} q {q}");
    }
    assert_eq!(a.epsilon(1e-5).unwrap(), 0.0);
    assert!(a.epsilon(0.0).is_err() && a.epsilon(1.0).is_err() && a.epsilon(f64::NAN).is_err());
    assert!(Accountant::new().calibrate(0.0, 1e-5, 0.1, 10).is_err());
    assert!(Accountant::new().calibrate(f64::INFINITY, 1e-5, 0.1, 10).is_err());
}

/// σ, q, steps, δ, then Rényi ε with its order and the three numbers of a bracket that others computed with a margin of 0.01.
type Cross = (f64, f64, u64, f64, f64, f64, [f64; 3]);

/// (None of the numbers is meant to be π.)
#[allow(clippy::approx_constant)]
const CROSS: [Cross; 10] = [
    (1.0, 0.01, 1000, 1e-5, 2.10137, 7.8, [1.8181, 1.8282, 1.8384]),
    (0.8, 0.01, 1000, 1e-5, 3.69561, 4.8, [3.1308, 3.1410, 3.1513]),
    (1.0, 256.0 / 60000.0, 3515, 1e-5, 1.55968, 9.7, [1.3411, 1.3512, 1.3613]),
    (1.3, 0.01, 6000, 1e-5, 3.22717, 6.9, [2.9542, 2.9644, 2.9746]),
    (2.0, 0.02, 150, 1e-5, 0.55361, 27.0, [0.4855, 0.4955, 0.5056]),
    (1.0, 0.001, 100_000, 1e-6, 2.00405, 12.0, [1.8510, 1.8611, 1.8711]),
    (2.0, 0.05, 500, 1e-6, 3.10187, 8.2, [2.8625, 2.8726, 2.8828]),
    (0.6, 1024.0 / 42061.0, 410, 8e-6, 13.07151, 2.3, [11.3996, 11.4104, 11.4211]),
    (0.8, 4096.0 / 10.5e6, 51_000, 1.0 / 21e6, 1.80495, 9.4, [0.8778, 0.8879, 0.8979]),
    (5.0, 1.0, 100, 1e-5, 10.72551, 3.3, [9.9868, 9.9973, 10.0077]),
];

#[test]
fn renyi_accounting_agrees_and_is_above() {
    for (sigma, q, n, delta, want, order, _) in CROSS {
        let a = run(&[(sigma, q, n)]);
        let (got, at) = a.epsilon_rdp(delta).unwrap();
        // Theirs takes a series with too large terms at fractional orders, the lower the worse; exact divergences give less.
        let tolerance = if order < 3.0 { 3e-3 } else { 1e-3 };
        let fits = (got - want).abs() < tolerance * want && got <= want * (1.0 + 1e-5);
        assert!(fits, "σ {sigma} q {q}: {got} against {want}");
        assert!((at - order).abs() <= 0.1 * order.max(1.0), "order {at}, theirs {order}");
        assert!(got > a.epsilon(delta).unwrap());
    }
    let mixed = run(&[(1.0, 0.01, 500), (0.8, 0.02, 300)]).epsilon_rdp(1e-5).unwrap().0;
    assert!((mixed - 4.64670).abs() < 1e-3 * 4.64670, "{mixed}");
}

#[test]
fn renyi_divergence_of_one_step() {
    use prismgrad::privacy::accountant::rdp::renyi;
    let orders = [1.5, 2.0, 3.5, 8.0, 32.0];
    for (q, sigma, want) in [
        (0.01, 1.0, [1.272537e-4, 1.718134e-4, 3.131166e-4, 8.936439e-4, 11.24627594]),
        (0.02, 2.0, [8.494613e-5, 1.136037e-4, 2.006344e-4, 4.718204e-4, 1.744071e-2]),
        (0.1, 4.0, [4.821345e-4, 6.447367e-4, 1.138370e-3, 2.674499e-3, 1.272022e-2]),
        (1.0, 2.0, [0.1875, 0.25, 0.4375, 1.0, 4.0]),
    ] {
        for (order, want) in orders.into_iter().zip(want) {
            let got = renyi(sigma, q, order, Neighbouring::AddRemove);
            assert!((got - want).abs() < 2e-6 * want, "q {q} σ {sigma} order {order}: {got} against {want}");
        }
    }
}

/// The upper bound lies inside a bracket that another method makes, and that bracket agrees with other people's.
#[test]
fn the_bracket_holds_the_reported_number() {
    for (sigma, q, n, delta, _, _, [low, estimate, high]) in CROSS {
        let a = run(&[(sigma, q, n)]);
        let (b, pld) = (a.bracket(delta).unwrap(), a.epsilon(delta).unwrap());
        assert!(b.low <= pld && pld <= b.high, "σ {sigma} q {q}: {pld} outside {b:?}");
        assert!((b.estimate - estimate).abs() < 1e-3 * estimate, "σ {sigma} q {q}: {b:?}, theirs {estimate}");
        assert!(b.low <= high && low <= b.high, "σ {sigma} q {q}: {b:?} beside [{low}, {high}]");
    }
    let mut a = run(&[(1.0, 0.01, 1000)]);
    a.neighbouring = Neighbouring::ReplaceOne;
    let b = a.bracket(1e-5).unwrap();
    assert!((b.estimate - 2.84345).abs() < 3e-3 && b.low <= 2.84345 && 2.84345 <= b.high, "{b:?}");
}

/// 50 random settings beside a direct integration of the hockey-stick divergence of few steps: the loss of one step on a
/// fine grid, convolved term by term, without transforms, windows or truncation.
#[test]
fn random_settings_agree_with_direct_integration() {
    let mut state = 77u64;
    let mut uniform = |low: f64, high: f64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        low + (high - low) * (state >> 11) as f64 / (1u64 << 53) as f64
    };
    for _ in 0..50 {
        let (sigma, q, n) = (uniform(0.7, 4.0), uniform(0.01, 1.0), 1 + uniform(0.0, 3.0) as usize);
        let delta = 10f64.powf(uniform(-5.0, -2.0));
        let direct = direct(sigma, q, n, delta);
        let got = run(&[(sigma, q, n as u64)]).epsilon(delta).unwrap();
        // Splitting a loss over two grid points makes the direct value a little too large.
        let (low, high) = (direct - 5e-4 - 1e-3 * direct, direct + 1e-4 + 1e-3 * direct);
        assert!(low < got && got < high, "σ {sigma} q {q} n {n} δ {delta}: {got} against {direct}");
    }
}

fn direct(sigma: f64, q: f64, n: usize, delta: f64) -> f64 {
    let h = 4e-3;
    let phi = |x: f64| 0.5 * libm::erfc(-x / (sigma * std::f64::consts::SQRT_2));
    let mix_loss = |x: f64| ((1.0 - q) + q * ((2.0 * x - 1.0) / (2.0 * sigma * sigma)).exp()).ln();
    let mut worst = 0f64;
    for remove in [true, false] {
        // Cells of x, each with its probability and the loss in its middle; put on the two nearest grid points.
        let (lo, dx) = (-9.0 * sigma, sigma / 4000.0);
        let cells = ((1.0 + 18.0 * sigma) / dx) as usize;
        let (mut grid, zero) = (vec![0f64; 20_001], 10_000i64);
        for i in 0..cells {
            let (a, b) = (lo + i as f64 * dx, lo + (i + 1) as f64 * dx);
            let (p, m) = (phi(b) - phi(a), phi(b - 1.0) - phi(a - 1.0));
            let (mass, loss) = match remove {
                true => ((1.0 - q) * p + q * m, mix_loss(0.5 * (a + b))),
                false => (p, -mix_loss(0.5 * (a + b))),
            };
            let at = (loss / h).clamp(-9999.0, 9999.0);
            let (k, part) = (at.floor() as i64, at - at.floor());
            grid[(zero + k) as usize] += mass * (1.0 - part);
            grid[(zero + k + 1) as usize] += mass * part;
        }
        let first = grid.iter().position(|m| *m > 1e-16).unwrap();
        let last = grid.iter().rposition(|m| *m > 1e-16).unwrap();
        let one = &grid[first..=last];
        let mut total = one.to_vec();
        for _ in 1..n {
            let mut next = vec![0.0; total.len() + one.len() - 1];
            for (a, x) in total.iter().enumerate() {
                next[a..a + one.len()].iter_mut().zip(one).for_each(|(n, y)| *n += x * y);
            }
            total = next;
        }
        let start = n as i64 * (first as i64 - zero);
        let loss = |k: usize| (start + k as i64) as f64 * h;
        let divergence =
            |e: f64| -> f64 { total.iter().enumerate().map(|(k, m)| m * (1.0 - (e - loss(k)).exp()).max(0.0)).sum() };
        let (mut a, mut b) = (0.0, 100.0);
        for _ in 0..50 {
            let m = 0.5 * (a + b);
            if divergence(m) <= delta { b = m } else { a = m }
        }
        worst = worst.max(b);
    }
    worst
}
