//! What sources and searches have cost.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The privacy that a source was tuned with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Privacy {
    /// ε of the run.
    pub epsilon: f64,
    /// Its δ.
    pub delta: f64,
}

/// What tuning on one source has cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Training tokens, or other samples.
    pub tokens: u64,
    /// Floating-point operations.
    pub flops: f64,
    /// Seconds on the clock.
    pub seconds: f64,
    /// ε and δ, if the run was private; then its records are taken to be in no other source.
    pub privacy: Option<Privacy>,
}

/// The costs of a pool's sources and searches.
///
/// Private sources have disjoint records, so that the edited model protects each record as its own source does (parallel composition,
/// McSherry 2009): the whole has the largest ε and the largest δ. This holds while weights are chosen on public data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Name and cost of each source that was ever tuned, also of those that were replaced or removed since.
    pub sources: Vec<(String, Cost)>,
    /// Candidates and seconds of each search.
    pub searches: Vec<(usize, f64)>,
}

impl Ledger {
    /// Tokens of all sources.
    pub fn tokens(&self) -> u64 {
        self.sources.iter().map(|(_, c)| c.tokens).sum()
    }
    /// FLOPs of all sources.
    pub fn flops(&self) -> f64 {
        self.sources.iter().map(|(_, c)| c.flops).sum()
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:20} {:>12} {:>12} {:>9}  privacy", "source", "tokens", "FLOPs", "seconds")?;
        for (name, c) in &self.sources {
            write!(f, "{name:20} {:>12} {:>12.3e} {:>9.1}  ", c.tokens, c.flops, c.seconds)?;
            match c.privacy {
                Some(p) => writeln!(f, "ε {:.3} at δ {:e}", p.epsilon, p.delta)?,
                None => writeln!(f, "public")?,
            }
        }
        let candidates: usize = self.searches.iter().map(|s| s.0).sum();
        let seconds: f64 = self.searches.iter().map(|s| s.1).sum();
        writeln!(f, "{:20} {:>12} {:>12} {seconds:>9.1}  {candidates} candidates", "search", "", "")?;
        write!(f, "{:20} {:>12} {:>12.3e}", "all", self.tokens(), self.flops())
    }
}
