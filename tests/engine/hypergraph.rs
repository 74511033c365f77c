//! Hypergraph layers: against loops, the general path against the dense one, batches against single hypergraphs, per-sample gradients,
//! empty, repeated and outnumbered sets, devices, bad input.

use prismgrad::autograd::Segments;
use prismgrad::check;
use prismgrad::data::{Hypergraph, Repeats};
use prismgrad::device_tests;
use prismgrad::nn::hypergraph::{Aggregate, DeepSets, Grid, GridMask, Hgnn, HyperTrans, SetAttention, Structure};
use prismgrad::nn::{Ctx, Params};
use prismgrad::ops::incidence::Incidence;
use prismgrad::random::Rng;
use prismgrad::{Array, DType, Result, Samples, Tensor};

/// Reproducible values without a pattern.
fn noise(i: u64) -> f64 {
    let mut rng = Rng::new(i);
    2.0 * rng.uniform() - 1.0
}

fn input(shape: &[usize], seed: u64) -> Tensor {
    Tensor::new(Array::generate(shape, DType::F64, |i| noise(seed.wrapping_mul(1_000_003).wrapping_add(i as u64))))
}

/// Parameters that are not at their special values: gains of 1, biases of 0.
fn stirred(params: &Params) {
    for (k, p) in params.all().iter().enumerate() {
        let old = p.value().to_f64();
        let new = Array::generate(p.shape(), p.dtype(), |i| old[i] + 0.3 * noise(7919 * k as u64 + i as u64));
        p.set(new).unwrap();
    }
}

/// A hypergraph of random sets: some empty, some with a node twice if `repeats`.
fn random(nodes: usize, edges: usize, repeats: Repeats, seed: u64) -> Hypergraph {
    let mut rng = Rng::new(seed);
    let sets: Vec<Vec<u32>> =
        (0..edges).map(|_| (0..rng.below(5)).map(|_| rng.below(nodes as u64) as u32).collect()).collect();
    Hypergraph::from_sets(nodes, &sets, repeats).unwrap()
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| if a.is_nan() || b.is_nan() { f64::NAN } else { m.max((a - b).abs()) })
}

fn values(x: &Tensor) -> Vec<f64> {
    x.array().to_f64()
}

#[test]
fn aggregates_are_what_loops_say() {
    let g = random(7, 9, Repeats::Keep, 3);
    let x = input(&[7, 3], 1);
    let v = values(&x);
    for how in [Aggregate::Sum, Aggregate::Mean, Aggregate::Max] {
        let got = values(&how.forward(&x, g.nodes_of()).unwrap());
        for e in 0..9 {
            for c in 0..3 {
                let members: Vec<f64> = g.set(e).iter().map(|&m| v[m as usize * 3 + c]).collect();
                let want = match how {
                    _ if members.is_empty() => 0.0,
                    Aggregate::Sum => members.iter().sum(),
                    Aggregate::Mean => members.iter().sum::<f64>() / members.len() as f64,
                    Aggregate::Max => members.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                };
                assert!((got[e * 3 + c] - want).abs() < 1e-12, "{how:?} of {members:?}: {} for {want}", got[e * 3 + c]);
            }
        }
    }
}

/// The formula of HGNN with dense matrices.
#[test]
fn hgnn_is_its_formula() {
    let (n, m, d, p) = (6, 8, 4, 3);
    let g = random(n, m, Repeats::Merge, 11);
    let params = Params::new(1, DType::F64);
    let layer = Hgnn::new(&params, d, p).unwrap();
    stirred(&params);
    let x = input(&[n, d], 2);
    let w: Vec<f64> = (0..m).map(|e| 0.5 + e as f64 / 4.0).collect();
    let got = values(&layer.forward(&x, g.structure(), Some(&w), &Ctx::eval()).unwrap());
    let h = |v: usize, e: usize| f64::from(u8::from(g.set(e).contains(&(v as u32))));
    let degree: Vec<f64> = (0..n).map(|v| (0..m).map(|e| w[e] * h(v, e)).sum()).collect();
    let size: Vec<f64> = (0..m).map(|e| (0..n).map(|v| h(v, e)).sum()).collect();
    let inverse = |x: f64, power: f64| if x > 0.0 { x.powf(power) } else { 0.0 };
    let theta = params.get("weight").unwrap().value().to_f64();
    let bias = params.get("bias").unwrap().value().to_f64();
    let xs = values(&x);
    for v in 0..n {
        for c in 0..p {
            let mut want = bias[c];
            for e in 0..m {
                for u in 0..n {
                    let y: f64 = (0..d).map(|k| xs[u * d + k] * theta[c * d + k]).sum();
                    want += inverse(degree[v], -0.5)
                        * h(v, e)
                        * w[e]
                        * inverse(size[e], -1.0)
                        * h(u, e)
                        * inverse(degree[u], -0.5)
                        * y;
                }
            }
            assert!((got[v * p + c] - want).abs() < 1e-12, "node {v}: {} for {want}", got[v * p + c]);
        }
    }
}

/// One set through set attention, as a loop over its members.
fn one_set(params: &Params, members: &[Vec<f64>], (d, heads): (usize, usize)) -> Vec<f64> {
    let get = |name: &str| params.get(name).unwrap().value().to_f64();
    let linear = |x: &[f64], name: &str| -> Vec<f64> {
        let (w, b) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        (0..b.len()).map(|j| b[j] + (0..x.len()).map(|i| w[j * x.len() + i] * x[i]).sum::<f64>()).collect()
    };
    let norm = |x: &[f64], name: &str, eps: f64| -> Vec<f64> {
        let (w, b) = (get(&format!("{name}.weight")), get(&format!("{name}.bias")));
        let mean = x.iter().sum::<f64>() / d as f64;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d as f64;
        (0..d).map(|i| w[i] * (x[i] - mean) / (var + eps).sqrt() + b[i]).collect()
    };
    let q = get("seed");
    let width = d / heads;
    let mut o = q.clone();
    for h in 0..heads {
        let part = h * width..(h + 1) * width;
        let score = |x: &Vec<f64>| {
            let s: f64 = linear(x, "key")[part.clone()].iter().zip(&q[part.clone()]).map(|(k, q)| k * q).sum();
            if s < 0.0 { 0.2 * s } else { s }
        };
        let e: Vec<f64> = members.iter().map(|x| score(x).exp()).collect();
        let sum: f64 = e.iter().sum();
        for (x, e) in members.iter().zip(&e) {
            let v = linear(x, "value");
            part.clone().for_each(|c| o[c] += e / sum * v[c]);
        }
    }
    let gelu = |x: f64| 0.5 * x * (1.0 + libm_erf(x / 2f64.sqrt()));
    let u = norm(&o, "ln_0", 1e-5);
    let hidden: Vec<f64> = linear(&u, "fc").into_iter().map(gelu).collect();
    let f: Vec<f64> = linear(&hidden, "proj").iter().zip(&u).map(|(h, u)| h + u).collect();
    let f = norm(&f, "ln_f", 1e-12);
    norm(&u.iter().zip(&f).map(|(u, f)| u + f.max(0.0)).collect::<Vec<_>>(), "ln_1", 1e-5)
}

/// The error function by its series: exact to rounding for the arguments met here.
fn libm_erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    2.0 / std::f64::consts::PI.sqrt() * sum
}

#[test]
fn set_attention_is_a_loop_over_members() {
    let (d, heads) = (6, 3);
    // More hyperedges than nodes, empty ones, nodes that count twice.
    let g = random(5, 12, Repeats::Keep, 5);
    assert!((0..12).any(|e| g.set(e).is_empty()));
    assert!((0..12).any(|e| (1..g.set(e).len()).any(|i| g.set(e)[..i].contains(&g.set(e)[i]))));
    let params = Params::new(3, DType::F64);
    let layer = SetAttention::new(&params, d, heads).unwrap();
    stirred(&params);
    assert_eq!(params.count(), 10 * d * d + 14 * d);
    let x = input(&[5, d], 4);
    let s = g.structure();
    let got = values(&layer.forward(&x, s.nodes_of(), (s.nodes(), s.edges()), &Ctx::eval()).unwrap());
    let v = values(&x);
    for e in 0..12 {
        let members: Vec<Vec<f64>> =
            g.set(e).iter().map(|&m| v[m as usize * d..(m as usize + 1) * d].to_vec()).collect();
        let want = one_set(&params, &members, (d, heads));
        assert!(far(&got[e * d..(e + 1) * d], &want) < 1e-9, "hyperedge {e} of {} nodes", members.len());
    }
    // The weights of a set add up to 1.
    let a = layer.weights(&x, s.nodes_of(), s.nodes(), &Ctx::eval()).unwrap();
    let sums = values(&a.segment_sum(s.nodes_of().segments()).unwrap());
    let want: Vec<f64> = (0..12).flat_map(|e| [f64::from(u8::from(!g.set(e).is_empty())); 3]).collect();
    assert!(far(&sums, &want) < 1e-12);
}

/// Tables of one size as a batch of hypergraphs in the general form, and their states in the order of the dense one.
struct Both {
    structure: Structure,
    /// Of each of the general form's hyperedges before cells' own: where its row lies in [tables; columns; rows].
    order: Vec<u32>,
}

fn both((b, r, c): (usize, usize, usize), kept: &[Vec<f64>; 3]) -> Both {
    let one = Hypergraph::table(r, c).unwrap();
    let batch = Hypergraph::batch(&vec![one; b]).unwrap();
    let edges = 1 + r + c;
    let mut order = Vec::new();
    for t in 0..b {
        order.push(t as u32);
        order.extend((0..c).map(|j| (b + t * c + j) as u32));
        order.extend((0..r).map(|i| (b + b * c + t * r + i) as u32));
    }
    let batch = batch
        .filtered(|v, e| {
            let kind = match e as usize % edges {
                0 => 0,
                j if j <= c => 1,
                _ => 2,
            };
            kept[kind][v as usize] > 0.0
        })
        .unwrap();
    Both { structure: batch.with_own_edges().unwrap().structure().clone(), order }
}

type Ends = Vec<Vec<f64>>;

/// New states and the gradients of all parameters and inputs under a weighted sum of all states, by the general and the dense path.
fn both_paths(dtype: DType, size: (usize, usize, usize), drop: f64, seed: u64) -> Result<(Ends, Ends)> {
    let ((b, r, c), d, heads) = (size, 8, 2);
    let params = Params::new(seed, dtype);
    let layer = HyperTrans::new(&params, d, heads)?;
    stirred(&params);
    let mut rng = Rng::new(seed);
    let kept = [(); 3].map(|()| (0..b * r * c).map(|_| f64::from(u8::from(rng.uniform() >= drop))).collect::<Vec<_>>());
    let Both { structure, order } = both(size, &kept);
    let leaf = |shape: &[usize], k: u64| Tensor::leaf(input(shape, seed * 10 + k).array().cast(dtype));
    let (cells, own) = (leaf(&[b, r, c, d], 1), leaf(&[b, r, c, d], 2));
    let (tables, columns, rows) = (leaf(&[b, 1, 1, d], 3), leaf(&[b, 1, c, d], 4), leaf(&[b, r, 1, d], 5));
    let flat = |x: &Tensor| x.reshape(&[x.numel() / d, d]);
    let weigh =
        |x: &Tensor, k: u64| flat(x)?.mul(&Tensor::new(input(&[x.numel() / d, d], k).array().cast(dtype)))?.sum_all();
    let ends = |cells_new: &Tensor, sets: &Tensor, own_new: &Tensor| -> Result<Ends> {
        let loss = weigh(cells_new, 91)?.add(&weigh(sets, 92)?)?.add(&weigh(own_new, 93)?)?;
        let grads = loss.reshape(&[1])?.backward()?;
        let mut out = vec![values(&flat(cells_new)?), values(&flat(sets)?), values(&flat(own_new)?)];
        for p in params.all() {
            out.push(grads.param(&p).expect("every parameter is used").sum()?.to_f64());
        }
        for leaf in [&cells, &own, &tables, &columns, &rows] {
            out.push(grads.of(leaf).expect("every input is used").to_f64());
        }
        Ok(out)
    };
    let sets = Tensor::concat(&[&flat(&tables)?, &flat(&columns)?, &flat(&rows)?], 0)?;
    let order = Array::from_slice(&order, &[order.len()])?;
    let e = Tensor::concat(&[&sets.index_select(0, &order)?, &flat(&own)?], 0)?;
    let (x, e) = layer.forward(&flat(&cells)?, &e, &structure, &Ctx::eval())?;
    let m = order.numel();
    // Back into the order of the dense form.
    let mut back = vec![0u32; m];
    order.to_vec::<u32>()?.iter().enumerate().for_each(|(i, &o)| back[o as usize] = i as u32);
    let sets = e.slice(0, 0..m)?.index_select(0, Array::from_slice(&back, &[m])?)?;
    let general = ends(&x, &sets, &e.slice(0, m..e.shape()[0])?)?;
    let mask = |k: usize| -> Result<Tensor> { Ok(Tensor::new(Array::from_slice(&kept[k], &[b, r, c])?.cast(dtype))) };
    let mask = GridMask { tables: mask(0)?, columns: mask(1)?, rows: mask(2)? };
    let grid = Grid {
        cells: cells.clone(),
        tables: tables.clone(),
        columns: columns.clone(),
        rows: rows.clone(),
        own: own.clone(),
    };
    let g = layer.forward_grid(&grid, (drop > 0.0).then_some(&mask), &Ctx::eval())?;
    let sets = Tensor::concat(&[&flat(&g.tables)?, &flat(&g.columns)?, &flat(&g.rows)?], 0)?;
    Ok((general, ends(&g.cells, &sets, &g.own)?))
}

#[test]
fn the_general_path_is_the_dense_one() {
    for (dtype, value, gradient) in [(DType::F64, 1e-11, 1e-10), (DType::F32, 1e-5, 1e-4)] {
        for (i, size) in [(2, 5, 4), (3, 1, 4), (2, 6, 1), (1, 1, 1), (4, 3, 3)].into_iter().enumerate() {
            // With 0.9, whole rows and columns are empty.
            for drop in [0.0, 0.3, 0.9] {
                let (general, dense) = both_paths(dtype, size, drop, 1 + i as u64).unwrap();
                for (k, (a, b)) in general.iter().zip(&dense).enumerate() {
                    let scale = b.iter().fold(1.0f64, |m, x| m.max(x.abs()));
                    let tolerance = if k < 3 { value } else { gradient };
                    let error = far(a, b) / scale;
                    assert!(error <= tolerance, "{dtype} {size:?}, {drop} dropped, part {k}: off by {error:.1e}");
                }
            }
        }
    }
}

/// A hypergraph of its own gives what it gives in a batch; one may have no nodes, no hyperedges, or neither.
#[test]
fn a_batch_is_its_hypergraphs_one_by_one() {
    let d = 6;
    let params = Params::new(4, DType::F64);
    let (layer, deep) =
        (HyperTrans::new(&params.at("a"), d, 2).unwrap(), DeepSets::new(&params.at("b"), d, 5).unwrap());
    let hgnn = Hgnn::new(&params.at("c"), d, d).unwrap();
    stirred(&params);
    let graphs = [
        random(4, 9, Repeats::Keep, 1),
        Hypergraph::from_sets(3, &[], Repeats::Refuse).unwrap(),
        Hypergraph::from_sets(0, &[vec![], vec![]], Repeats::Refuse).unwrap(),
        Hypergraph::from_sets(0, &[], Repeats::Refuse).unwrap(),
        random(6, 2, Repeats::Keep, 2),
    ];
    let batch = Hypergraph::batch(&graphs).unwrap();
    assert_eq!((batch.nodes(), batch.edges(), batch.samples()), (13, 13, 5));
    let (x, e) = (input(&[batch.nodes(), d], 5), input(&[batch.edges(), d], 6));
    let run = |x: &Tensor, e: &Tensor, s: &Structure| {
        let (a, b) = layer.forward(x, e, s, &Ctx::eval()).unwrap();
        let (c, f) = deep.forward(x, s, &Ctx::eval()).unwrap();
        let h = hgnn.forward(x, s, None, &Ctx::eval()).unwrap();
        ([a, c, h].map(|t| values(&t)), [b, f].map(|t| values(&t)))
    };
    let all = run(&x, &e, batch.structure());
    let (mut n, mut m) = (0, 0);
    for g in &graphs {
        let (to_n, to_m) = (n + g.nodes(), m + g.edges());
        let one = run(&x.slice(0, n..to_n).unwrap(), &e.slice(0, m..to_m).unwrap(), g.structure());
        for k in 0..3 {
            assert!(far(&one.0[k], &all.0[k][n * d..to_n * d]) < 1e-12, "nodes {n}..{to_n}, layer {k}");
        }
        for k in 0..2 {
            assert!(far(&one.1[k], &all.1[k][m * d..to_m * d]) < 1e-12, "hyperedges {m}..{to_m}, layer {k}");
        }
        (n, m) = (to_n, to_m);
    }
}

#[test]
fn each_hypergraphs_gradient_is_its_own() {
    let d = 6;
    let graphs: Vec<Hypergraph> =
        (0..4).map(|i| random(3 + i, 5, Repeats::Keep, 20 + i as u64).with_own_edges().unwrap()).collect();
    let batch = Hypergraph::batch(&graphs).unwrap();
    let s = batch.structure();
    let (x, e) = (input(&[batch.nodes(), d], 5), input(&[batch.edges(), d], 6));
    // One loss for each hypergraph: a random weighting of its nodes' and hyperedges' states.
    let nodes = Segments::lengths(&graphs.iter().map(|g| g.nodes()).collect::<Vec<_>>());
    let edges = Segments::lengths(&graphs.iter().map(|g| g.edges()).collect::<Vec<_>>());
    let total = |x: &Tensor, of: &Segments, k: u64| -> Result<Tensor> {
        x.mul(&input(x.shape(), k))?.sin()?.segment_sum(of)?.sum(&[1], false)
    };
    let check = |what: &str, params: &Params, losses: &dyn Fn() -> Result<Tensor>| {
        stirred(params);
        let report = check::per_sample(losses, &params.all(), 1, 1e-9).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(report.worst() < 1e-9);
    };
    let params = Params::new(5, DType::F64);
    let layer = HyperTrans::new(&params, d, 3).unwrap();
    check("HyperTrans", &params, &|| {
        let (x, e) = layer.forward(&x, &e, s, &Ctx::eval())?;
        total(&x, &nodes, 7)?.add(&total(&e, &edges, 8)?)
    });
    for how in [Aggregate::Sum, Aggregate::Mean, Aggregate::Max] {
        let params = Params::new(6, DType::F64);
        let layer = DeepSets::builder(d, 5).how(how).build(&params).unwrap();
        check("DeepSets", &params, &|| {
            let (x, e) = layer.forward(&x, s, &Ctx::eval())?;
            total(&x, &nodes, 7)?.add(&total(&e, &edges, 8)?)
        });
    }
    let params = Params::new(7, DType::F64);
    let layer = Hgnn::new(&params, d, 4).unwrap();
    check("Hgnn", &params, &|| total(&layer.forward(&x, s, None, &Ctx::eval())?, &nodes, 7));
}

/// Nodes and hyperedges numbered differently: the same states, to the bit where sums are taken by values.
#[test]
fn numbers_of_nodes_and_hyperedges_do_not_matter() {
    let (n, m, d) = (9, 12, 8);
    let g = random(n, m, Repeats::Merge, 31).with_own_edges().unwrap();
    let edges = g.edges();
    let (x, e) = (input(&[n, d], 1).cast(DType::F32).unwrap(), input(&[edges, d], 2).cast(DType::F32).unwrap());
    let params = Params::new(3, DType::F32);
    let (layer, hgnn) = (HyperTrans::new(&params.at("a"), d, 2).unwrap(), Hgnn::new(&params.at("b"), d, d).unwrap());
    stirred(&params);
    let nodes: Vec<usize> = prismgrad::data::shuffled(n, 5);
    let sets: Vec<usize> = prismgrad::data::shuffled(edges, 6);
    let place = |order: &[usize], of: u32| order.iter().position(|&o| o == of as usize).unwrap() as u32;
    let moved: Vec<Vec<u32>> = sets.iter().map(|&e| g.set(e).iter().map(|&v| place(&nodes, v)).collect()).collect();
    let other = Hypergraph::from_sets(n, &moved, Repeats::Refuse).unwrap();
    let take = |x: &Tensor, order: &[usize]| {
        let ids: Vec<u32> = order.iter().map(|&o| o as u32).collect();
        x.index_select(0, Array::from_slice(&ids, &[ids.len()]).unwrap()).unwrap()
    };
    for exact in [false, true] {
        let run = |x: &Tensor, e: &Tensor, s: &Structure| {
            let s = if exact { s.by_values() } else { s.clone() };
            let (a, b) = layer.forward(x, e, &s, &Ctx::eval()).unwrap();
            (a, b, hgnn.forward(x, &s, None, &Ctx::eval()).unwrap())
        };
        let want = run(&x, &e, g.structure());
        let got = run(&take(&x, &nodes), &take(&e, &sets), other.structure());
        let pairs = [(&want.0, &got.0, &nodes), (&want.1, &got.1, &sets), (&want.2, &got.2, &nodes)];
        for (want, got, order) in pairs {
            let error = far(&values(&take(want, order)), &values(got));
            assert!(if exact { error == 0.0 } else { error < 1e-5 }, "exact {exact}: off by {error:.1e}");
        }
    }
}

/// Degrees and sizes stay, members change.
#[test]
fn rewiring_keeps_degrees_and_sizes() {
    let texts: Vec<String> = (0..60u64)
        .map(|i| {
            let mut rng = Rng::new(i);
            (0..8).map(|_| format!("w{} ", rng.below(30))).collect()
        })
        .collect();
    let (g, words) = Hypergraph::of_words(&texts, 2..=40).unwrap();
    assert_eq!(g.nodes(), 60);
    assert!(words.is_sorted() && words.len() == g.edges());
    let other = g.rewired(&mut Rng::new(1)).unwrap();
    let sizes = |g: &Hypergraph| (0..g.edges()).map(|e| g.set(e).len()).collect::<Vec<_>>();
    let degrees = |g: &Hypergraph| (0..60).map(|v| g.structure().edges_of().set(v).len()).collect::<Vec<_>>();
    assert_eq!((sizes(&g), degrees(&g)), (sizes(&other), degrees(&other)));
    let same = |e: usize| g.set(e).iter().filter(|v| other.set(e).contains(v)).count();
    let stayed: usize = (0..g.edges()).map(same).sum();
    assert!(stayed < g.incidences() * 6 / 10, "{stayed} of {} incidences are where they were", g.incidences());
    for e in 0..other.edges() {
        let mut set = other.set(e).to_vec();
        set.sort();
        assert!(set.windows(2).all(|w| w[0] != w[1]), "a node is in a hyperedge twice");
    }
}

#[test]
fn bad_input_is_refused_in_words() {
    let refused = |r: Result<Hypergraph>, words: &[&str]| {
        let e = r.err().unwrap_or_else(|| panic!("accepted; expected {words:?}")).to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    };
    refused(Hypergraph::from_pairs(3, 2, &[(0, 0), (3, 1)], Repeats::Refuse), &["hyperedge 1", "node 3", "0..3"]);
    refused(Hypergraph::from_pairs(3, 2, &[(0, 2)], Repeats::Refuse), &["hyperedge 2", "0..2"]);
    refused(Hypergraph::from_pairs(3, 2, &[(1, 0), (1, 0)], Repeats::Refuse), &["node 1 twice"]);
    assert_eq!(Hypergraph::from_pairs(3, 2, &[(1, 0), (1, 0)], Repeats::Merge).unwrap().set(0), [1]);
    assert_eq!(Hypergraph::from_pairs(3, 2, &[(1, 0), (1, 0)], Repeats::Keep).unwrap().set(0), [1, 1]);
    let dense = |v: &[f64]| Hypergraph::from_dense(&Array::from_slice(v, &[2, 2]).unwrap());
    refused(dense(&[0.0, 1.0, 0.5, 0.0]), &["0.5 at node 1 and hyperedge 0"]);
    assert_eq!(dense(&[0.0, 1.0, 1.0, 1.0]).unwrap().set(1), [0, 1]);
    refused(Hypergraph::table(0, 3), &["0 rows"]);
    let one = Hypergraph::table(2, 2).unwrap();
    refused(one.clone().with_kinds(vec![0]), &["1 kinds for 5"]);
    let two = Hypergraph::batch(&[one.clone(), one.clone()]).unwrap();
    refused(Hypergraph::batch(&[one.clone(), two.clone()]), &["hypergraph 1 is a batch of 2"]);
    refused(one.thinned(1.5, &mut Rng::new(1)), &["1.5"]);
    // A set over two samples.
    let across = Incidence::new(&Segments::lengths(&[2]), vec![0, 1], 2).unwrap();
    let samples = |owners: &[u32]| Samples::owners(owners.to_vec(), 2).unwrap();
    let e = Structure::new(across.clone(), samples(&[0, 1]), samples(&[0])).unwrap_err().to_string();
    assert!(e.contains("hyperedge 0 of sample 0 has node 1 of sample 1"), "{e}");
    let e = Structure::new(across, samples(&[0, 1]), samples(&[0, 0])).unwrap_err().to_string();
    assert!(e.contains("2 nodes and 2 hyperedges"), "{e}");
    let e = Incidence::new(&Segments::lengths(&[1, 1]), vec![0, 5], 5).unwrap_err().to_string();
    assert!(e.contains("member 5 of set 1"), "{e}");
    // Layers.
    let params = Params::new(0, DType::F32);
    let e = SetAttention::new(&params, 6, 4).err().unwrap().to_string();
    assert!(e.contains("6 does not divide into 4 heads"), "{e}");
    let layer = HyperTrans::new(&params, 6, 2).unwrap();
    let x = Tensor::zeros(&[4, 6], DType::F32);
    let e = layer.forward(&x, &x, one.structure(), &Ctx::eval()).err().unwrap().to_string();
    assert!(e.contains("[4, 6]") && e.contains("[5, 6]"), "{e}");
    let hgnn = Hgnn::new(&params.at("h"), 6, 2).unwrap();
    let e = hgnn.forward(&x, one.structure(), Some(&[1.0]), &Ctx::eval()).err().unwrap().to_string();
    assert!(e.contains("5 positive numbers"), "{e}");
    let sets = one.nodes_of();
    let e = x.incidence_sum(&sets.flipped(), None).err().unwrap().to_string();
    assert!(e.contains("4 rows") && e.contains("5 sources"), "{e}");
    let e = x.incidence_sum(sets, Some(&Tensor::zeros(&[12, 4], DType::F32))).err().unwrap().to_string();
    assert!(e.contains("[12, 4]"), "{e}");
}

device_tests! {
    /// Values, gradients and norms on every device, in both precisions of activations, and nothing is read by the host on the way.
    fn a_layer_is_the_same_on_every_device(device) {
        let d = 8;
        let graphs = [random(5, 7, Repeats::Keep, 1).with_own_edges().unwrap(), Hypergraph::table(2, 3).unwrap()];
        let batch = Hypergraph::batch(&graphs).unwrap();
        let s = batch.structure();
        let params = Params::new(5, DType::F64);
        let layer = HyperTrans::new(&params.at("a"), d, 2).unwrap();
        let deep = DeepSets::builder(d, 6).how(Aggregate::Mean).build(&params.at("b")).unwrap();
        stirred(&params);
        let (x, e) = (input(&[batch.nodes(), d], 5), input(&[batch.edges(), d], 6));
        let nodes = Segments::lengths(&graphs.iter().map(|g| g.nodes()).collect::<Vec<_>>());
        let edges = Segments::lengths(&graphs.iter().map(|g| g.edges()).collect::<Vec<_>>());
        let run = |x: &Tensor, e: &Tensor| -> Result<Tensor> {
            let (x, e) = layer.forward(x, e, s, &Ctx::eval())?;
            let (x, f) = deep.forward(&x, s, &Ctx::eval())?;
            let nodes = x.sin()?.segment_sum(&nodes)?.sum(&[1], false)?;
            nodes.add(&e.add(&f)?.sin()?.segment_sum(&edges)?.sum(&[1], false)?)
        };
        let queries = |grads: &prismgrad::Gradients| {
            params.all().iter().map(|p| {
                let g = grads.param(p).unwrap();
                (g.sum().unwrap().to_f64(), g.sample_sq_norms().unwrap())
            }).collect::<Vec<_>>()
        };
        let want = run(&x, &e).unwrap();
        let wanted = queries(&want.backward().unwrap());
        params.to(device).unwrap();
        let (x, e) = (x.to(device).unwrap(), e.to(device).unwrap());
        // The sets are copied to the device by the first pass.
        let first = run(&x, &e).unwrap();
        #[cfg(feature = "emulator")]
        let before = prismgrad::device::emulator::stat("synchronisations");
        let got = run(&x, &e).unwrap();
        let grads = got.backward().unwrap();
        #[cfg(feature = "emulator")]
        assert_eq!(prismgrad::device::emulator::stat("synchronisations"), before, "the host has waited for the device");
        drop(first);
        assert!(far(&values(&got), &values(&want)) < 1e-10);
        for ((a, b), (c, d)) in queries(&grads).iter().zip(&wanted) {
            assert!(far(a, c) < 1e-9 && far(b, d) < 1e-8);
        }
        params.to(&prismgrad::Device::Cpu).unwrap();
    }
}
