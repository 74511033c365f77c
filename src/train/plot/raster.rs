//! A scene as pixels: coverage masks from the rasteriser, blended over white.

use ttf_parser::OutlineBuilder;
use zeno::{Command, Join, Mask, PathBuilder, Stroke, Style, Transform};

use super::scene::{Anchor, Color, Item, Scene, font, text_width};
use crate::base::{Error, Result};

/// Largest width and height. A larger scene must be a mistake.
const MAX_SIDE: f32 = 16384.0;

struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
    scale: f32,
}

pub(super) fn png(scene: &Scene, scale: f32) -> Result<Vec<u8>> {
    let (width, height) = ((scene.width * scale).ceil(), (scene.height * scale).ceil());
    if !(1.0..=MAX_SIDE).contains(&width) || !(1.0..=MAX_SIDE).contains(&height) {
        let message = format!("an image of {width} × {height} pixels; at most {MAX_SIDE} each way, split the plot");
        return Err(Error::invalid("plot", message));
    }
    let (width, height) = (width as usize, height as usize);
    let mut canvas = Canvas { width, height, pixels: vec![255; width * height * 3], scale };
    for item in &scene.items {
        canvas.draw(item);
    }
    encode(width as u32, height as u32, &canvas.pixels)
}

/// Encodes RGB pixels as a PNG file.
pub(super) fn encode(width: u32, height: u32, pixels: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder
        .write_header()
        .and_then(|mut writer| {
            writer.write_image_data(pixels)?;
            writer.finish()
        })
        .map_err(|e| Error::invalid("plot", format!("cannot be put as PNG: {e}")))?;
    Ok(bytes)
}

impl Canvas {
    fn draw(&mut self, item: &Item) {
        let scale = Transform::scale(self.scale, self.scale);
        match item {
            Item::Line { points, width, color, dashed } => {
                let mut stroke = Stroke::new(*width);
                stroke.join(Join::Round);
                if *dashed {
                    stroke.dash(&[5.0, 4.0], 0.0);
                }
                self.fill(&path(points, false), stroke, scale, *color, 1.0);
            }
            Item::Area { points, color, opacity } => {
                self.fill(&path(points, true), zeno::Fill::NonZero, scale, *color, *opacity);
            }
            Item::Dot { x, y, radius, color } => {
                let mut circle: Vec<Command> = Vec::new();
                circle.add_circle([*x, *y], *radius);
                self.fill(&circle, zeno::Fill::NonZero, scale, *color, 1.0);
            }
            Item::Text { x, y, size, color, anchor, text } => {
                let shift = match anchor {
                    Anchor::Start => 0.0,
                    Anchor::Middle => 0.5,
                    Anchor::End => 1.0,
                };
                let outline = outline(text, x - shift * text_width(text, *size), *y, *size);
                self.fill(&outline, zeno::Fill::NonZero, scale, *color, 1.0);
            }
            Item::Image { x, y, width, height, columns, colors } => {
                self.cells((*x, *y, *width, *height), *columns, colors);
            }
        }
    }

    fn fill<'a>(
        &mut self,
        path: &[Command],
        style: impl Into<Style<'a>>,
        scale: Transform,
        color: Color,
        opacity: f32,
    ) {
        if path.is_empty() {
            return;
        }
        let (mask, place) = Mask::new(path).style(style).transform(Some(scale)).render();
        for row in 0..place.height as usize {
            let y = place.top as i64 + row as i64;
            for column in 0..place.width as usize {
                let x = i64::from(place.left) + column as i64;
                let coverage = mask[row * place.width as usize + column];
                if coverage > 0 && (0..self.width as i64).contains(&x) && (0..self.height as i64).contains(&y) {
                    self.blend(x as usize, y as usize, color, f32::from(coverage) / 255.0 * opacity);
                }
            }
        }
    }

    fn cells(&mut self, (x, y, width, height): (f32, f32, f32, f32), columns: usize, colors: &[Color]) {
        let rows = colors.len() / columns.max(1);
        let edge = |v: f32, limit: usize| ((v * self.scale).round().max(0.0) as usize).min(limit);
        let (left, right) = (edge(x, self.width), edge(x + width, self.width));
        let (top, bottom) = (edge(y, self.height), edge(y + height, self.height));
        for py in top..bottom {
            for px in left..right {
                let (row, column) = ((py - top) * rows / (bottom - top), (px - left) * columns / (right - left));
                if let Some(&color) = colors.get(row * columns + column) {
                    self.blend(px, py, color, 1.0);
                }
            }
        }
    }

    fn blend(&mut self, x: usize, y: usize, color: Color, alpha: f32) {
        let at = (y * self.width + x) * 3;
        for (channel, new) in self.pixels[at..at + 3].iter_mut().zip([color.0, color.1, color.2]) {
            let old = f32::from(*channel);
            *channel = (old + (f32::from(new) - old) * alpha).round() as u8;
        }
    }
}

fn path(points: &[(f32, f32)], closed: bool) -> Vec<Command> {
    let mut path: Vec<Command> = Vec::with_capacity(points.len() + 1);
    for (i, &(x, y)) in points.iter().enumerate() {
        if i == 0 {
            path.move_to([x, y]);
        } else {
            path.line_to([x, y]);
        }
    }
    if closed && !path.is_empty() {
        path.close();
    }
    path
}

/// The outline of a line of text whose base line starts at (x, y).
fn outline(text: &str, x: f32, y: f32, size: f32) -> Vec<Command> {
    let Some(font) = font() else { return Vec::new() };
    let scale = size / f32::from(font.units_per_em());
    let mut pen = Pen { path: Vec::new(), x, y, scale };
    for c in text.chars() {
        // A character that the font lacks is drawn as its empty box (glyph 0), not dropped.
        let glyph = font.glyph_index(c).unwrap_or(ttf_parser::GlyphId(0));
        font.outline_glyph(glyph, &mut pen);
        pen.x += f32::from(font.glyph_hor_advance(glyph).unwrap_or(600)) * scale;
    }
    pen.path
}

/// Moves glyph outlines, in font units with y upwards, to the page.
struct Pen {
    path: Vec<Command>,
    x: f32,
    y: f32,
    scale: f32,
}

impl Pen {
    fn at(&self, x: f32, y: f32) -> [f32; 2] {
        [self.x + x * self.scale, self.y - y * self.scale]
    }
}

impl OutlineBuilder for Pen {
    fn move_to(&mut self, x: f32, y: f32) {
        let to = self.at(x, y);
        self.path.move_to(to);
    }
    fn line_to(&mut self, x: f32, y: f32) {
        let to = self.at(x, y);
        self.path.line_to(to);
    }
    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let (control, to) = (self.at(x1, y1), self.at(x, y));
        self.path.quad_to(control, to);
    }
    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let (first, second, to) = (self.at(x1, y1), self.at(x2, y2), self.at(x, y));
        self.path.curve_to(first, second, to);
    }
    fn close(&mut self) {
        self.path.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_are_where_they_belong() {
        let mut scene = Scene::new(10.0, 10.0);
        scene.rectangle(2.0, 2.0, 4.0, 4.0, Color(255, 0, 0));
        scene.image(6.0, 6.0, 4.0, 4.0, 2, vec![Color(0, 0, 9), Color(0, 9, 0), Color(9, 0, 0), Color(1, 2, 3)]);
        let bytes = scene.png(2.0).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (20, 20));
        let at = |x: usize, y: usize| &pixels[(y * 20 + x) * 3..][..3];
        assert_eq!((at(0, 0), at(4, 4), at(11, 11)), (&[255u8; 3][..], &[255u8, 0, 0][..], &[255u8, 0, 0][..]));
        assert_eq!((at(12, 12), at(19, 12), at(19, 19)), (&[0u8, 0, 9][..], &[0u8, 9, 0][..], &[1u8, 2, 3][..]));
        assert!(Scene::new(1e6, 10.0).png(1.0).is_err() && Scene::new(f32::NAN, 10.0).png(1.0).is_err());
    }

    #[test]
    fn text_leaves_ink() {
        let mut scene = Scene::new(40.0, 20.0);
        scene.text(2.0, 15.0, 12.0, Color(0, 0, 0), Anchor::Start, "ε=1 \u{10ffff}");
        assert_ne!(scene.png(1.0).unwrap(), Scene::new(40.0, 20.0).png(1.0).unwrap());
    }
}
