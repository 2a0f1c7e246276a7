//! Turning, stretching and shearing an image about its centre, with the way back of its gradient.

use super::ShiftEdge;
use crate::tensor::RngStream;

/// A random affine map about the image's centre; each of its parts is drawn uniformly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AffineMap {
    /// Largest turn, each way, degrees.
    pub rotation: f32,
    /// Largest factor of size; the smallest is one over it. At least 1.
    pub scale: f32,
    /// Largest shear, each way: columns a row is moved by, per row from the centre.
    pub shear: f32,
}

impl AffineMap {
    /// Where a pixel of the changed image comes from: the inverse map `[[yy, yx], [xy, xx]]` on
    /// offsets from the centre.
    pub(super) fn draw(&self, rng: &mut RngStream) -> [[f32; 2]; 2] {
        let turn = rng.uniform_in(-self.rotation, self.rotation).to_radians();
        let size = self.scale.powf(rng.uniform_in(-1.0, 1.0));
        let shear = rng.uniform_in(-self.shear, self.shear);
        // Forward: (y, x) -> size * turn(y, x + shear * y). Its inverse undoes the turn, then the shear.
        let (sin, cos) = turn.sin_cos();
        let [yy, yx] = [cos / size, sin / size];
        [[yy, yx], [-sin / size - shear * yy, cos / size - shear * yx]]
    }
}

/// Four pixels, by their places in the plane, and what each weighs (bilinear). A place outside is
/// `None` where the edge is grey.
pub(super) type Taps = [(Option<usize>, f32); 4];

/// What pixel (`row`, `column`) of the changed image is made of.
pub(super) fn taps(
    inverse: [[f32; 2]; 2],
    shift: [i64; 2],
    edge: ShiftEdge,
    [height, width]: [usize; 2],
    [row, column]: [usize; 2],
) -> Taps {
    let centre = [height, width].map(|side| (side as f32 - 1.0) / 2.0);
    let at = [row as i64 - shift[0], column as i64 - shift[1]];
    let at = [at[0] as f32 - centre[0], at[1] as f32 - centre[1]];
    let from = [0, 1].map(|i| inverse[i][0] * at[0] + inverse[i][1] * at[1] + centre[i]);
    let corner = from.map(f32::floor);
    let [fy, fx] = [from[0] - corner[0], from[1] - corner[1]];
    let [top, left] = corner.map(|at| at as i64);
    let place = |dy: i64, dx: i64| {
        Some(edge.place(top + dy, height)? * width + edge.place(left + dx, width)?)
    };
    [
        (place(0, 0), (1.0 - fy) * (1.0 - fx)),
        (place(0, 1), (1.0 - fy) * fx),
        (place(1, 0), fy * (1.0 - fx)),
        (place(1, 1), fy * fx),
    ]
}
