//! The content of a plot: a few shapes with positions and colours. It is drawn as SVG here, and as pixels in `raster`.

use std::fmt::Write;
use std::sync::OnceLock;

use ttf_parser::Face;

use crate::base::{Error, Result};

/// A colour, as red, green and blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Color(pub u8, pub u8, pub u8);

impl Color {
    /// A mixture: `amount` of `other`, the rest of this one.
    pub fn mix(self, other: Color, amount: f32) -> Color {
        let blend =
            |a: u8, b: u8| (f32::from(a) + (f32::from(b) - f32::from(a)) * amount.clamp(0.0, 1.0)).round() as u8;
        Color(blend(self.0, other.0), blend(self.1, other.1), blend(self.2, other.2))
    }
    /// The colour, darkened enough to be read as text on white.
    pub(super) fn ink(self) -> Color {
        self.mix(Color(0, 0, 0), 0.25)
    }
    fn hex(self) -> String {
        format!("#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }
}

/// Which part of a text is at its given position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// Its beginning.
    Start,
    /// Its middle.
    Middle,
    /// Its end.
    End,
}

pub(super) enum Item {
    Line { points: Vec<(f32, f32)>, width: f32, color: Color, dashed: bool },
    Area { points: Vec<(f32, f32)>, color: Color, opacity: f32 },
    Dot { x: f32, y: f32, radius: f32, color: Color },
    Text { x: f32, y: f32, size: f32, color: Color, anchor: Anchor, text: String },
    Image { x: f32, y: f32, width: f32, height: f32, columns: usize, colors: Vec<Color> },
}

/// A drawing; coordinates are in pixels from the upper left corner.
pub struct Scene {
    /// Width in pixels.
    pub width: f32,
    /// Height in pixels.
    pub height: f32,
    pub(super) items: Vec<Item>,
}

impl Scene {
    /// An empty white page.
    pub fn new(width: f32, height: f32) -> Self {
        Scene { width, height, items: Vec::new() }
    }

    /// Adds a line through points.
    pub fn line(&mut self, points: Vec<(f32, f32)>, width: f32, color: Color, dashed: bool) {
        self.items.push(Item::Line { points, width, color, dashed });
    }

    /// Adds a filled shape.
    pub fn area(&mut self, points: Vec<(f32, f32)>, color: Color, opacity: f32) {
        self.items.push(Item::Area { points, color, opacity });
    }

    /// Adds a filled rectangle.
    pub fn rectangle(&mut self, x: f32, y: f32, width: f32, height: f32, color: Color) {
        self.area(vec![(x, y), (x + width, y), (x + width, y + height), (x, y + height)], color, 1.0);
    }

    /// Adds a filled circle.
    pub fn dot(&mut self, x: f32, y: f32, radius: f32, color: Color) {
        self.items.push(Item::Dot { x, y, radius, color });
    }

    /// Adds a line of text; `y` is its base line.
    pub fn text(&mut self, x: f32, y: f32, size: f32, color: Color, anchor: Anchor, text: &str) {
        self.items.push(Item::Text { x, y, size, color, anchor, text: text.to_string() });
    }

    /// Adds coloured cells, row after row, that fill a rectangle. They keep their sharp edges.
    pub fn image(&mut self, x: f32, y: f32, width: f32, height: f32, columns: usize, colors: Vec<Color>) {
        self.items.push(Item::Image { x, y, width, height, columns, colors });
    }

    /// The drawing as an SVG document. Text is written as text, not as shapes.
    pub fn svg(&self) -> Result<String> {
        let (w, h) = (self.width, self.height);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{h}\" viewBox=\"0 0 {w} {h}\" \
             font-family=\"DejaVu Sans, Verdana, Arial, sans-serif\">\n<rect width=\"{w}\" height=\"{h}\" fill=\"#fff\"/>\n"
        );
        for item in &self.items {
            draw(&mut out, item)?;
        }
        out.push_str("</svg>\n");
        Ok(out)
    }

    /// The drawing as a PNG file with `scale` pixels per pixel of the page.
    pub fn png(&self, scale: f32) -> Result<Vec<u8>> {
        super::raster::png(self, scale)
    }
}

fn draw(out: &mut String, item: &Item) -> Result<()> {
    let list =
        |points: &[(f32, f32)]| points.iter().map(|(x, y)| format!("{x:.2},{y:.2}")).collect::<Vec<_>>().join(" ");
    let written = match item {
        Item::Line { points, width, color, dashed } => {
            let dash = if *dashed { " stroke-dasharray=\"5 4\"" } else { "" };
            writeln!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\" stroke-linejoin=\"round\"{dash}/>",
                list(points),
                color.hex()
            )
        }
        Item::Area { points, color, opacity } => {
            let opacity = if *opacity < 1.0 { format!(" fill-opacity=\"{opacity}\"") } else { String::new() };
            writeln!(out, "<polygon points=\"{}\" fill=\"{}\"{opacity}/>", list(points), color.hex())
        }
        Item::Dot { x, y, radius, color } => {
            writeln!(out, "<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"{radius}\" fill=\"{}\"/>", color.hex())
        }
        Item::Text { x, y, size, color, anchor, text } => {
            let anchor = match anchor {
                Anchor::Start => "start",
                Anchor::Middle => "middle",
                Anchor::End => "end",
            };
            writeln!(
                out,
                "<text x=\"{x:.2}\" y=\"{y:.2}\" font-size=\"{size}\" fill=\"{}\" text-anchor=\"{anchor}\">{}</text>",
                color.hex(),
                escape(text)
            )
        }
        Item::Image { x, y, width, height, columns, colors } => {
            let columns = (*columns).max(1);
            let rows = colors.len() / columns;
            // The image has about two pixels per pixel of the page, and each cell is repeated, because some programs smooth what they
            // enlarge.
            let repeat = |size: f32, cells: usize| ((2.0 * size / cells.max(1) as f32).ceil() as usize).clamp(1, 128);
            let (across, down) = (repeat(*width, columns), repeat(*height, rows));
            let mut pixels = Vec::with_capacity(colors.len() * across * down * 3);
            for row in colors.chunks_exact(columns) {
                let line: Vec<u8> = row.iter().flat_map(|c| [c.0, c.1, c.2].repeat(across)).collect();
                (0..down).for_each(|_| pixels.extend_from_slice(&line));
            }
            let png = super::raster::encode((columns * across) as u32, (rows * down) as u32, &pixels)?;
            writeln!(
                out,
                "<image x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" preserveAspectRatio=\"none\" \
                 style=\"image-rendering:pixelated\" href=\"data:image/png;base64,{}\"/>",
                base64(&png)
            )
        }
    };
    // Writing to a string fails only if a formatter does, and the formatters of numbers and text do not fail.
    written.map_err(|e| Error::invalid("plot", e.to_string()))
}

/// Escapes text for XML; characters that XML does not allow are left out.
fn escape(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).fold(String::new(), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c => out.push(c),
        }
        out
    })
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0u32, |g, &b| (g << 8) | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(group >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// The font, unless the bytes in the program cannot be parsed (they can).
pub(super) fn font() -> Option<&'static Face<'static>> {
    static FONT: OnceLock<Option<Face<'static>>> = OnceLock::new();
    FONT.get_or_init(|| Face::parse(dejavu::sans::regular(), 0).ok()).as_ref()
}

/// The width of a text in pixels.
pub(super) fn text_width(text: &str, size: f32) -> f32 {
    let Some(font) = font() else { return text.chars().count() as f32 * size * 0.6 };
    let advance = |c: char| font.glyph_index(c).and_then(|g| font.glyph_hor_advance(g)).unwrap_or(600);
    text.chars().map(|c| f32::from(advance(c))).sum::<f32>() * size / f32::from(font.units_per_em())
}

/// The text, or as much of its beginning with an ellipsis as fits the width.
pub(super) fn shorten(text: &str, size: f32, width: f32) -> String {
    if text_width(text, size) <= width {
        return text.to_string();
    }
    let mut short: String = text.to_string();
    while !short.is_empty() && text_width(&short, size) + text_width("…", size) > width {
        short.pop();
    }
    short.trim_end().to_string() + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_measured_and_escaped() {
        assert!(text_width("mmm", 12.0) > text_width("iii", 12.0));
        assert!((text_width("0000", 12.0) - 4.0 * text_width("0", 12.0)).abs() < 1e-4);
        assert_eq!(escape("a<b & \u{0}c"), "a&lt;b &amp; c");
        assert_eq!(shorten("short", 12.0, 100.0), "short");
        let cut = shorten("a long text that does not fit", 12.0, 60.0);
        assert!(cut.ends_with('…') && text_width(&cut, 12.0) <= 60.0);
        for c in "εδσ≤×⁻⁰¹²³⁴⁵⁶⁷⁸⁹…−".chars() {
            assert!(font().unwrap().glyph_index(c).is_some(), "{c}");
        }
    }

    #[test]
    fn base64_as_in_rfc_4648() {
        for (text, code) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(text.as_bytes()), code);
        }
    }
}
