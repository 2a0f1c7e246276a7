//! `cargo xtask`: the README's two commands on a machine with nothing but cargo, pip and a C linker.
//!
//! metazoa needs two things that are not Rust: `protoc` while candle-onnx is built, and ONNX Runtime
//! when models run. The first comes from the environment or from the crate `protoc-bin-vendored`,
//! the second from `metazoa setup` (the PyPI wheel, through the user's own pip index). Nothing here
//! is needed by a user who has both: `cargo build` and `cargo test` work alone.
//!
//! `run` and `test` build with the same profile and features, so candle is compiled once;
//! `features` (a part of `check`) proves the latter.

mod features;
mod tools;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};

const USAGE: &str = "\
usage: cargo xtask <task> [arguments]

  run [ARGS]    set up, build and run `metazoa run ARGS` (without ARGS: the main job on zoo/)
  test [ARGS]   set up, build and run `cargo test --workspace ARGS`
  check         rustfmt, clippy and rustdoc without a warning, and the task `features`
  features      `cargo build` and `cargo test` must resolve the same features (one build of candle)
  schemas       rewrite schemas/ from the Rust types
  setup         only what `run` and `test` do first: build, then fetch ONNX Runtime
";

/// Why a task stopped: the exit code of the program that failed, or our own message.
enum Failure {
    Exit(u8),
    Message(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Message(message)
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let task = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    let result = match task.as_str() {
        "run" => set_up().and_then(|()| run_main_job(&rest)),
        "test" => set_up()
            .and_then(|()| tools::fetch_node_tests().map_err(Failure::Message))
            .and_then(|()| run_tests(&rest)),
        "check" => check(),
        "features" => features::check().map_err(Failure::Message),
        "schemas" => update_schemas(),
        "setup" => set_up(),
        "" | "help" | "-h" | "--help" => {
            print!("{USAGE}");
            Ok(())
        }
        other => Err(Failure::Message(format!("no task is called `{other}`\n\n{USAGE}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Exit(code)) => ExitCode::from(code),
        Err(Failure::Message(message)) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

/// Builds the command and lets it fetch ONNX Runtime; a later call finds both done.
fn set_up() -> Result<(), Failure> {
    tools::require_linker()?;
    tools::require_pip()?;
    eprintln!("xtask: building (the first time about eleven minutes on two cores)");
    finish(tools::cargo()?.args(["build", "--package", "metazoa", "--bin", "metazoa"]))?;
    if tools::has_own_library() {
        return Ok(());
    }
    // stdout belongs to the task that follows.
    finish(tools::metazoa()?.arg("setup").stdout(Stdio::null()))
}

/// The main job. On Unix this process becomes `metazoa`, so that Ctrl-C reaches it alone and its
/// exit code is ours.
fn run_main_job(arguments: &[String]) -> Result<(), Failure> {
    let mut command = tools::metazoa()?;
    command.arg("run").args(arguments);
    become_command(command)
}

#[cfg(unix)]
fn become_command(mut command: Command) -> Result<(), Failure> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(Failure::Message(format!("cannot run {command:?}: {error}")))
}

#[cfg(not(unix))]
fn become_command(mut command: Command) -> Result<(), Failure> {
    finish(&mut command)
}

/// `cargo test --workspace`, its output passed on, and the sum over all test binaries as last line
/// (cargo prints one result line a binary, and the last may well be that of an empty one).
fn run_tests(arguments: &[String]) -> Result<(), Failure> {
    let mut command = tools::cargo()?;
    command.args(["test", "--workspace"]).args(arguments).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("cannot run cargo: {error}"))?;
    let stdout = child.stdout.take().ok_or_else(|| "cargo has no output".to_owned())?;
    let mut sum = TestCount::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.map_err(|error| format!("cannot read the output of cargo: {error}"))?;
        sum.add_line(&line);
        // A closed pipe at our own output must not end the tests.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    let status = child.wait().map_err(|error| format!("cannot wait for cargo: {error}"))?;
    println!("{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.ignored);
    if status.success() { Ok(()) } else { Err(Failure::Exit(exit_code(status))) }
}

/// Sums of libtest's result lines.
#[derive(Debug, Default, PartialEq, Eq)]
struct TestCount {
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl TestCount {
    /// Adds `test result: ok. 12 passed; 0 failed; 1 ignored; ...`; other lines count nothing.
    fn add_line(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        for part in result.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let Some(Ok(count)) = words.next().map(str::parse::<usize>) else { continue };
            match words.next() {
                Some("passed") => self.passed += count,
                Some("failed") => self.failed += count,
                Some("ignored") => self.ignored += count,
                _ => {}
            }
        }
    }
}

fn check() -> Result<(), Failure> {
    finish(tools::cargo()?.args(["fmt", "--all", "--check"]))?;
    let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    finish(tools::cargo()?.args(clippy))?;
    finish(
        tools::cargo()?
            .args(["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    features::check()?;
    Ok(())
}

fn update_schemas() -> Result<(), Failure> {
    let test = ["test", "--package", "metazoa", "--test", "it", "schemas_are_current"];
    finish(tools::cargo()?.args(test).env("UPDATE_SCHEMAS", "1"))
}

/// Runs a command to its end; its failure is ours.
fn finish(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|error| format!("cannot run {command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(Failure::Exit(exit_code(status))) }
}

/// The exit code as a shell would see it; a program killed by a signal counts as failed.
fn exit_code(status: std::process::ExitStatus) -> u8 {
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(101)
}

#[cfg(test)]
mod tests {
    use super::TestCount;

    #[test]
    fn sums_the_result_lines_of_all_test_binaries() {
        let mut sum = TestCount::default();
        for line in [
            "running 3 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.23s",
            "test result is 5 passed",
        ] {
            sum.add_line(line);
        }
        assert_eq!(sum, TestCount { passed: 15, failed: 2, ignored: 1 });
    }
}
