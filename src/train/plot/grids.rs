//! Pictures made of cells: sheets of small images, and heat maps.

use std::path::{Path, PathBuf};

use super::bars::short;
use super::scene::{Anchor, Color, Scene, shorten, text_width};
use super::{INK, SOFT, TEXT_SIZE};
use crate::base::{Error, Result};

const WHITE: Color = Color(255, 255, 255);

/// A sheet of small grey images with captions, such as digits and their predicted classes.
#[derive(Clone, Debug)]
pub struct ImageGrid {
    title: String,
    width: usize,
    height: usize,
    columns: usize,
    images: Vec<(Vec<f32>, String)>,
}

impl ImageGrid {
    /// A sheet for images of `width` × `height` pixels, ten to a row.
    pub fn new(title: impl Into<String>, width: usize, height: usize) -> Self {
        ImageGrid { title: title.into(), width, height, columns: 10, images: Vec::new() }
    }
    /// Sets the number of images per row.
    pub fn columns(mut self, columns: usize) -> Self {
        self.columns = columns.max(1);
        self
    }
    /// Adds an image with a caption, which may be empty. A pixel is 0 for paper and 1 for ink.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of pixels is not that of the sheet.
    pub fn image(mut self, pixels: &[f32], caption: impl Into<String>) -> Result<Self> {
        if pixels.len() != self.width * self.height || pixels.is_empty() {
            let message = format!("{} pixels for an image of {} × {}", pixels.len(), self.width, self.height);
            return Err(Error::shape("ImageGrid::image", message));
        }
        self.images.push((pixels.to_vec(), caption.into()));
        Ok(self)
    }

    /// Writes `<path>.svg` and `<path>.png`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<[PathBuf; 2]> {
        super::save(&self.scene(), path.as_ref())
    }

    /// The sheet as a drawing.
    pub fn scene(&self) -> Scene {
        const CELL: f32 = 56.0;
        const GAP: f32 = 10.0;
        const CAPTION: f32 = 11.0;
        let columns = self.columns.min(self.images.len().max(1));
        let rows = self.images.len().div_ceil(columns).max(1);
        let caption = if self.images.iter().any(|i| !i.1.is_empty()) { 18.0 } else { 0.0 };
        let aspect = self.height as f32 / self.width.max(1) as f32;
        let (cell, step) = (CELL * aspect.clamp(0.1, 10.0), CELL + GAP);
        let needed = 32.0 + columns as f32 * step - GAP;
        let mut scene = Scene::new(needed.max(240.0), 0.0);
        let top = super::title(&mut scene, &self.title);
        scene.height = top + rows as f32 * (cell + caption + GAP) + 6.0;
        for (i, (pixels, text)) in self.images.iter().enumerate() {
            let x = 16.0 + (i % columns) as f32 * step;
            let y = top + (i / columns) as f32 * (cell + caption + GAP);
            // A faint background shows where an image ends whose border is empty.
            let ink = |&p: &f32| Color(0xf4, 0xf4, 0xf4).mix(INK, if p.is_finite() { p } else { 0.0 });
            scene.image(x, y, CELL, cell, self.width, pixels.iter().map(ink).collect());
            let text = shorten(text, CAPTION, step - 2.0);
            scene.text(x + CELL / 2.0, y + cell + 13.0, CAPTION, SOFT, Anchor::Middle, &text);
        }
        scene
    }
}

/// A table of numbers as colours, such as a confusion matrix. With up to 16 columns the numbers are written in the cells.
#[derive(Clone, Debug)]
pub struct HeatMap {
    title: String,
    x_label: String,
    y_label: String,
    rows: Vec<String>,
    columns: Vec<String>,
    values: Vec<f64>,
}

impl HeatMap {
    /// A map of rows × columns values, given row after row. Values that are not finite stay white.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of values does not fit the names.
    pub fn new<S: Into<String>>(
        title: impl Into<String>,
        rows: impl IntoIterator<Item = S>,
        columns: impl IntoIterator<Item = S>,
        values: &[f64],
    ) -> Result<Self> {
        let rows: Vec<String> = rows.into_iter().map(Into::into).collect();
        let columns: Vec<String> = columns.into_iter().map(Into::into).collect();
        if values.is_empty() || values.len() != rows.len() * columns.len() {
            let message = format!("{} values for {} rows and {} columns", values.len(), rows.len(), columns.len());
            return Err(Error::shape("HeatMap::new", message));
        }
        let (x_label, y_label) = (String::new(), String::new());
        Ok(HeatMap { title: title.into(), x_label, y_label, rows, columns, values: values.to_vec() })
    }
    /// Sets the label of the columns.
    pub fn x_label(mut self, text: impl Into<String>) -> Self {
        self.x_label = text.into();
        self
    }
    /// Sets the label of the rows.
    pub fn y_label(mut self, text: impl Into<String>) -> Self {
        self.y_label = text.into();
        self
    }

    /// Writes `<path>.svg` and `<path>.png`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<[PathBuf; 2]> {
        super::save(&self.scene(), path.as_ref())
    }

    /// The map as a drawing.
    pub fn scene(&self) -> Scene {
        let (rows, columns) = (self.rows.len(), self.columns.len());
        let finite = || self.values.iter().copied().filter(|v| v.is_finite());
        let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
        let share = |v: f64| if high > low { ((v - low) / (high - low)) as f32 } else { 0.5 };
        let numbers = columns <= 16;
        let texts: Vec<String> = self.values.iter().map(|&v| cell_text(v)).collect();
        let widest = texts.iter().map(|t| text_width(t, 11.0)).fold(0.0, f32::max);
        let cell = if numbers { (widest + 12.0).max(36.0) } else { (560.0 / columns as f32).clamp(2.0, 36.0) };
        let height = if numbers { 30.0 } else { cell };
        let names = self.rows.iter().map(|r| text_width(r, TEXT_SIZE)).fold(0.0, f32::max).min(200.0);
        let left = 16.0 + names + 10.0;
        // The colour scale is on the right: 14 pixels of colour and two numbers.
        let right = left + cell * columns as f32;
        let mut scene = Scene::new(right + 100.0, 0.0);
        let mut top = super::title(&mut scene, &self.title);
        if !self.y_label.is_empty() {
            scene.text(16.0, top + 10.0, TEXT_SIZE, SOFT, Anchor::Start, &self.y_label);
            top += 22.0;
        }
        let bottom = top + height * rows as f32;
        scene.height = bottom.max(top + 60.0) + if self.x_label.is_empty() { 32.0 } else { 52.0 };
        let color = |&v: &f64| if v.is_finite() { scale(share(v)) } else { WHITE };
        let colors = self.values.iter().map(color).collect();
        scene.image(left, top, cell * columns as f32, height * rows as f32, columns, colors);
        for (i, name) in self.rows.iter().enumerate().step_by(step(16.0 / height)) {
            let y = top + height * (i as f32 + 0.5) + 4.0;
            scene.text(left - 8.0, y, TEXT_SIZE, INK, Anchor::End, &shorten(name, TEXT_SIZE, names));
        }
        let heads: Vec<String> = self.columns.iter().map(|c| shorten(c, TEXT_SIZE, (cell - 4.0).max(30.0))).collect();
        let widest = heads.iter().map(|h| text_width(h, TEXT_SIZE)).fold(0.0, f32::max);
        for (i, name) in heads.iter().enumerate().step_by(step((widest + 4.0) / cell)) {
            let x = left + cell * (i as f32 + 0.5);
            scene.text(x, bottom + 18.0, TEXT_SIZE, INK, Anchor::Middle, name);
        }
        if numbers {
            for (i, (value, text)) in self.values.iter().zip(&texts).enumerate() {
                let ink = if value.is_finite() && share(*value) > 0.55 { WHITE } else { INK };
                let (x, y) = (left + cell * ((i % columns) as f32 + 0.5), top + height * ((i / columns) as f32 + 0.5));
                scene.text(x, y + 4.0, 11.0, ink, Anchor::Middle, text);
            }
        }
        if low <= high {
            let x = right + 20.0;
            let length = (bottom - top).clamp(60.0, 160.0);
            scene.image(x, top, 14.0, length, 1, (0..64).rev().map(|i| scale(i as f32 / 63.0)).collect());
            scene.text(x + 20.0, top + 10.0, 11.0, SOFT, Anchor::Start, &cell_text(high));
            scene.text(x + 20.0, top + length, 11.0, SOFT, Anchor::Start, &cell_text(low));
        }
        if !self.x_label.is_empty() {
            let y = scene.height - 14.0;
            scene.text((left + right) / 2.0, y, TEXT_SIZE, SOFT, Anchor::Middle, &self.x_label);
        }
        scene
    }
}

/// The interval at which names are shown, if each needs the room of `cells` cells: 1, 2, 5, 10, 20 and so on.
fn step(cells: f32) -> usize {
    let mut power = 1;
    loop {
        if let Some(step) = [1, 2, 5].into_iter().map(|s| s * power).find(|&s| s as f32 >= cells) {
            return step;
        }
        power *= 10;
    }
}

/// Whole numbers are written as they are, others with three digits.
fn cell_text(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e6 { format!("{value}").replace('-', "−") } else { short(value) }
}

/// A colour from near white to dark blue, whose lightness falls evenly.
fn scale(share: f32) -> Color {
    const STOPS: [Color; 5] = [
        Color(0xf5, 0xf8, 0xfb),
        Color(0xb8, 0xd3, 0xe8),
        Color(0x6a, 0xa6, 0xd0),
        Color(0x25, 0x71, 0xae),
        Color(0x08, 0x35, 0x6b),
    ];
    let place = share.clamp(0.0, 1.0) * 4.0;
    let stop = (place as usize).min(3);
    STOPS[stop].mix(STOPS[stop + 1], place - stop as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sheets_and_maps_of_any_size() {
        let sheet = ImageGrid::new("digits", 2, 3).columns(3);
        assert!(sheet.clone().image(&[0.0; 5], "").is_err());
        let sheet =
            (0..7).try_fold(sheet, |s, i| s.image(&[0.0, 1.0, f32::NAN, 2.0, -1.0, 0.5], format!("{i}"))).unwrap();
        assert!(sheet.scene().svg().unwrap().matches("<image").count() == 7);
        sheet.scene().png(1.0).unwrap();
        ImageGrid::new("", 8, 8).scene().png(1.0).unwrap();
        assert!(HeatMap::new("", ["a"], ["b"], &[]).is_err());
        for (rows, columns) in [(1, 1), (3, 2), (40, 100)] {
            let names = |n: usize| (0..n).map(|i| i.to_string());
            let values: Vec<f64> =
                (0..rows * columns).map(|i| if i == 1 { f64::NAN } else { i as f64 / 3.0 }).collect();
            let map = HeatMap::new("map", names(rows), names(columns), &values).unwrap().x_label("x").y_label("y");
            assert!(!map.scene().svg().unwrap().contains("NaN"));
            map.scene().png(1.0).unwrap();
        }
    }
}
