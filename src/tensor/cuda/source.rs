//! The kernels' program text, and what each kernel takes.

use super::Argument;
use crate::error::{Error, Result};

/// The files of the program, in order.
pub const FILES: [(&str, &str); 10] = [
    ("common.cu", include_str!("kernels/common.cu")),
    ("elementwise.cu", include_str!("kernels/elementwise.cu")),
    ("channel.cu", include_str!("kernels/channel.cu")),
    ("convolution.cu", include_str!("kernels/convolution.cu")),
    ("pool.cu", include_str!("kernels/pool.cu")),
    ("row.cu", include_str!("kernels/row.cu")),
    ("reduce.cu", include_str!("kernels/reduce.cu")),
    ("movement.cu", include_str!("kernels/movement.cu")),
    ("objective.cu", include_str!("kernels/objective.cu")),
    ("pixels.cu", include_str!("kernels/pixels.cu")),
];

/// Kind of a kernel's parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `float*` or `int*`, to read or to write.
    Pointer,
    /// `int`.
    Integer,
    /// `float`.
    Float,
}

/// A kernel as its source declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// Its name.
    pub name: String,
    /// Its parameters.
    pub parameters: Vec<Kind>,
    /// Whether threads of a block wait for one another.
    pub barriers: bool,
}

/// The whole program.
pub fn program() -> String {
    FILES.iter().map(|(name, text)| format!("// {name}\n{text}\n")).collect()
}

/// All kernels of the program.
///
/// # Errors
/// When the text declares one in a form that this does not read (a defect of this crate).
pub fn signatures() -> Result<Vec<Signature>> {
    const START: &str = "extern \"C\" __global__ void ";
    let program = program();
    program.split(START).skip(1).map(signature).collect()
}

fn signature(text: &str) -> Result<Signature> {
    let bad = || Error::internal(format!("kernel declaration `{:.60}`", text.replace('\n', " ")));
    let (name, rest) = text.split_once('(').ok_or_else(bad)?;
    let (list, body) = rest.split_once(')').ok_or_else(bad)?;
    let parameters = list
        .split(',')
        .map(|parameter| {
            let words: Vec<&str> = parameter.split_whitespace().collect();
            match words[..] {
                ["const", "float*" | "int*", _] | ["float*" | "int*", _] => Ok(Kind::Pointer),
                ["int", _] => Ok(Kind::Integer),
                ["float", _] => Ok(Kind::Float),
                _ => Err(bad()),
            }
        })
        .collect::<Result<_>>()?;
    let barriers = ["__syncthreads", "block_sum", "block_max"].iter().any(|b| body.contains(b));
    Ok(Signature { name: name.to_owned(), parameters, barriers })
}

impl Signature {
    /// # Errors
    /// When `arguments` are not of the kinds that the kernel takes (a defect of this crate).
    pub fn check(&self, arguments: &[Argument]) -> Result<()> {
        let given = arguments.iter().map(|argument| match argument {
            Argument::Pointer(_) => Kind::Pointer,
            Argument::Integer(_) => Kind::Integer,
            Argument::Float(_) => Kind::Float,
        });
        if given.clone().ne(self.parameters.iter().copied()) {
            let (name, given) = (&self.name, given.collect::<Vec<_>>());
            let wanted = &self.parameters;
            return Err(Error::internal(format!(
                "kernel {name} takes {wanted:?}, got `{given:?}`"
            )));
        }
        Ok(())
    }
}
