//! Our side of first contact: processes of this program that try files, one a worker, kept for the next file.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Mutex, PoisonError};
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
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = idle().pop();
        let mut server = match waiting {
            Some(server) => server,
            None => {
                self.started.fetch_add(1, Ordering::Relaxed);
                Server::start(&self.executable)?
            }
        };
        let text = server.ask(&line, limits)?;
        idle().push(server);
        let answer: Answer = serde_json::from_str(&text)
            .map_err(|error| Error::internal(format!("no answer of a probe: `{error}`")))?;
        answer.into_result()
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

    /// The answer to `job`.
    ///
    /// # Errors
    /// When the process dies or says nothing in time; it is of no use then.
    fn ask(&mut self, job: &str, limits: &ProbeLimits) -> Result<String> {
        // A process that is gone already is told by its silence.
        if let Some(stdin) = &mut self.child.stdin {
            let _ = stdin.write_all(job.as_bytes()).and_then(|()| stdin.flush());
        }
        let wall = Duration::from_secs(limits.wall_s + GRACE_S);
        match self.answers.recv_timeout(wall) {
            Ok(answer) => Ok(answer),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(late(limits)),
            Err(mpsc::RecvTimeoutError::Disconnected) => match self.child.wait() {
                Ok(status) => Err(died(status, limits)),
                Err(error) => Err(Error::internal(format!("the probe's process is lost: {error}"))),
            },
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
