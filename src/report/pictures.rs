//! Contact sheets: many small images in one PNG.

use std::io::Cursor;

use image::{ImageFormat, RgbImage};

use crate::error::{Error, Result};
use crate::tensor::Images;

/// Pixels between two images.
const GAP: usize = 2;
/// Images smaller than this are shown enlarged by a whole factor.
const COMFORTABLE: usize = 48;

/// A PNG with one row a class, in order of the labels, of at most `columns` images each. Values are
/// clamped to [0, 1]; the ground is transparent, so the sheet sits on light and dark pages.
///
/// # Errors
/// When labels and images differ in number, or the images are not RGB.
pub fn contact_sheet(images: &Images, labels: &[usize], columns: usize) -> Result<Vec<u8>> {
    let [n, channels, height, width] = images.shape();
    if labels.len() != n || channels != 3 {
        return Err(Error::internal(format!(
            "a contact sheet needs RGB images with a label each, got {:?} and `{}`",
            images.shape(),
            labels.len()
        )));
    }
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&image| labels[image]);
    let mut last = None;
    for image in order {
        if last != Some(labels[image]) {
            rows.push(Vec::new());
            last = Some(labels[image]);
        }
        if let Some(row) = rows.last_mut().filter(|row| row.len() < columns) {
            row.push(image);
        }
    }
    let zoom = COMFORTABLE.div_ceil(height.max(width).max(1)).max(1);
    let (cell_height, cell_width) = (height * zoom + GAP, width * zoom + GAP);
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut sheet = image::RgbaImage::new(
        (longest * cell_width).saturating_sub(GAP).max(1) as u32,
        (rows.len() * cell_height).saturating_sub(GAP).max(1) as u32,
    );
    for (row, members) in rows.iter().enumerate() {
        for (column, &image) in members.iter().enumerate() {
            let picture = to_picture(images.image(image), height, width);
            for (x, y, pixel) in picture.enumerate_pixels() {
                let [r, g, b] = pixel.0;
                for (dx, dy) in (0..zoom).flat_map(|dx| (0..zoom).map(move |dy| (dx, dy))) {
                    let x = column * cell_width + x as usize * zoom + dx;
                    let y = row * cell_height + y as usize * zoom + dy;
                    sheet.put_pixel(x as u32, y as u32, image::Rgba([r, g, b, 255]));
                }
            }
        }
    }
    let mut png = Cursor::new(Vec::new());
    sheet
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|error| Error::internal(format!("cannot write a PNG: `{error}`")))?;
    Ok(png.into_inner())
}

/// One canonical image as a PNG.
///
/// # Errors
/// When `planes` is not `3 * height * width` values.
pub fn image_png(planes: &[f32], height: usize, width: usize) -> Result<Vec<u8>> {
    if planes.len() != 3 * height * width {
        return Err(Error::internal(format!("not an RGB image: `{}` values", planes.len())));
    }
    let mut png = Cursor::new(Vec::new());
    to_picture(planes, height, width)
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|error| Error::internal(format!("cannot write a PNG: `{error}`")))?;
    Ok(png.into_inner())
}

fn to_picture(planes: &[f32], height: usize, width: usize) -> RgbImage {
    let byte = |value: f32| (value.clamp(0.0, 1.0) * 255.0).round() as u8;
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let at = y as usize * width + x as usize;
        image::Rgb([0, 1, 2].map(|channel| byte(planes[channel * height * width + at])))
    })
}
