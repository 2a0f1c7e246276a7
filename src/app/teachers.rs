//! Opening the models of a zoo as teachers, each by the access its spec says.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::config::WhiteBoxConfig;
use super::context::{Context, Secrets};
use super::progress::Progress;
use super::queries::Queries;
use super::{RunConfig, settings};
use crate::access::library::RuntimeOptions;
use crate::access::runtime::Runtime;
use crate::access::{
    BlackOptions, BlackTeacher, Borrowing, SessionPool, Surrogate, Teacher, WhiteTeacher,
};
#[cfg(feature = "cuda")]
use crate::error::ErrorKind;
use crate::error::{Error, Result, ResultExt};
use crate::onnx;
use crate::tensor::Device;
use crate::zoo::hash::unchanged;
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
    /// Budget of a black-box model whose sidecar gives none, where no `queries` are kept.
    pub query_budget: Option<u64>,
    /// Counts and limits of the run.
    pub queries: Option<Queries>,
    /// Where white-box models and ONNX Runtime compute.
    pub device: Device,
    /// Where to say which model stays on the processor.
    pub notes: Notes,
    /// Its sessions.
    pub pool: Arc<SessionPool>,
    /// Tokens of remote models.
    pub secrets: Secrets,
}

impl TeacherOptions {
    /// What `config` says, for the models of `zoo`.
    pub fn new(
        context: &Context,
        config: &RunConfig,
        zoo: PathBuf,
        runtime: RuntimeOptions,
    ) -> Self {
        let sessions = config.recover.black_box.max_open;
        // One for every worker, and as many idle ones of models that are asked by turns.
        let sessions = sessions.unwrap_or(2 * rayon::current_num_threads());
        Self {
            zoo,
            runtime,
            surrogate: settings::surrogate(config),
            black: settings::black_options(config),
            query_budget: config.recover.black_box.query_budget,
            queries: None,
            device: context.device,
            notes: Notes(Arc::clone(&context.progress)),
            pool: Arc::new(SessionPool::new(sessions)),
            secrets: context.secrets.clone(),
        }
    }

    /// Where ONNX Runtime asks the model: with the feature `cuda` a library that has no CUDA is no error, since white-box
    /// models do run on the card.
    fn asked_on(&self, runtime: &Runtime, spec: &ModelSpec) -> Device {
        #[cfg(feature = "cuda")]
        if let Err(error) = runtime.check_device(self.device) {
            let text = format!("model `{}` is asked on the processor: {error:#}", spec.id);
            self.notes.note(&text);
            return Device::Cpu;
        }
        let _ = (runtime, spec);
        self.device
    }

    fn count(&self, teacher: BlackTeacher, spec: &ModelSpec) -> Result<BlackTeacher> {
        match &self.queries {
            Some(queries) => Ok(teacher.with_budget(queries.budget(spec)?)),
            None => Ok(teacher),
        }
    }
}

/// Where remarks go.
#[derive(Clone)]
pub struct Notes(Arc<dyn Progress>);

impl Notes {
    /// Says something worth a line.
    pub fn note(&self, text: &str) {
        self.0.note(text);
    }
}

impl fmt::Debug for Notes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notes(..)")
    }
}

/// `teacher` on the card of `--device`. A model that the card cannot take stays on the processor, which is said.
#[cfg(feature = "cuda")]
fn placed(teacher: WhiteTeacher, options: &TeacherOptions, zoo: &Path) -> Result<WhiteTeacher> {
    let Device::Cuda(index, products) = options.device else { return Ok(teacher) };
    let card: Arc<dyn crate::tensor::cuda::Device> =
        crate::tensor::cuda::driver::Card::open(index, products)?;
    let spec = teacher.spec().clone();
    match teacher.on_device(&card) {
        Ok(teacher) => Ok(teacher),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            let text = format!("model `{}` is computed on the processor: {error:#}", spec.id);
            options.notes.note(&text);
            open_white(&spec, zoo, options.surrogate)
        }
        Err(error) => Err(error),
    }
}

/// Opens one model.
///
/// # Errors
/// When the file has changed since `spec` was made, cannot be compiled or opened; when ONNX Runtime is needed and
/// missing; when a server cannot be reached.
pub fn open(spec: &ModelSpec, options: &TeacherOptions) -> Result<Box<dyn Teacher>> {
    let mut spec = spec.clone();
    spec.query_budget = spec.query_budget.or(options.query_budget);
    match spec.access {
        Access::WhiteBox => {
            unchanged(&spec)?;
            let teacher = open_white(&spec, &options.zoo, options.surrogate)?;
            #[cfg(feature = "cuda")]
            let teacher = placed(teacher, options, &options.zoo)?;
            Ok(Box::new(teacher))
        }
        Access::BlackBox => {
            unchanged(&spec)?;
            let runtime = Runtime::load(&options.runtime)?;
            let (device, pool) = (options.asked_on(runtime, &spec), &options.pool);
            let teacher =
                BlackTeacher::open_in(spec.clone(), runtime, device, pool, options.black)?;
            Ok(Box::new(options.count(teacher, &spec)?))
        }
        Access::Remote => {
            let endpoint = spec.endpoint.as_ref();
            let endpoint = endpoint
                .ok_or_else(|| Error::internal(format!("no endpoint for model `{}`", spec.id)))?;
            let authorization = options.secrets.authorization(endpoint)?;
            let teacher = BlackTeacher::connect(spec.clone(), authorization, options.black)?;
            Ok(Box::new(options.count(teacher, &spec)?))
        }
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
    factor: f32,
    open: OnceLock<Vec<Arc<WhiteTeacher>>>,
}

impl<'a> Lenders<'a> {
    /// At most `lenders` of those `specs` that hold statistics, spread evenly over them.
    pub fn new(specs: &[&'a ModelSpec], zoo: &'a Path, config: &WhiteBoxConfig) -> Self {
        let lends = |spec: &&&ModelSpec| spec.access == Access::WhiteBox && spec.norm_taps > 0;
        let all: Vec<&ModelSpec> = specs.iter().filter(lends).copied().collect();
        let count = config.lenders.min(all.len());
        let specs = (0..count).map(|i| all[i * all.len() / count]).collect();
        Self { specs, zoo, factor: config.lent_factor, open: OnceLock::new() }
    }

    /// `teacher`, with borrowed statistics where it is white-box and has none. A lender that has changed or
    /// cannot be opened lends nothing; its own turn says why.
    pub fn lend(&self, teacher: Box<dyn Teacher>) -> Box<dyn Teacher> {
        if teacher.spec().access != Access::WhiteBox || teacher.statistics_layers() > 0 {
            return teacher;
        }
        let open = |spec: &&ModelSpec| {
            unchanged(spec)
                .and_then(|()| open_white(spec, self.zoo, Surrogate::Off))
                .map(Arc::new)
                .ok()
        };
        let lenders = self.open.get_or_init(|| self.specs.iter().filter_map(open).collect());
        Borrowing::over(teacher, lenders, self.factor)
    }
}

/// The models of a run as teachers, by their number among `specs`.
pub struct Opening<'a> {
    /// The models.
    pub specs: &'a [&'a ModelSpec],
    /// How they are opened.
    pub teachers: TeacherOptions,
    /// Who lends to those without statistics.
    pub lenders: Lenders<'a>,
}

impl Opening<'_> {
    /// Opens one.
    ///
    /// # Errors
    /// As [`open`].
    pub fn open(&self, index: usize) -> Result<Box<dyn Teacher>> {
        open(self.specs[index], &self.teachers).map(|teacher| self.lenders.lend(teacher))
    }
}
