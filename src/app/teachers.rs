//! Opening the models of a zoo as teachers, each by the access its spec says.

use std::path::{Path, PathBuf};

use crate::access::library::RuntimeOptions;
use crate::access::runtime::Runtime;
use crate::access::{BlackOptions, BlackTeacher, Surrogate, Teacher, WhiteTeacher};
use crate::error::{Error, Result, ResultExt};
use crate::onnx;
use crate::zoo::{Access, ModelSpec};

/// What opening needs beside the specs.
#[derive(Debug, Clone)]
pub struct TeacherOptions {
    /// Real path of the zoo; external data must lie inside.
    pub zoo: PathBuf,
    /// Where ONNX Runtime is looked for, when a black-box model asks for it.
    pub runtime: RuntimeOptions,
    /// Statistics of white-box models that hold none.
    pub surrogate: Surrogate,
    /// How black-box models are asked.
    pub black: BlackOptions,
    /// Budget of a black-box model whose sidecar gives none.
    pub query_budget: Option<u64>,
}

/// Opens one model.
///
/// # Errors
/// When the file cannot be compiled or opened; when ONNX Runtime is needed and missing.
pub fn open(spec: &ModelSpec, options: &TeacherOptions) -> Result<Box<dyn Teacher>> {
    let mut spec = spec.clone();
    match spec.access {
        Access::WhiteBox => Ok(Box::new(open_white(&spec, &options.zoo, options.surrogate)?)),
        Access::BlackBox => {
            let runtime = Runtime::load(&options.runtime)?;
            spec.query_budget = spec.query_budget.or(options.query_budget);
            Ok(Box::new(BlackTeacher::open(spec, runtime, options.black)?))
        }
        Access::Remote => Err(Error::unsupported("remote models cannot be queried yet")
            .context(format!("model `{}`", spec.id))
            .hint("leave the model out of the zoo")),
    }
}

/// Opens one model as white-box, whatever its spec says of access.
///
/// # Errors
/// When the file cannot be read or compiled.
pub fn open_white(spec: &ModelSpec, zoo: &Path, surrogate: Surrogate) -> Result<WhiteTeacher> {
    let model = onnx::load(&spec.path, zoo)?;
    WhiteTeacher::new(spec.clone(), model.graph, surrogate)
        .context(|| format!("cannot use model `{}` as white-box", spec.id))
}
