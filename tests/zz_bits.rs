//! Temporary: a hash of the bits of every query of every kind.
use prismgrad::autograd::{Factor, Groups};
use prismgrad::{Array, DType, Param, ParamGrad, Samples};

struct H(u64, usize);
impl H {
    fn add(&mut self, what: &str, v: &[f64]) {
        let mut h = 0xcbf29ce484222325u64;
        for x in v {
            for b in x.to_bits().to_le_bytes() {
                h = (h ^ b as u64).wrapping_mul(0x100000001b3);
            }
        }
        println!("BITS {:04} {what} {h:016x} {}", self.1, v.len());
        self.1 += 1;
        self.0 ^= h.rotate_left((self.1 % 64) as u32);
    }
}

#[test]
fn bits() {
    let mut h = H(0, 0);
    for dtype in [DType::F32, DType::F64] {
        for (rows, big) in [(24usize, false), (150, true)] {
            let owner: Vec<u32> = (0..rows).map(|r| ((r * 7 + r / 5) % 6) as u32).collect();
            let maps: Vec<(&str, Samples)> = vec![
                ("uniform", Samples::uniform(6, rows / 6)),
                ("ragged", Samples::ragged(&[0, 3, 3, 5, 9, rows - 2, rows]).unwrap()),
                ("owners", Samples::owners(owner, 6).unwrap()),
            ];
            let (r, c) = if big { (40, 33) } else { (4, 6) };
            let arr = |k: usize, w: usize| {
                Array::generate(&[rows, w], dtype, move |i| ((i * 37 + k * 11) as f64 * 0.137).sin())
            };
            for (m, s) in &maps {
                let ids = |n: usize| Array::generate(&[rows], DType::U32, move |i| ((i * 5 + i / 3) % n) as f64);
                let groups =
                    |n: usize| Groups::of_ids((0..rows).map(|i| ((i * 5 + i / 3) % n) as u32).collect(), n).unwrap();
                let lumps = |n: usize| Groups::of_ids((0..rows).map(|i| (i * n / rows) as u32).collect(), n).unwrap();
                let sets: Vec<(&str, Vec<usize>, Vec<Factor>)> = vec![
                    (
                        "outer",
                        vec![r, c],
                        vec![Factor::Outer { left: arr(1, r), right: arr(2, c), samples: s.clone() }],
                    ),
                    ("rowsum", vec![c], vec![Factor::RowSum { grad: arr(3, c), samples: s.clone() }]),
                    (
                        "scaled",
                        vec![c],
                        vec![Factor::ScaledRowSum { grad: arr(3, c), scale: arr(4, c), samples: s.clone() }],
                    ),
                    ("lookup", vec![r, c], vec![Factor::Lookup { ids: ids(r), grad: arr(5, c), samples: s.clone() }]),
                    (
                        "grouped",
                        vec![3, r, c],
                        vec![Factor::GroupedOuter {
                            left: arr(1, r),
                            right: arr(2, c),
                            group: groups(3),
                            samples: s.clone(),
                        }],
                    ),
                    (
                        "lumps",
                        vec![3, r, c],
                        vec![Factor::GroupedOuter {
                            left: arr(1, r),
                            right: arr(2, c),
                            group: lumps(3),
                            samples: s.clone(),
                        }],
                    ),
                    (
                        "persample",
                        vec![r, c],
                        vec![Factor::PerSample {
                            grads: Array::generate(&[6, r, c], dtype, |i| (i as f64 * 0.31).cos()),
                        }],
                    ),
                    (
                        "tied",
                        vec![r, c],
                        vec![
                            Factor::Lookup { ids: ids(r), grad: arr(5, c), samples: s.clone() },
                            Factor::Outer { left: arr(1, r), right: arr(2, c), samples: s.clone() },
                        ],
                    ),
                    (
                        "tied2",
                        vec![r, c],
                        vec![
                            Factor::Outer { left: arr(1, r), right: arr(2, c), samples: s.clone() },
                            Factor::Lookup { ids: ids(r), grad: arr(5, c), samples: s.clone() },
                            Factor::Outer { left: arr(6, r), right: arr(7, c), samples: s.clone() },
                            Factor::Lookup { ids: ids(r), grad: arr(8, c), samples: s.clone() },
                            Factor::PerSample {
                                grads: Array::generate(&[6, r, c], dtype, |i| (i as f64 * 0.31).cos()),
                            },
                        ],
                    ),
                    (
                        "grouped2",
                        vec![3, r, c],
                        vec![
                            Factor::GroupedOuter {
                                left: arr(1, r),
                                right: arr(2, c),
                                group: groups(3),
                                samples: s.clone(),
                            },
                            Factor::GroupedOuter {
                                left: arr(3, r),
                                right: arr(4, c),
                                group: lumps(3),
                                samples: s.clone(),
                            },
                        ],
                    ),
                    (
                        "rows2",
                        vec![c],
                        vec![
                            Factor::RowSum { grad: arr(3, c), samples: s.clone() },
                            Factor::ScaledRowSum { grad: arr(3, c), scale: arr(4, c), samples: s.clone() },
                        ],
                    ),
                ];
                for (name, shape, factors) in sets {
                    let p = Param::new("p", Array::zeros(&shape, dtype));
                    let mut pg = ParamGrad::new(p, 6);
                    for f in factors {
                        assert_eq!(f.samples(), Some(6));
                        h.add(&format!("{name} {} bytes", f.kind()), &[f.bytes() as f64]);
                        pg.push(f).unwrap();
                    }
                    let tag = format!("{dtype} {rows} {m} {name}");
                    h.add(&format!("{tag} sum"), &pg.sum().unwrap().to_f64());
                    let w = [0.5, 0.0, 1.25, -2.0, 0.3, 1.0];
                    h.add(&format!("{tag} weighted"), &pg.weighted_sum(&w).unwrap().to_f64());
                    h.add(&format!("{tag} norms"), &pg.sample_sq_norms().unwrap());
                    let (sum, tot) = pg.clipped_sum(&[0.1; 6], &|t| 1.0 / (1.0 + t)).unwrap();
                    h.add(&format!("{tag} clipped"), &sum.to_f64());
                    h.add(&format!("{tag} totals"), &tot);
                    h.add(&format!("{tag} per_sample"), &pg.per_sample().unwrap().to_f64());
                    h.add(&format!("{tag} gram"), &pg.gram(&pg).unwrap().to_f64());
                }
            }
            let p = Param::new("p", Array::zeros(&[4], dtype));
            let mut pg = ParamGrad::new(p, 1);
            let f = Factor::Dense { grad: Array::ones(&[4], dtype) };
            println!("BITS {:?} {} {} ", f.samples(), f.kind(), f.bytes());
            pg.push(f).unwrap();
            println!("BITS {:?} {:?}", pg.sum().unwrap().to_f64(), pg.sample_sq_norms().unwrap_err().to_string());
            for bad in [
                Factor::RowSum { grad: arr(1, 5), samples: Samples::uniform(1, rows) },
                Factor::RowSum { grad: arr(1, 4).cast(DType::F16), samples: Samples::uniform(1, rows) },
                Factor::Lookup { ids: arr(1, 1), grad: arr(1, 1), samples: Samples::uniform(1, rows) },
            ] {
                let e = pg.push(bad).unwrap_err().to_string();
                println!("BITS {}", &e[..e.len().min(150)].replace('\n', " "));
            }
        }
    }
    println!("BITS total {:016x}", h.0);
}
