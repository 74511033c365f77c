//! Bar charts of named values.

use std::path::{Path, PathBuf};

use super::axis::Axis;
use super::scene::{Anchor, Scene, shorten, text_width};
use super::{AXIS, GRID, INK, PALETTE, SOFT, TEXT_SIZE};
use crate::base::Result;

/// Horizontal bars, one per name, with their values beside them and optional intervals.
#[derive(Clone, Debug)]
pub struct BarChart {
    title: String,
    label: String,
    bars: Vec<Bar>,
}

/// Name, value, interval.
type Bar = (String, f64, Option<(f64, f64)>);

impl BarChart {
    /// An empty chart with a title, which may be empty.
    pub fn new(title: impl Into<String>) -> Self {
        BarChart { title: title.into(), label: String::new(), bars: Vec::new() }
    }
    /// Sets the label of the values, with their unit.
    pub fn label(mut self, text: impl Into<String>) -> Self {
        self.label = text.into();
        self
    }
    /// Adds a bar; the first is on top.
    pub fn bar(mut self, name: impl Into<String>, value: f64) -> Self {
        self.bars.push((name.into(), value, None));
        self
    }
    /// Adds a bar with an interval around its value.
    pub fn bar_with_interval(mut self, name: impl Into<String>, value: f64, low: f64, high: f64) -> Self {
        self.bars.push((name.into(), value, Some((low, high))));
        self
    }

    /// Writes `<path>.svg` and `<path>.png`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<[PathBuf; 2]> {
        super::save(&self.scene(), path.as_ref())
    }

    /// The chart as a drawing.
    pub fn scene(&self) -> Scene {
        const ROW: f32 = 30.0;
        const BAR: f32 = 18.0;
        let below = if self.label.is_empty() { 34.0 } else { 54.0 };
        let mut scene = Scene::new(720.0, 0.0);
        let top = super::title(&mut scene, &self.title);
        let bottom = top + ROW * self.bars.len().max(1) as f32 + 4.0;
        scene.height = bottom + below;
        let ends = self.bars.iter().flat_map(|(_, v, i)| [Some(*v), i.map(|i| i.0), i.map(|i| i.1)]).flatten();
        let axis = Axis::new(ends.chain([0.0]), false, false, 6);
        let names = self.bars.iter().map(|b| text_width(&b.0, TEXT_SIZE)).fold(0.0, f32::max).min(scene.width * 0.35);
        let values: Vec<String> = self.bars.iter().map(|b| short(b.1)).collect();
        let widest = values.iter().map(|v| text_width(v, TEXT_SIZE)).fold(0.0, f32::max);
        // Values are written at the outer ends of their bars, which is on the left for negative ones.
        let negative = self.bars.iter().any(|b| b.1 < 0.0);
        let edge = 16.0 + names + 10.0;
        let (left, right) = (if negative { edge + widest + 6.0 } else { edge }, scene.width - 24.0 - widest);
        let at = |value: f64| axis.place(value).map(|p| left + p * (right - left));
        for (value, text) in &axis.ticks {
            let Some(x) = at(*value) else { continue };
            scene.line(vec![(x, top), (x, bottom)], 1.0, GRID, false);
            scene.text(x, bottom + 18.0, TEXT_SIZE, SOFT, Anchor::Middle, text);
        }
        for (i, ((name, value, interval), text)) in self.bars.iter().zip(&values).enumerate() {
            let y = top + ROW * i as f32 + (ROW - BAR) / 2.0;
            let middle = y + BAR / 2.0;
            let name = shorten(name, TEXT_SIZE, names);
            scene.text(edge - 10.0, middle + 4.0, TEXT_SIZE, INK, Anchor::End, &name);
            let (Some(zero), Some(x)) = (at(0.0), at(*value)) else {
                scene.text(edge + 6.0, middle + 4.0, TEXT_SIZE, SOFT, Anchor::Start, "no value");
                continue;
            };
            scene.rectangle(zero.min(x), y, (x - zero).abs(), BAR, PALETTE[0]);
            let mut ends = (x.min(zero), x.max(zero));
            if let Some((Some(low), Some(high))) = interval.map(|(low, high)| (at(low), at(high))) {
                scene.line(vec![(low, middle), (high, middle)], 1.5, INK, false);
                for x in [low, high] {
                    scene.line(vec![(x, middle - 4.0), (x, middle + 4.0)], 1.5, INK, false);
                }
                ends = (ends.0.min(low).min(high), ends.1.max(low).max(high));
            }
            if *value < 0.0 {
                scene.text(ends.0 - 6.0, middle + 4.0, TEXT_SIZE, INK, Anchor::End, text);
            } else {
                scene.text(ends.1 + 6.0, middle + 4.0, TEXT_SIZE, INK, Anchor::Start, text);
            }
        }
        if let Some(zero) = at(0.0) {
            scene.line(vec![(zero, top), (zero, bottom)], 1.0, AXIS, false);
        }
        if !self.label.is_empty() {
            let text = shorten(&self.label, TEXT_SIZE, scene.width - 32.0);
            let y = scene.height - 14.0;
            scene.text((left + right) / 2.0, y, TEXT_SIZE, SOFT, Anchor::Middle, &text);
        }
        scene
    }
}

/// The value with three significant digits.
pub(super) fn short(value: f64) -> String {
    if !value.is_finite() {
        return String::new();
    }
    let size = value.abs();
    let text = match size {
        0.0 => "0".into(),
        s if !(1e-3..1e6).contains(&s) => format!("{value:.1e}"),
        s => format!("{value:.*}", (2 - s.log10().floor() as i32).clamp(0, 5) as usize),
    };
    text.replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_can_be_drawn() {
        let chart = BarChart::new("t").label("accuracy").bar("a & b", 0.5).bar("nan", f64::NAN);
        let chart =
            chart.bar_with_interval("negative", -3.0, -4.0, f64::INFINITY).bar_with_interval("c", 1.0, 0.5, 2.0);
        let svg = chart.scene().svg().unwrap();
        assert!(!svg.contains("NaN\"") && svg.contains("no value") && svg.contains("a &amp; b"));
        chart.scene().png(1.0).unwrap();
        BarChart::new("").scene().png(1.0).unwrap();
        assert_eq!((short(0.12345), short(1234.0), short(-2e-9)), ("0.123".into(), "1234".into(), "−2.0e−9".into()));
    }
}
