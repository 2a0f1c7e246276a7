//! The command as a user meets it: help, completions, schemas, wrong calls.

use crate::support::{run_in, temp_dir};

#[test]
fn help_lists_only_what_works() {
    let here = temp_dir();
    let ran = run_in(here.path(), &["--help"]);
    assert_eq!(ran.code, 0);
    insta::assert_snapshot!(ran.stdout, @r"
    Turns a folder of pre-trained ONNX classifiers into one few-shot learner, without their training data

    Usage: metazoa [OPTIONS] <COMMAND>

    Commands:
      run          The main job: ingest, train, evaluate, export and report in one go
      ingest       Check every model of a folder and write its catalog.json
      inspect      Everything known of one model
      invert       Images of a model's classes, recovered from it
      train        Recover images from a zoo and meta-train on them
      eval         Few-shot accuracy of a run or an exported meta-model on real images
      bench        A grid of runs - scenarios, methods, ablations, seeds - evaluated, with tables and figures
      adapt        Turn a run and your own images, a folder a class, into a ready ONNX classifier
      export       Write a run's meta-model as ONNX, checked against ONNX Runtime
      report       Write a run's self-contained report.html
      setup        Fetch ONNX Runtime through your own pip index into metazoa's cache
      doctor       Show what was found on this machine and how to get what is missing
      schema       Print the JSON schemas of the files and results
      completions  Print shell completions
      help         Print this message or the help of the given subcommand(s)

    Options:
      -h, --help     Print help
      -V, --version  Print version

    Global options:
          --json             Print one JSON object on stdout instead of a table
          --seed <SEED>      Seed of all randomness: same seed, same bytes [default: 0]
          --jobs <N>         Worker threads; never changes a result [default: all cores]
          --device <DEVICE>  Where ONNX Runtime computes, cpu or cuda[:INDEX]; all else uses the cpu [default: cpu]
          --ort-lib <FILE>   The ONNX Runtime library to load (else ORT_DYLIB_PATH, the cache of `setup`, Python's)
      -q, --quiet            Say nothing but errors
      -v, --verbose...       Say more (-vv: everything)
          --no-progress      Draw no progress bars
    ");
}

#[test]
fn a_call_without_a_verb_shows_help_and_is_a_usage_error() {
    let here = temp_dir();
    let ran = run_in(here.path(), &[]);
    assert_eq!(ran.code, 2);
    assert!(ran.stdout.is_empty());
    assert!(ran.stderr.contains("Usage: metazoa"), "{}", ran.stderr);
}

#[test]
fn an_unknown_schema_names_those_there_are() {
    let here = temp_dir();
    let ran = run_in(here.path(), &["schema", "nothing"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""));
    let expected = "error: no schema is called `nothing`\nhint: there are `";
    assert!(ran.stderr.starts_with(expected), "{}", ran.stderr);
}

#[test]
fn an_unknown_device_is_refused_with_the_known_ones() {
    let here = temp_dir();
    let ran = run_in(here.path(), &["schema", "--device", "tpu"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("unknown device `tpu`"), "{}", ran.stderr);
}

#[test]
fn completions_know_every_verb() {
    let here = temp_dir();
    let ran = run_in(here.path(), &["completions", "bash"]);
    assert_eq!(ran.code, 0);
    for verb in
        ["ingest", "eval", "adapt", "export", "report", "setup", "doctor", "schema", "completions"]
    {
        assert!(ran.stdout.contains(verb), "{verb}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let here = temp_dir();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_metazoa"))
        .args(["completions", "zsh"])
        .current_dir(here.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
