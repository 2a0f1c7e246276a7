//! Our side of first contact: processes of this program that try files, one a worker, kept for the next file.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Answer, Job, ProbeInput, ProbeLimits, ProbeReport, ProbeRequest, VERB, died, late};
use crate::error::{Error, Result};

/// Seconds that the process which watches the clock itself is given beyond its limit.
const GRACE_S: u64 = 5;

/// Tries model files out, from any number of threads.
#[derive(Debug)]
pub struct Prober {
    executable: PathBuf,
    library: PathBuf,
    idle: Mutex<Vec<Server>>,
    started: AtomicUsize,
}

impl Prober {
    /// A prober that starts `executable` (this program) with the ONNX Runtime at `library` when it is first asked.
    pub fn new(executable: &Path, library: &Path) -> Self {
        Self {
            executable: executable.to_path_buf(),
            library: library.to_path_buf(),
            idle: Mutex::default(),
            started: AtomicUsize::new(0),
        }
    }

    /// Processes started so far.
    pub fn started(&self) -> usize {
        self.started.load(Ordering::Relaxed)
    }

    /// Loads and runs `model` under `limits`; `input` is what is known of its image input, which is guessed from the
    /// file otherwise.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] with the reason when the model is refused, crashes ONNX Runtime, hangs or exhausts
    /// it; [`crate::ErrorKind::Internal`] when the process cannot be started.
    pub fn probe(
        &self,
        model: &Path,
        input: Option<ProbeInput>,
        limits: &ProbeLimits,
    ) -> Result<ProbeReport> {
        let (model, library) = (model.to_path_buf(), self.library.clone());
        let job = Job { request: ProbeRequest { model, library, input }, limits: *limits };
        let mut line = serde_json::to_string(&job)
            .map_err(|error| Error::internal(format!("cannot write the job: `{error}`")))?;
        line.push('\n');
        // One that died since it was last asked (killed for memory, say) is no fault of this model.
        let waiting = self.idle().pop();
        if let Some(mut server) = waiting
            && let Some(answer) = server.ask(&line, limits)?
        {
            return self.conclude(server, &answer);
        }
        self.started.fetch_add(1, Ordering::Relaxed);
        let mut server = Server::start(&self.executable)?;
        match server.ask(&line, limits)? {
            Some(answer) => self.conclude(server, &answer),
            None => Err(server.why_gone(limits)),
        }
    }

    /// Keeps the process for the next file; the report in its answer.
    fn conclude(&self, server: Server, answer: &str) -> Result<ProbeReport> {
        self.idle().push(server);
        let answer: Answer = serde_json::from_str(answer)
            .map_err(|error| Error::internal(format!("no answer of a probe: `{error}`")))?;
        answer.into_result()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Server>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process that answers jobs; it ends when dropped.
#[derive(Debug)]
struct Server {
    child: Child,
    answers: Receiver<String>,
}

impl Server {
    fn start(executable: &Path) -> Result<Self> {
        let mut child = Command::new(executable)
            .args(["--jobs", "1", VERB])
            .env("ORT_DISABLE_TELEMETRY", "1")
            // A fork touches all its memory for the first time: in pages of 2 MiB, where the system has them, that took
            // a third less time for a ResNet-18 (docs/black-box.md). Other C libraries ignore it.
            .env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| {
                Error::internal(format!("cannot start `{}`: {error}", executable.display()))
            })?;
        let Some(stdout) = child.stdout.take() else {
            return Err(Error::internal("the probe's process has no `stdout`"));
        };
        // A thread reads, so that waiting has an end; it ends when the process does.
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, answers })
    }

    /// The answer to `job`; `None` when the process is gone.
    ///
    /// # Errors
    /// When it says nothing in time; it is of no use then.
    fn ask(&mut self, job: &str, limits: &ProbeLimits) -> Result<Option<String>> {
        // A process that is gone already is told by its silence.
        if let Some(stdin) = &mut self.child.stdin {
            let _ = stdin.write_all(job.as_bytes()).and_then(|()| stdin.flush());
        }
        match self.answers.recv_timeout(Duration::from_secs(limits.wall_s + GRACE_S)) {
            Ok(answer) => Ok(Some(answer)),
            Err(RecvTimeoutError::Timeout) => Err(late(limits)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
        }
    }

    fn why_gone(&mut self, limits: &ProbeLimits) -> Error {
        match self.child.wait() {
            Ok(status) => died(status, limits),
            Err(error) => Error::internal(format!("the probe's process is lost: {error}")),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
