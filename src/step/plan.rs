//! The plan: what is settled before the first step. Who is in which clipping group, and each group's threshold.

use crate::autograd::Param;
use crate::base::Result;
use crate::privacy::{ClipFn, ClipStyle, Thresholds};

/// The clipping groups over the parameters of a step: who belongs where, and each group's share of the threshold.
#[derive(Clone, Debug, Default)]
pub(super) struct Clipping {
    pub clip: ClipFn,
    /// Threshold and number of members of each group.
    pub groups: Vec<(f64, usize)>,
    /// The group of each parameter.
    pub group_of: Vec<usize>,
    /// The most one sample can move the clipped sum.
    pub sensitivity: f64,
}

impl Clipping {
    /// Groups by `style`; thresholds that compose to R = `threshold`.
    pub fn new(
        style: &ClipStyle,
        clip: ClipFn,
        threshold: f64,
        split: &Thresholds,
        params: &[Param],
    ) -> Result<Clipping> {
        let names: Vec<&str> = params.iter().map(Param::name).collect();
        let group_of = style.groups(&names)?;
        let mut members = vec![0; group_of.iter().max().map_or(0, |m| m + 1)];
        group_of.iter().for_each(|&g| members[g] += 1);
        let groups = split.split(threshold, members.len())?.into_iter().zip(members).collect();
        let mut clipping = Clipping { clip, groups, group_of, sensitivity: 0.0 };
        clipping.compose();
        Ok(clipping)
    }
    fn compose(&mut self) {
        let square = |&(r, _): &(f64, usize)| self.clip.sensitivity(r).powi(2);
        self.sensitivity = self.groups.iter().map(square).sum::<f64>().sqrt();
    }
    /// Each group's threshold.
    pub fn thresholds(&self) -> Vec<f64> {
        self.groups.iter().map(|g| g.0).collect()
    }
    /// Others; the sensitivity follows.
    pub fn set_thresholds(&mut self, thresholds: &[f64]) {
        self.groups.iter_mut().zip(thresholds).for_each(|(g, r)| g.0 = *r);
        self.compose();
    }
}
