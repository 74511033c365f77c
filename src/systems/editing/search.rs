//! Search for weights on validation data.

use super::merge::Merge;
use super::pool::VectorPool;
use crate::base::{Error, Result, philox};
use crate::io;
use crate::nn::Params;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Instant;

/// How weights in [0, 1] are tried.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Search {
    /// One weight at a time takes `grid` equally spaced values while the others stay fixed. All sources are visited `rounds` times. Every
    /// weight starts at 1/n.
    Coordinate {
        /// Number of values of each weight, at least 2.
        grid: usize,
        /// Number of times that every source is visited.
        rounds: usize,
    },
    /// All combinations of `grid` equally spaced values, which are gridⁿ candidates.
    Grid {
        /// Number of values of each weight, at least 2.
        grid: usize,
    },
    /// Random points, each weight uniform in [0, 1].
    Random {
        /// Number of points.
        candidates: usize,
        /// Seed of the points.
        seed: u64,
    },
}

/// Weights that were tried, and their loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// A weight for each source.
    pub weights: Vec<f64>,
    /// The value of the objective.
    pub loss: f64,
}

/// The result of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The weights of the smallest loss; of equal losses, those that were tried first.
    pub weights: Vec<f64>,
    /// The smallest loss.
    pub loss: f64,
    /// All candidates, in the order in which they were tried.
    pub tried: Vec<Candidate>,
}

/// The state on disk of a search that may be interrupted.
#[derive(Serialize, Deserialize)]
struct State {
    base: String,
    sources: Vec<String>,
    search: Search,
    tried: Vec<Candidate>,
}

impl VectorPool {
    /// Tries weights and returns the best. `objective` is called with `params` set to each candidate in turn and returns its loss on
    /// validation data. A loss that is NaN is never the best. Candidates are computed in memory; afterwards `params` have the best weights.
    ///
    /// With a `state` file, each loss is on disk before the next candidate is tried. If a search was killed and is started again with the
    /// same pool, settings and file, it takes known losses from the file, and ends with the same weights.
    ///
    /// # Errors
    /// If the settings are not valid, if the file belongs to another search, or if `objective` fails.
    pub fn search(
        &mut self,
        search: &Search,
        params: &Params,
        state: Option<&Path>,
        mut objective: impl FnMut(&Params) -> Result<f64>,
    ) -> Result<Found> {
        let (n, start) = (self.len(), Instant::now());
        let bad = |what: String| Err(Error::invalid("search", what));
        if n == 0 {
            return bad("a pool without sources".into());
        }
        match *search {
            Search::Coordinate { grid, rounds } if grid < 2 || rounds == 0 => {
                return bad(format!("a grid of {grid} values and {rounds} rounds; at least 2 and 1 are needed"));
            }
            Search::Grid { grid } if grid < 2 || (grid as f64).powi(n as i32) > 1e6 => {
                return bad(format!("a grid of {grid} values for {n} sources: 2 to a million candidates are allowed"));
            }
            Search::Random { candidates: 0, .. } => return bad("0 candidates".into()),
            _ => {}
        }
        let mut known = State {
            base: self.base_hash().to_string(),
            sources: self.names().iter().map(|s| s.to_string()).collect(),
            search: *search,
            tried: Vec::new(),
        };
        if let Some(path) = state.filter(|p| p.exists()) {
            let before: State = io::read_json(path)?;
            if (&before.base, &before.sources, &before.search) != (&known.base, &known.sources, &known.search) {
                return Err(Error::format(path, "is the state of a search over another pool or with other settings"));
            }
            known = before;
        }
        let mut tried: Vec<Candidate> = Vec::new();
        let mut evaluate = |pool: &VectorPool, weights: &[f64]| -> Result<f64> {
            let again = known.tried.iter().find(|c| c.weights == weights).map(|c| c.loss);
            let loss = match again {
                Some(loss) => loss,
                None => {
                    pool.apply(&Merge::Weights(weights.to_vec()), params)?;
                    let loss = objective(params)?;
                    // JSON has no NaN.
                    let loss = if loss.is_nan() { f64::MAX } else { loss.clamp(f64::MIN, f64::MAX) };
                    known.tried.push(Candidate { weights: weights.to_vec(), loss });
                    if let Some(path) = state {
                        io::write_json(path, &known)?;
                    }
                    loss
                }
            };
            tried.push(Candidate { weights: weights.to_vec(), loss });
            Ok(loss)
        };
        let value = |i: usize, grid: usize| i as f64 / (grid - 1) as f64;
        match *search {
            Search::Coordinate { grid, rounds } => {
                let mut at = vec![1.0 / n as f64; n];
                let mut best = evaluate(self, &at)?;
                for source in (0..rounds).flat_map(|_| 0..n) {
                    let own = at[source];
                    let mut chosen = own;
                    for w in (0..grid).map(|i| value(i, grid)).filter(|w| *w != own) {
                        at[source] = w;
                        let loss = evaluate(self, &at)?;
                        if loss < best {
                            (best, chosen) = (loss, w);
                        }
                    }
                    at[source] = chosen;
                }
            }
            Search::Grid { grid } => {
                for mut i in 0..grid.pow(n as u32) {
                    let mut digit = || {
                        let d = i % grid;
                        i /= grid;
                        value(d, grid)
                    };
                    let weights: Vec<f64> = (0..n).map(|_| digit()).collect();
                    evaluate(self, &weights)?;
                }
            }
            Search::Random { candidates, seed } => {
                for c in 0..candidates {
                    let weights: Vec<f64> = (0..n).map(|i| philox::uniform(seed, c as u64, i as u64)).collect();
                    evaluate(self, &weights)?;
                }
            }
        }
        let first = tried.iter().fold(None, |best: Option<&Candidate>, c| match best {
            Some(b) if b.loss <= c.loss => Some(b),
            _ => Some(c),
        });
        let Some(Candidate { weights, loss }) = first.cloned() else { return bad("nothing was tried".into()) };
        self.apply(&Merge::Weights(weights.clone()), params)?;
        self.ledger.searches.push((tried.len(), start.elapsed().as_secs_f64()));
        Ok(Found { weights, loss, tried })
    }
}
