//! Where the numbers are computed: the choice a user makes with `--device`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A compute device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The CUDA device of this index.
    Cuda(usize, Products),
}

/// How a GPU multiplies matrices of `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Products {
    /// In full single precision.
    #[default]
    Single,
    /// On tensor cores, factors rounded to 10 bits of mantissa (TF32): several times faster.
    TensorFloat32,
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (place, products) = match text.strip_suffix("+tf32") {
            Some(place) => (place, Products::TensorFloat32),
            None => (text, Products::Single),
        };
        match place.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if place == "cuda" => Ok(Self::Cuda(0, products)),
            Some(("cuda", index)) if index.parse::<usize>().is_ok() => {
                Ok(Self::Cuda(index.parse().unwrap_or_default(), products))
            }
            _ => Err(Error::usage(format!("unknown device `{text}`")).hint(
                "use `cpu`, `cuda` or `cuda:INDEX`; on a GPU `+tf32` behind it multiplies faster",
            )),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index, Products::Single) => write!(f, "cuda:{index}"),
            Self::Cuda(index, Products::TensorFloat32) => write!(f, "cuda:{index}+tf32"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_as_it_is_written() {
        let tf32 = Products::TensorFloat32;
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("cuda:0", Device::Cuda(0, Products::Single)),
            ("cuda:2+tf32", Device::Cuda(2, tf32)),
        ] {
            assert_eq!(text.parse::<Device>().unwrap(), device);
            assert_eq!(device.to_string(), text);
        }
        assert_eq!("cuda+tf32".parse::<Device>().unwrap(), Device::Cuda(0, tf32));
        for text in ["cpu+tf32", "cuda:", "cuda:-1", "tf32", "gpu"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }
}
