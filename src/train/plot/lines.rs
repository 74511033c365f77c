//! Line charts.

use std::path::{Path, PathBuf};

use super::axis::Axis;
use super::scene::{Anchor, Color, Scene, shorten, text_width};
use super::{AXIS, GRID, INK, PALETTE, SOFT, TEXT_SIZE};
use crate::base::Result;

/// One line of a chart.
#[derive(Clone, Debug, Default)]
pub struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    band: Vec<(f64, f64, f64)>,
    dashed: bool,
    markers: bool,
}

impl Series {
    /// A named line through points (x, y). Points that are not finite leave a gap.
    pub fn new(name: impl Into<String>, points: impl Into<Vec<(f64, f64)>>) -> Self {
        Series { name: name.into(), points: points.into(), ..Series::default() }
    }
    /// Adds a shaded interval around the line: (x, lower, upper).
    pub fn band(mut self, band: impl Into<Vec<(f64, f64, f64)>>) -> Self {
        self.band = band.into();
        self
    }
    /// Draws the line dashed, for targets and limits.
    pub fn dashed(mut self) -> Self {
        self.dashed = true;
        self
    }
    /// Draws a dot at every point, for lines with few points.
    pub fn markers(mut self) -> Self {
        self.markers = true;
        self
    }
}

/// A chart of one or more lines. Their names are written at their ends, or in a legend if the ends do not allow it.
#[derive(Clone, Debug)]
pub struct LineChart {
    title: String,
    x_label: String,
    y_label: String,
    log_x: bool,
    log_y: bool,
    size: (f32, f32),
    series: Vec<Series>,
}

/// The inner part of a chart.
struct Frame {
    left: f32,
    right: f32,
    top: f32,
    bottom: f32,
    x: Axis,
    y: Axis,
}

impl Frame {
    fn place(&self, (x, y): (f64, f64)) -> Option<(f32, f32)> {
        let (x, y) = (self.x.place(x)?, self.y.place(y)?);
        Some((self.left + x * (self.right - self.left), self.bottom - y * (self.bottom - self.top)))
    }
}

impl LineChart {
    /// An empty chart of 720 × 420 pixels with a title, which may be empty.
    pub fn new(title: impl Into<String>) -> Self {
        LineChart {
            title: title.into(),
            x_label: String::new(),
            y_label: String::new(),
            log_x: false,
            log_y: false,
            size: (720.0, 420.0),
            series: Vec::new(),
        }
    }
    /// Sets the label of the horizontal axis, with its unit.
    pub fn x_label(mut self, text: impl Into<String>) -> Self {
        self.x_label = text.into();
        self
    }
    /// Sets the label of the vertical axis, with its unit.
    pub fn y_label(mut self, text: impl Into<String>) -> Self {
        self.y_label = text.into();
        self
    }
    /// Makes the horizontal axis logarithmic; points that are not positive are left out.
    pub fn log_x(mut self) -> Self {
        self.log_x = true;
        self
    }
    /// Makes the vertical axis logarithmic; points that are not positive are left out.
    pub fn log_y(mut self) -> Self {
        self.log_y = true;
        self
    }
    /// Sets the size, in pixels of the SVG; the PNG has twice as many.
    pub fn size(mut self, width: u32, height: u32) -> Self {
        self.size = (width.max(240) as f32, height.max(180) as f32);
        self
    }
    /// Adds a line.
    pub fn series(mut self, series: Series) -> Self {
        self.series.push(series);
        self
    }

    /// Writes `<path>.svg` and `<path>.png`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<[PathBuf; 2]> {
        super::save(&self.scene(), path.as_ref())
    }

    /// The chart as a drawing.
    pub fn scene(&self) -> Scene {
        let mut scene = Scene::new(self.size.0, self.size.1);
        let mut top = super::title(&mut scene, &self.title);
        let points = || self.series.iter().flat_map(|s| s.points.iter());
        let bands = || self.series.iter().flat_map(|s| s.band.iter());
        let x = Axis::new(points().map(|p| p.0).chain(bands().map(|b| b.0)), self.log_x, true, 7);
        let y_values = points().map(|p| p.1).chain(bands().flat_map(|b| [b.1, b.2]));
        let y = Axis::new(y_values, self.log_y, false, 5);

        let named: Vec<usize> = (0..self.series.len()).filter(|&i| !self.series[i].name.is_empty()).collect();
        let ends_right = |i: &usize| {
            let last =
                self.series[*i].points.iter().rev().find_map(|p| x.place(p.0).filter(|_| y.place(p.1).is_some()));
            last.is_some_and(|x| x > 0.9)
        };
        let direct = named.len() <= 7 && named.iter().all(ends_right);
        if !direct {
            top = self.legend(&mut scene, &named, top);
        }
        if !self.y_label.is_empty() {
            let text = shorten(&self.y_label, TEXT_SIZE, scene.width - 32.0);
            scene.text(16.0, top + 10.0, TEXT_SIZE, SOFT, Anchor::Start, &text);
            top += 26.0;
        }
        let widest = y.ticks.iter().map(|t| text_width(&t.1, TEXT_SIZE)).fold(20.0, f32::max);
        let name_width = |&i: &usize| text_width(&self.series[i].name, TEXT_SIZE);
        let names = if direct { named.iter().map(name_width).fold(0.0, f32::max).min(scene.width * 0.3) } else { 0.0 };
        let left = 16.0 + widest + 8.0;
        // The last tick label of the horizontal axis may stick out by half its width.
        let right = scene.width - (names + 26.0).max(28.0);
        let bottom = scene.height - if self.x_label.is_empty() { 34.0 } else { 54.0 };
        let frame = Frame { left, right, top, bottom, x, y };
        self.grid(&mut scene, &frame);
        for (i, series) in self.series.iter().enumerate() {
            draw_band(&mut scene, &frame, series, color(i));
        }
        for (i, series) in self.series.iter().enumerate() {
            draw_line(&mut scene, &frame, series, color(i), series.dashed || i >= PALETTE.len());
        }
        if direct {
            self.names(&mut scene, &frame, &named, names);
        }
        scene
    }

    fn grid(&self, scene: &mut Scene, frame: &Frame) {
        for (value, text) in &frame.y.ticks {
            let Some(place) = frame.y.place(*value) else { continue };
            let y = frame.bottom - place * (frame.bottom - frame.top);
            scene.line(vec![(frame.left, y), (frame.right, y)], 1.0, GRID, false);
            scene.text(frame.left - 8.0, y + 4.0, TEXT_SIZE, SOFT, Anchor::End, text);
        }
        scene.line(vec![(frame.left, frame.bottom), (frame.right, frame.bottom)], 1.0, AXIS, false);
        let mut free = f32::NEG_INFINITY;
        for (value, text) in &frame.x.ticks {
            let Some(place) = frame.x.place(*value) else { continue };
            let x = frame.left + place * (frame.right - frame.left);
            scene.line(vec![(x, frame.bottom), (x, frame.bottom + 4.0)], 1.0, AXIS, false);
            let half = text_width(text, TEXT_SIZE) / 2.0;
            if x - half >= free {
                scene.text(x, frame.bottom + 18.0, TEXT_SIZE, SOFT, Anchor::Middle, text);
                free = x + half + 10.0;
            }
        }
        if !self.x_label.is_empty() {
            let text = shorten(&self.x_label, TEXT_SIZE, scene.width - 32.0);
            let (x, y) = ((frame.left + frame.right) / 2.0, scene.height - 14.0);
            scene.text(x, y, TEXT_SIZE, SOFT, Anchor::Middle, &text);
        }
    }

    /// Writes names beside the ends of their lines, moved apart where they would overlap.
    fn names(&self, scene: &mut Scene, frame: &Frame, named: &[usize], width: f32) {
        const GAP: f32 = 16.0;
        let end = |&i: &usize| {
            let last = self.series[i].points.iter().rev().find_map(|&p| frame.place(p))?;
            Some((i, last, last.1))
        };
        let mut labels: Vec<(usize, (f32, f32), f32)> = named.iter().filter_map(end).collect();
        labels.sort_by(|a, b| a.2.total_cmp(&b.2));
        // Names stay above the axis, so that none comes near the labels below it.
        let (lowest, count) = (frame.bottom - 8.0, labels.len());
        for i in 0..count {
            let above = if i == 0 { frame.top } else { labels[i - 1].2 + GAP };
            labels[i].2 = labels[i].2.max(above);
        }
        for i in (0..count).rev() {
            let below = if i + 1 == count { lowest } else { labels[i + 1].2 - GAP };
            labels[i].2 = labels[i].2.min(below);
        }
        for (i, (x, y), at) in labels {
            let start = frame.right + 14.0;
            if (at - y).abs() > 3.0 || frame.right - x > 3.0 {
                scene.line(vec![(x + 3.0, y), (start - 3.0, at)], 0.75, color(i).mix(Color(255, 255, 255), 0.4), false);
            }
            let text = shorten(&self.series[i].name, TEXT_SIZE, width);
            scene.text(start, at + 4.0, TEXT_SIZE, color(i).ink(), Anchor::Start, &text);
        }
    }

    /// Writes names in rows under the title; returns where the chart may start.
    fn legend(&self, scene: &mut Scene, named: &[usize], top: f32) -> f32 {
        let (mut x, mut y) = (16.0, top + 8.0);
        for &i in named {
            let text = shorten(&self.series[i].name, TEXT_SIZE, scene.width - 60.0);
            let width = 28.0 + text_width(&text, TEXT_SIZE);
            if x + width > scene.width - 16.0 && x > 16.0 {
                (x, y) = (16.0, y + 18.0);
            }
            let dashed = self.series[i].dashed || i >= PALETTE.len();
            scene.line(vec![(x, y - 4.0), (x + 20.0, y - 4.0)], 2.0, color(i), dashed);
            scene.text(x + 26.0, y, TEXT_SIZE, INK, Anchor::Start, &text);
            x += width + 18.0;
        }
        y + 10.0
    }
}

fn color(i: usize) -> Color {
    PALETTE[i % PALETTE.len()]
}

fn draw_band(scene: &mut Scene, frame: &Frame, series: &Series, color: Color) {
    let low = frame.y.low();
    // What lies below a logarithmic axis is cut off at the end of the axis.
    let edge = |x: f64, y: f64| frame.place((x, y)).or_else(|| if y <= low { frame.place((x, low)) } else { None });
    let (mut upper, mut lower) = (Vec::new(), Vec::new());
    let mut close = |upper: &mut Vec<(f32, f32)>, lower: &mut Vec<(f32, f32)>| {
        upper.extend(lower.drain(..).rev());
        if upper.len() > 3 {
            scene.area(std::mem::take(upper), color, 0.18);
        }
        upper.clear();
    };
    for &(x, a, b) in &series.band {
        match (edge(x, a.min(b)), edge(x, a.max(b))) {
            (Some(a), Some(b)) => {
                lower.push(a);
                upper.push(b);
            }
            _ => close(&mut upper, &mut lower),
        }
    }
    close(&mut upper, &mut lower);
}

fn draw_line(scene: &mut Scene, frame: &Frame, series: &Series, color: Color, dashed: bool) {
    // At full width a long noisy line would fill an area.
    let width = if series.points.len() > 200 { 1.5 } else { 2.0 };
    let placed: Vec<Option<(f32, f32)>> = series.points.iter().map(|&p| frame.place(p)).collect();
    for part in placed.split(Option::is_none) {
        let part: Vec<(f32, f32)> = part.iter().copied().flatten().collect();
        if series.markers || part.len() == 1 {
            part.iter().for_each(|&(x, y)| scene.dot(x, y, 3.0, color));
        }
        if part.len() > 1 {
            scene.line(thin(part), width, color, dashed);
        }
    }
}

/// Keeps at most four points per pixel column: first, lowest, highest and last. The picture stays the same, spikes included.
fn thin(points: Vec<(f32, f32)>) -> Vec<(f32, f32)> {
    if points.len() < 2000 {
        return points;
    }
    let mut kept = Vec::new();
    for column in points.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        let by_height = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        let (low, high) = ((0..column.len()).min_by(by_height), (0..column.len()).max_by(by_height));
        let mut places = vec![0, low.unwrap_or(0), high.unwrap_or(0), column.len() - 1];
        places.sort_unstable();
        places.dedup();
        kept.extend(places.into_iter().map(|i| column[i]));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;

    #[test]
    fn both_files_are_written() {
        let folder = Scratch::new("plot");
        let chart =
            LineChart::new("Loss <of> a run").y_label("loss").series(Series::new("a", [(0.0, 1.0), (1.0, 0.5)]));
        let [svg, png] = chart.save(folder.join("plots/v1.5")).unwrap();
        assert!(svg.ends_with("v1.5.svg"), "a dot in a name is not an ending");
        assert!(std::fs::read_to_string(svg).unwrap().contains("Loss &lt;of&gt; a run"));
        assert_eq!(std::fs::read(png).unwrap()[1..4], *b"PNG");
        let [svg, _] = chart.save(folder.join("loss.png")).unwrap();
        assert!(svg.ends_with("loss.svg"));
        std::fs::write(folder.join("file"), "").unwrap();
        assert!(chart.save(folder.join("file/loss")).is_err());
    }

    #[test]
    fn anything_can_be_drawn() {
        let nan = f64::NAN;
        let series = [
            Series::new("", []),
            Series::new("gap", [(0.0, 1.0), (1.0, nan), (2.0, 3.0), (3.0, f64::INFINITY), (4.0, 1.0), (5.0, 2.0)]),
            Series::new("negative", [(-1.0, -1.0), (5.0, 0.0)]).band([
                (0.0, -1.0, 1.0),
                (5.0, nan, 1.0),
                (5.0, 0.0, 2.0),
            ]),
            Series::new("huge", [(0.0, f64::MAX), (1.0, f64::MIN)]),
        ];
        for log in [false, true] {
            for subset in 0..16usize {
                let mut chart = LineChart::new("x".repeat(500)).x_label("x").y_label("y");
                chart = if log { chart.log_x().log_y() } else { chart };
                for (i, s) in series.iter().enumerate().filter(|(i, _)| subset >> i & 1 == 1) {
                    chart = chart.series(if i % 2 == 0 { s.clone() } else { s.clone().dashed().markers() });
                }
                let svg = chart.scene().svg().unwrap();
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{log} {subset}");
                chart.size(0, 0).scene().png(1.0).unwrap();
            }
        }
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut points: Vec<(f32, f32)> = (0..100_000).map(|i| (i as f32 / 200.0, 10.0)).collect();
        points[54_321].1 = 99.0;
        let thinned = thin(points);
        assert!(thinned.len() < 2500 && thinned.iter().any(|p| p.1 == 99.0));
    }
}
