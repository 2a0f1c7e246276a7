//! One picture file to 8-bit RGB.

use std::io::Cursor;
use std::path::Path;

use image::{ImageReader, Limits};

use crate::error::{Error, Result};

/// Longest side accepted, in pixels: far above any classifier's input, far below what a crafted
/// header can claim.
const LONGEST_SIDE: u32 = 16_384;
/// Memory one picture may take while it is decoded.
const DECODE_BYTES: u64 = 1 << 30;

/// A decoded picture: 8-bit RGB, rows of interleaved pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub rgb: Vec<u8>,
}

/// Reads a PNG or JPEG; the format is told by the content, not by the name. Grey becomes RGB and
/// transparency is dropped, as Pillow's `convert("RGB")` does.
///
/// # Errors
/// When the file cannot be read, is not a whole PNG or JPEG, or is unreasonably large.
pub fn read_picture(path: &Path) -> Result<Picture> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, &error))?;
    decode_picture(&bytes)
}

/// As [`read_picture`], from memory.
///
/// # Errors
/// When `bytes` are not a whole PNG or JPEG of reasonable size.
pub fn decode_picture(bytes: &[u8]) -> Result<Picture> {
    let refuse = |error: image::ImageError| Error::input(first_line(&error.to_string()));
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| Error::input(error.to_string()))?;
    let mut limits = Limits::default();
    limits.max_image_width = Some(LONGEST_SIDE);
    limits.max_image_height = Some(LONGEST_SIDE);
    limits.max_alloc = Some(DECODE_BYTES);
    reader.limits(limits);
    let rgb = reader.decode().map_err(refuse)?.into_rgb8();
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    Ok(Picture { width, height, rgb: rgb.into_raw() })
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
