//! The ledger of what sources and searches have cost.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// The privacy budget with which a source was tuned.
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
    /// ε and δ, if the run was private. The records of a private run are assumed to be in no other source.
    pub privacy: Option<Privacy>,
}

/// The costs of a pool's sources and searches.
///
/// Private sources are assumed to have disjoint records, so that the edited model protects each record as its own source does (parallel
/// composition, McSherry 2009): the whole has the largest ε and the largest δ. This holds as long as weights are chosen on public data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Name and cost of each run of tuning, including those of sources that were replaced or removed since.
    pub sources: Vec<(String, Cost)>,
    /// Number of candidates and seconds of each search.
    pub searches: Vec<(usize, f64)>,
}

impl Ledger {
    /// The tokens of all sources together.
    pub fn tokens(&self) -> u64 {
        self.sources.iter().map(|(_, c)| c.tokens).sum()
    }
    /// ε and δ of everything that was made of the private sources, whose records are each in one source: the largest of any source. The
    /// runs of one source, including replaced ones, used the same records, so their ε and δ are added up (basic composition). `None` if no
    /// source is private.
    ///
    /// ```
    /// use prismgrad::systems::editing::{Cost, Ledger, Privacy};
    /// let cost = |epsilon| Cost { privacy: Some(Privacy { epsilon, delta: 1e-5 }), ..Cost::default() };
    /// let names = ["letters", "mails", "letters"].map(String::from);
    /// let mut ledger = Ledger::default();
    /// ledger.sources.extend(names.into_iter().zip([1.0, 3.0, 1.5].map(cost)));
    /// assert_eq!(ledger.privacy(), Some(Privacy { epsilon: 3.0, delta: 2e-5 }));
    /// ```
    pub fn privacy(&self) -> Option<Privacy> {
        let mut sums: BTreeMap<&str, Privacy> = BTreeMap::new();
        for (name, p) in self.sources.iter().filter_map(|(n, c)| Some((n, c.privacy?))) {
            let sum = sums.entry(name).or_insert(Privacy { epsilon: 0.0, delta: 0.0 });
            *sum = Privacy { epsilon: sum.epsilon + p.epsilon, delta: sum.delta + p.delta };
        }
        let largest =
            |a: Privacy, b: &Privacy| Privacy { epsilon: a.epsilon.max(b.epsilon), delta: a.delta.max(b.delta) };
        let mut all = sums.values();
        all.next().map(|first| all.fold(*first, largest))
    }
    /// The FLOPs of all sources together.
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
        write!(f, "{:20} {:>12} {:>12.3e}", "all", self.tokens(), self.flops())?;
        match self.privacy() {
            Some(p) => write!(f, " {:>9}  ε {:.3} at δ {:e}", "", p.epsilon, p.delta),
            None => Ok(()),
        }
    }
}
