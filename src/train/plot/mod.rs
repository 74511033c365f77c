//! Plots as files: each is written twice, as SVG for pages and papers and as PNG for everything else.
//!
//! Text in the PNG is drawn with DejaVu Sans, which is part of the program (free licence of Bitstream and the DejaVu changes), so no font
//! has to be installed. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
//!
//! ```no_run
//! # fn main() -> prismgrad::Result<()> {
//! use prismgrad::train::plot::{LineChart, Series};
//! let train = vec![(1.0, 2.3), (2.0, 1.4), (3.0, 1.1)];
//! let held = vec![(1.0, 2.4), (2.0, 1.7), (3.0, 1.6)];
//! LineChart::new("Digits")
//!     .x_label("epoch")
//!     .y_label("loss")
//!     .series(Series::new("training", train))
//!     .series(Series::new("validation", held))
//!     .save("runs/digits/plots/loss")?; // loss.svg and loss.png
//! # Ok(()) }
//! ```

mod axis;
mod bars;
mod grids;
mod lines;
mod raster;
mod scene;

use std::path::{Path, PathBuf};

use crate::base::Result;
use crate::io::{create_folder, parent, write_atomic};

pub use bars::BarChart;
pub use grids::{HeatMap, ImageGrid};
pub use lines::{LineChart, Series};
pub use scene::{Anchor, Color, Scene};

/// Colours of series, in the order in which they are used.
pub const PALETTE: [Color; 7] = [
    Color(0x00, 0x72, 0xb2),
    Color(0xd5, 0x5e, 0x00),
    Color(0x00, 0x9e, 0x73),
    Color(0xcc, 0x79, 0xa7),
    Color(0xe6, 0x9f, 0x00),
    Color(0x56, 0xb4, 0xe9),
    Color(0x55, 0x55, 0x55),
];

const INK: Color = Color(0x22, 0x22, 0x22);
const SOFT: Color = Color(0x59, 0x59, 0x59);
const AXIS: Color = Color(0x99, 0x99, 0x99);
const GRID: Color = Color(0xe8, 0xe8, 0xe8);
const TITLE_SIZE: f32 = 16.0;
const TEXT_SIZE: f32 = 12.0;

/// Writes `<path>.svg` and `<path>.png`, creating the folder; an ending of the path is replaced only if it is one of
/// these two.
fn save(scene: &Scene, path: &Path) -> Result<[PathBuf; 2]> {
    let known = path.extension().is_some_and(|e| e == "svg" || e == "png");
    let stem = if known { path.with_extension("") } else { path.to_path_buf() };
    let with = |ending: &str| {
        let mut name = stem.clone().into_os_string();
        name.push(ending);
        PathBuf::from(name)
    };
    let files = [with(".svg"), with(".png")];
    create_folder(parent(&stem))?;
    write_atomic(&files[0], scene.svg()?.as_bytes())?;
    write_atomic(&files[1], &scene.png(2.0)?)?;
    Ok(files)
}

/// Draws the title and returns the height it takes.
fn title(scene: &mut Scene, text: &str) -> f32 {
    if text.is_empty() {
        return 14.0;
    }
    let text = scene::shorten(text, TITLE_SIZE, scene.width - 32.0);
    scene.text(16.0, 28.0, TITLE_SIZE, INK, Anchor::Start, &text);
    42.0
}
