//! Opening the models of a zoo as teachers, each by the access its spec says.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::access::library::RuntimeOptions;
use crate::access::runtime::Runtime;
use crate::access::{BlackOptions, BlackTeacher, Borrowing, Surrogate, Teacher, WhiteTeacher};
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

/// The models of a zoo that lend their statistics to those that hold none; opened when the first one asks.
pub struct Lenders<'a> {
    specs: Vec<&'a ModelSpec>,
    zoo: &'a Path,
    open: OnceLock<Vec<Arc<WhiteTeacher>>>,
}

impl<'a> Lenders<'a> {
    /// At most `most` of those `specs` that hold statistics, spread evenly over them.
    pub fn new(specs: &[&'a ModelSpec], zoo: &'a Path, most: usize) -> Self {
        let lends = |spec: &&&ModelSpec| spec.access == Access::WhiteBox && spec.norm_taps > 0;
        let all: Vec<&ModelSpec> = specs.iter().filter(lends).copied().collect();
        let count = most.min(all.len());
        let specs = (0..count).map(|i| all[i * all.len() / count]).collect();
        Self { specs, zoo, open: OnceLock::new() }
    }

    /// `teacher`, with borrowed statistics where it is white-box and has none. A lender that cannot be
    /// opened lends nothing; its own turn says why.
    pub fn lend(&self, teacher: Box<dyn Teacher>) -> Box<dyn Teacher> {
        if teacher.spec().access != Access::WhiteBox || teacher.statistics_layers() > 0 {
            return teacher;
        }
        let open =
            |spec: &&ModelSpec| open_white(spec, self.zoo, Surrogate::Off).ok().map(Arc::new);
        let lenders = self.open.get_or_init(|| self.specs.iter().filter_map(open).collect());
        Borrowing::new(teacher, lenders)
    }
}
