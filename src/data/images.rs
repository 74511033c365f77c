//! Small labelled images: the 8×8 digits that come with the crate, and files in MNIST's IDX format.

use std::path::Path;

use super::{read_maybe_gzip, shuffled};
use crate::base::{Error, Result};
use crate::{Tensor, no_grad};

/// Greyscale images of one size with class labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Images {
    /// Pixels per row.
    pub width: usize,
    /// Rows per image.
    pub height: usize,
    /// Number of classes; labels are less than it.
    pub classes: usize,
    /// Pixels from 0 to 1, image after image, row after row.
    pub pixels: Vec<f32>,
    /// One label per image.
    pub labels: Vec<u32>,
}

impl Images {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }
    /// Whether there are no images.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }
    /// Pixels per image.
    pub fn size(&self) -> usize {
        self.width * self.height
    }
    /// The pixels of one image.
    ///
    /// # Panics
    /// If `i` is not below [`len`](Self::len), as with a slice.
    pub fn image(&self, i: usize) -> &[f32] {
        &self.pixels[i * self.size()..(i + 1) * self.size()]
    }

    /// The images at these indices, as pixels of shape [n, height, width] and n labels.
    pub fn batch(&self, indices: &[usize]) -> Result<(Vec<f32>, Vec<u32>)> {
        if let Some(i) = indices.iter().find(|&&i| i >= self.len()) {
            return Err(Error::invalid("Images::batch", format!("index {i}, but there are {} images", self.len())));
        }
        let mut pixels = Vec::with_capacity(indices.len() * self.size());
        indices.iter().for_each(|&i| pixels.extend_from_slice(self.image(i)));
        Ok((pixels, indices.iter().map(|&i| self.labels[i]).collect()))
    }

    /// The images at these indices as a tensor `[B, pixels]`, and their labels `[B]`.
    pub fn tensors(&self, indices: &[usize]) -> Result<(Tensor, Tensor)> {
        let (pixels, labels) = self.batch(indices)?;
        let n = indices.len();
        Ok((Tensor::from_slice(&pixels, &[n, self.size()])?, Tensor::from_slice(&labels, &[n])?))
    }
    /// The share of images for which the class of the largest logit is the label. `logits` returns `[B, classes]` for `[B, pixels]`.
    pub fn accuracy(&self, logits: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<f64> {
        let (pixels, labels) = self.tensors(&(0..self.len()).collect::<Vec<usize>>())?;
        let read = no_grad(|| logits(&pixels))?.argmax(-1)?;
        let right = read.array().to_f64().iter().zip(labels.array().to_f64()).filter(|&(r, l)| *r == l).count();
        Ok(right as f64 / self.len() as f64)
    }

    /// The same images in an order fixed by the seed.
    pub fn shuffled(&self, seed: u64) -> Images {
        self.select(&shuffled(self.len(), seed))
    }

    /// Splits into the first images, which are the share `fraction` of all, and the rest. Shuffle before, if the file is ordered.
    pub fn split(&self, fraction: f64) -> (Images, Images) {
        let count = ((self.len() as f64 * fraction.clamp(0.0, 1.0)).round() as usize).min(self.len());
        let order: Vec<usize> = (0..self.len()).collect();
        (self.select(&order[..count]), self.select(&order[count..]))
    }

    fn select(&self, order: &[usize]) -> Images {
        Images {
            pixels: order.iter().flat_map(|&i| self.image(i).iter().copied()).collect(),
            labels: order.iter().map(|&i| self.labels[i]).collect(),
            ..*self
        }
    }
}

/// 1,797 handwritten digits of 8×8 pixels, part of the crate (UCI, E. Alpaydin and C. Kaynak, CC BY 4.0; see `examples/data/NOTICE`). They
/// are in the order of the file; [`Images::shuffled`] mixes the writers.
pub fn digits() -> Result<Images> {
    const FILE: &str = "examples/data/digits.csv.gz";
    let packed: &[u8] = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/digits.csv.gz"));
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(packed), &mut text)
        .map_err(|e| Error::format(FILE, format!("cannot be unpacked: {e}")))?;
    parse_digits(&text).map_err(|message| Error::format(FILE, message))
}

fn parse_digits(text: &str) -> Result<Images, String> {
    let mut images = Images { width: 8, height: 8, classes: 10, pixels: Vec::new(), labels: Vec::new() };
    for (number, line) in text.lines().enumerate() {
        let wrong = || format!("line {}: 64 pixels from 0 to 16 and a label from 0 to 9 expected", number + 1);
        let values: Vec<u8> =
            line.split(',').map(|v| v.trim().parse()).collect::<Result<_, _>>().map_err(|_| wrong())?;
        let [pixels @ .., label] = values.as_slice() else { return Err(wrong()) };
        if pixels.len() != 64 || pixels.iter().any(|&p| p > 16) || *label > 9 {
            return Err(wrong());
        }
        images.pixels.extend(pixels.iter().map(|&p| f32::from(p) / 16.0));
        images.labels.push(u32::from(*label));
    }
    Ok(images)
}

/// Images and labels in MNIST's IDX format, packed with gzip or not; pixels are scaled to 0 to 1.
///
/// ```no_run
/// # fn main() -> prismgrad::Result<()> {
/// use prismgrad::data::{data_file, images::idx};
/// let test = idx(data_file("t10k-images-idx3-ubyte.gz")?, data_file("t10k-labels-idx1-ubyte.gz")?)?;
/// # Ok(()) }
/// ```
pub fn idx(images: impl AsRef<Path>, labels: impl AsRef<Path>) -> Result<Images> {
    let (image_path, label_path) = (images.as_ref(), labels.as_ref());
    let (dims, pixels) = read_idx(image_path)?;
    let (label_dims, labels) = read_idx(label_path)?;
    let [count, height, width] = dims[..] else {
        return Err(Error::format(image_path, format!("has dimensions {dims:?}; images have three")));
    };
    if label_dims != [count] {
        let message = format!("has dimensions {label_dims:?}, but there are {count} images");
        return Err(Error::format(label_path, message));
    }
    Ok(Images {
        width,
        height,
        classes: labels.iter().max().map_or(0, |&m| usize::from(m) + 1),
        pixels: pixels.into_iter().map(|p| f32::from(p) / 255.0).collect(),
        labels: labels.into_iter().map(u32::from).collect(),
    })
}

/// Reads an IDX file of unsigned bytes, and returns its dimensions and its content.
pub fn read_idx(path: impl AsRef<Path>) -> Result<(Vec<usize>, Vec<u8>)> {
    let path = path.as_ref();
    let mut bytes = read_maybe_gzip(path, 1 << 30)?;
    let rank = match bytes.as_slice() {
        [0, 0, 8, rank, ..] => usize::from(*rank),
        [0, 0, kind, _, ..] => {
            return Err(Error::format(
                path,
                format!("has the IDX element type {kind:#04x}; only bytes (0x08) are read"),
            ));
        }
        _ => return Err(Error::format(path, "is not an IDX file")),
    };
    let header = 4 + 4 * rank;
    if bytes.len() < header {
        return Err(Error::format(path, "is cut off inside its header"));
    }
    let dims: Vec<usize> =
        bytes[4..header].chunks_exact(4).map(|d| u32::from_be_bytes([d[0], d[1], d[2], d[3]]) as usize).collect();
    let wanted = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let found = bytes.len() - header;
    if wanted != Some(found) {
        return Err(Error::format(path, format!("its dimensions {dims:?} do not fit the {found} bytes that follow")));
    }
    bytes.drain(..header);
    Ok((dims, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;

    #[test]
    fn the_digits_are_all_there() {
        let digits = digits().unwrap();
        assert_eq!((digits.len(), digits.size(), digits.classes), (1797, 64, 10));
        assert_eq!(digits.labels[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(digits.image(0)[..4], [0.0, 0.0, 5.0 / 16.0, 13.0 / 16.0]);
        // Class counts as published for this set.
        let mut counts = [0; 10];
        digits.labels.iter().for_each(|&l| counts[l as usize] += 1);
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        let (train, test) = digits.shuffled(3).split(0.8);
        assert_eq!((train.len(), test.len()), (1438, 359));
        assert_eq!(train.pixels.iter().chain(&test.pixels).sum::<f32>(), digits.shuffled(3).pixels.iter().sum::<f32>());
        let (pixels, labels) = digits.batch(&[1, 0]).unwrap();
        assert_eq!((&pixels[64..], &labels[..]), (digits.image(0), &[1, 0][..]));
        assert!(digits.batch(&[1797]).is_err());
    }

    #[test]
    fn wrong_lines_are_named() {
        for text in ["1,2,3", "", "a", &format!("{}17,1", "0,".repeat(63)), &format!("{}0,10", "0,".repeat(63))] {
            let result = parse_digits(&format!("{text}\n"));
            assert!(result.unwrap_err().starts_with("line 1"), "{text}");
        }
    }

    #[test]
    fn idx_is_read_and_checked() {
        let folder = Scratch::new("idx");
        let (images, labels) = (folder.join("images"), folder.join("labels"));
        let header = [[0, 0, 8, 3], [0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 3]].concat();
        let good = [header.as_slice(), &[0, 51, 255, 1, 2, 3]].concat();
        std::fs::write(&images, &good).unwrap();
        std::fs::write(&labels, [0, 0, 8, 1, 0, 0, 0, 2, 7, 4]).unwrap();
        let set = idx(&images, &labels).unwrap();
        assert_eq!((set.height, set.width, set.classes, &set.labels[..]), (1, 3, 8, &[7, 4][..]));
        assert_eq!(set.image(0), [0.0, 0.2, 1.0]);
        for end in 0..good.len() {
            std::fs::write(&images, &good[..end]).unwrap();
            assert!(idx(&images, &labels).unwrap_err().to_string().contains("images"), "cut to {end}");
        }
        std::fs::write(&images, [0, 0, 8, 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255]).unwrap();
        assert!(idx(&images, &labels).is_err());
        std::fs::write(&images, [0, 0, 13, 1, 0, 0, 0, 0]).unwrap();
        assert!(idx(&images, &labels).unwrap_err().to_string().contains("0x0d"));
        assert!(idx(&labels, &labels).unwrap_err().to_string().contains("three"));
    }
}
