//! Lists of tensors, one a parameter, as gradients come.

use candle_core::Tensor;

use crate::error::Result;

/// Adds `others` to `sums`, one by one.
///
/// # Errors
/// When shapes differ.
pub fn add_all(sums: &mut [Tensor], others: &[Tensor]) -> Result<()> {
    for (sum, other) in sums.iter_mut().zip(others) {
        *sum = (&*sum + other)?;
    }
    Ok(())
}

/// Whether all values (`f32`) are numbers.
///
/// # Errors
/// When a tensor cannot be read from its device.
pub fn all_finite(tensors: &[Tensor]) -> Result<bool> {
    for tensor in tensors {
        if tensor.flatten_all()?.to_vec1::<f32>()?.iter().any(|v| !v.is_finite()) {
            return Ok(false);
        }
    }
    Ok(true)
}
