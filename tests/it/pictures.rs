//! Tiny pictures for tests.

use std::path::Path;

/// Writes a PNG of `[width, height]` whose pixel (x, y) is `color(x, y)`, with its folders.
pub(crate) fn write_picture(path: &Path, size: [u32; 2], color: impl Fn(u32, u32) -> [u8; 3]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    image::RgbImage::from_fn(size[0], size[1], |x, y| image::Rgb(color(x, y))).save(path).unwrap();
}

/// `ROOT/CLASS/000.png...`: `count` pictures a class that differ by class (colour) and by number (a
/// stripe), so that a rule on pixels can tell the classes.
pub(crate) fn write_classes(root: &Path, classes: &[&str], count: usize, size: [u32; 2]) {
    for (class, name) in classes.iter().enumerate() {
        for number in 0..count {
            let path = root.join(name).join(format!("{number:03}.png"));
            write_picture(&path, size, |x, _| {
                let stripe = if x as usize == number % size[0] as usize { 40 } else { 0 };
                [(class * 37 % 200) as u8 + stripe, (class * 91 % 200) as u8, 120]
            });
        }
    }
}
