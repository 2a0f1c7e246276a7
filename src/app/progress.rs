//! How a use-case tells what it is doing, without knowing of terminals.

/// Receives the stages of long work. The command draws bars, tests and embedders use [`Silent`].
pub trait Progress: Send + Sync {
    /// Begins a stage ("ingest", "recover") of `total` steps, `None` when the number is unknown.
    fn stage(&self, name: &str, total: Option<u64>) -> Box<dyn Stage>;

    /// Says something worth a line ("model `a.onnx` rejected").
    fn note(&self, text: &str);
}

/// One stage in progress; ends when dropped. May be advanced from several threads.
pub trait Stage: Send + Sync {
    /// `steps` more are done.
    fn advance(&self, steps: u64);

    /// Shows a short figure beside the bar ("loss 0.41").
    fn message(&self, text: &str);
}

/// Progress that goes nowhere.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn stage(&self, _name: &str, _total: Option<u64>) -> Box<dyn Stage> {
        Box::new(Self)
    }

    fn note(&self, _text: &str) {}
}

impl Stage for Silent {
    fn advance(&self, _steps: u64) {}

    fn message(&self, _text: &str) {}
}
