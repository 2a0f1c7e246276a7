//! A grid of runs as a user drives it: the built binary, tiny suites on models of the bundled zoo.

use std::collections::BTreeMap;
use std::path::Path;

use metazoa::app::bench::{Suite, cell_names};
use serde_json::Value;

use crate::main_job::{CONV4, small_zoo};
use crate::support::{Ran, metazoa, repository, run_in, shared, temp_dir};

/// Settings that make a run of a second.
const QUICK: &str = "\
settings:
  recover: {images_per_class: 6, white_box: {steps: 3}}
  meta: {steps: 4, shot: 2, query: 3, checkpoint_every: 2, width: 8}
";

fn images() -> String {
    repository().join("zoo/images/glyphs").display().to_string()
}

/// One scenario on `DIR/zoo`, two methods, one ablation; `more` follows at the end.
fn suite(more: &str) -> String {
    let images = images();
    format!(
        "schema_version: 1\nseeds: [0, 1]\nshots: [1, 2]\nway: 3\nquery: 4\nepisodes: 12\n{QUICK}\
         scenarios:\n  tiny:\n    zoo: zoo\n    meta_test:\n      glyphs: {{data: {images}, split: meta_test}}\n\
         methods:\n  inversion: {{method: inversion}}\n  purer: {{method: purer, curriculum: {{warm_up: 1, patience: 1}}}}\n\
         ablations:\n  purer-no-curriculum: {{of: purer, settings: {{curriculum: {{weight: 0}}, meta: {{learning_rate: 0.05}}}}}}\n{more}"
    )
}

fn bench(dir: &Path, text: &str, args: &[&str]) -> Ran {
    std::fs::write(dir.join("suite.yaml"), text).unwrap();
    run_in(dir, &[&["bench", "suite.yaml", "--out", "out"], args].concat())
}

fn rows(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("out/results.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Rows without what depends on a clock.
fn timeless(dir: &Path) -> Vec<Value> {
    let mut rows = rows(dir);
    for row in &mut rows {
        let row = row.as_object_mut().unwrap();
        // The note of calibration is what an episode took.
        if row["answered_by"] == "icfil" {
            row.remove("note");
        }
        row.retain(|key, _| {
            !key.contains("seconds") && !["attempts", "date"].contains(&key.as_str())
        });
    }
    rows
}

fn valid(name: &str, value: &Value) {
    let path = repository().join(format!("schemas/{name}.schema.json"));
    let schema: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    jsonschema::validate(&schema, value).unwrap_or_else(|error| panic!("{name}: {error}\n{value}"));
}

/// Files below `folder` and when they were written.
fn written(folder: &Path) -> BTreeMap<String, std::time::SystemTime> {
    let files = walkdir::WalkDir::new(folder).into_iter().map(Result::unwrap);
    files
        .filter(|entry| entry.file_type().is_file())
        .map(|entry| {
            (entry.path().display().to_string(), entry.metadata().unwrap().modified().unwrap())
        })
        .collect()
}

#[test]
fn a_suite_becomes_runs_results_tables_and_figures() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let more = "baselines: true\nicfil: [inversion]\nsweeps:\n  steps: {setting: meta.steps, values: [1, 3], \
                methods: [inversion], seeds: [0]}\n  models: {setting: max_models, values: [1, 2], seeds: [0], \
                methods: [inversion]}\n";
    let ran = bench(dir.path(), &suite(more), &["--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    valid("bench", &result);
    // Three variants with two seeds, four points of sweeps with one.
    assert_eq!((result["finished"].as_u64(), result["failed"].as_u64()), (Some(10), Some(0)));
    let rows = rows(dir.path());
    assert_eq!(result["rows"].as_array().unwrap(), &rows);
    rows.iter().for_each(|row| valid("bench-row", row));
    let own: Vec<&Value> = rows.iter().filter(|row| row["answered_by"].is_null()).collect();
    assert_eq!(own.len(), 10 * 2, "a row for each cell and shot");
    let names = |variant: &str| -> Vec<&str> {
        let here = |row: &&Value| row["variant"] == variant && row["seed"] == 0 && row["shot"] == 1;
        rows.iter().filter(here).filter_map(|row| row["answered_by"].as_str()).collect()
    };
    let baselines = ["average", "best-model", "pixel-nearest", "pixel-prototype", "untrained"];
    assert_eq!(names("purer"), baselines);
    assert_eq!(names("inversion"), [&["icfil"], &baselines[..]].concat());
    assert_eq!(names("purer-no-curriculum"), [""; 0], "baselines stand beside methods only");
    for row in &own {
        // What the run itself keeps of the evaluation.
        let file = format!(
            "out/cells/tiny/{}/seed-{}/eval/glyphs-meta_test-3way-{}shot-inductive.json",
            row["variant"].as_str().unwrap(),
            row["seed"],
            row["shot"]
        );
        let kept: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join(file)).unwrap()).unwrap();
        assert_eq!((&kept["accuracy"], &kept["ci95"]), (&row["accuracy"], &row["ci95"]));
        assert_eq!(
            (row["models_used"].as_u64(), row["queries"].as_u64()),
            (Some(if row["value"] == "1" && row["sweep"] == "models" { 1 } else { 2 }), Some(0))
        );
        assert!(row["seconds"].as_f64() > Some(0.0) && row["busy_seconds"].as_f64() > Some(0.0));
    }
    let hash = |variant: &str, seed: u64| {
        let row = own.iter().find(|row| row["variant"] == variant && row["seed"] == seed).unwrap();
        row["settings_hash"].clone()
    };
    assert_eq!(hash("purer", 0), hash("purer", 1));
    assert_ne!(hash("purer", 0), hash("purer-no-curriculum", 0));

    let page = std::fs::read_to_string(dir.path().join("out/RESULTS.md")).unwrap();
    for words in
        ["10 of 10 cells finished", "| **purer** |", "inversion+steps=3", "untrained, beside purer"]
    {
        assert!(page.contains(words), "{words}:\n{page}");
    }
    assert_eq!(page.matches("| pixel-nearest |").count(), 1, "{page}");
    // The paired difference of a seed alone is what `eval --against` tells.
    let mut against = Vec::new();
    for seed in [0, 1] {
        let run = |variant: &str| format!("out/cells/tiny/{variant}/seed-{seed}");
        let ran = run_in(
            dir.path(),
            &[
                "eval",
                &run("purer-no-curriculum"),
                "--against",
                &run("purer"),
                "--data",
                &images(),
                "--split",
                "meta_test",
                "--way",
                "3",
                "--shot",
                "2",
                "--query",
                "4",
                "--episodes",
                "12",
                "--json",
            ],
        );
        let result: Value = serde_json::from_str(&ran.stdout).expect(&ran.stderr);
        against.push(100.0 * result["against"]["gain"].as_f64().unwrap());
    }
    let (mean, half) = ((against[0] + against[1]) / 2.0, (against[0] - against[1]).abs() / 2.0);
    assert!(against.iter().any(|gain| gain.abs() > 1.0), "the ablation changes nothing");
    // Two seeds: t(0.975, 1) s / sqrt(2), and s / sqrt(2) is half their distance.
    let told = format!("| {mean:+.1} ± {:.1} (±", 12.706 * half);
    let line =
        page.lines().find(|line| line.starts_with("| purer-no-curriculum - purer |")).unwrap();
    assert!(line.contains(&told), "{told} in {line}");
    assert!(page.contains("| inversion with icfil - inversion |"), "{page}");

    let figures = result["figures"].as_array().unwrap();
    let names: Vec<&str> = figures.iter().map(|path| path.as_str().unwrap()).collect();
    for name in ["1shot-steps-over-meta-steps.svg", "2shot-models-over-models.svg"] {
        let name = format!("out/figures/tiny-glyphs-meta-test-{name}");
        assert!(names.contains(&name.as_str()), "{name} in {names:?}");
        let svg = std::fs::read_to_string(dir.path().join(&name)).unwrap();
        assert!(
            svg.contains("<svg")
                && svg.contains("inversion")
                && svg.matches("<circle").count() >= 2
        );
    }
    assert!(names.iter().all(|name| !name.contains("queries")), "nothing was asked: {names:?}");

    // Nothing is left to do: neither runs nor results change.
    let before = (written(&dir.path().join("out/cells")), timeless(dir.path()));
    let again = bench(dir.path(), &suite(more), &[]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(before == (written(&dir.path().join("out/cells")), timeless(dir.path())));
    // One shot more is evaluated, and nothing is trained again.
    let ran = bench(dir.path(), &suite(more).replace("shots: [1, 2]", "shots: [1, 2, 3]"), &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let after = self::rows(dir.path());
    assert_eq!(
        after.iter().filter(|row| row["shot"] == 3 && row["answered_by"].is_null()).count(),
        10
    );
    assert!(after.iter().all(|row| row["attempts"] == 1));
    // Results stand without their runs, as long as nothing more is asked of them; else they are made again.
    let purer = dir.path().join("out/cells/tiny/purer");
    std::fs::remove_dir_all(purer.join("seed-0")).unwrap();
    let text = suite(more);
    assert_eq!(bench(dir.path(), &text, &["--only", "purer"]).code, 0);
    assert!(!purer.join("seed-0").exists() && timeless(dir.path()) == before.1);
    let plain = text.replace("baselines: true\n", "");
    let ran = bench(dir.path(), &plain, &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(purer.join("seed-0/run.json").exists());
    let same = |row: &&Value| row["answered_by"].is_null() || row["answered_by"] == "icfil";
    let expected: Vec<&Value> = before.1.iter().filter(same).collect();
    assert_eq!(timeless(dir.path()).iter().collect::<Vec<_>>(), expected);
    let page = std::fs::read_to_string(dir.path().join("out/RESULTS.md")).unwrap();
    assert!(!page.contains("untrained") && page.contains("10 of 10 cells finished"), "{page}");
}

#[test]
fn an_interrupted_and_a_killed_grid_go_on_to_the_same_results() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let text = suite("")
        .replace("seeds: [0, 1]", "seeds: [0]")
        .replace("steps: 4,", "steps: 40,")
        .replace("checkpoint_every: 2", "checkpoint_every: 5");
    let whole = bench(dir.path(), &text, &[]);
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    let expected = timeless(dir.path());
    std::fs::rename(dir.path().join("out"), dir.path().join("whole")).unwrap();
    // Each time a run is in the middle of meta-training.
    let cells = ["inversion/seed-0", "purer/seed-0"];
    for (cell, signal, code) in [(cells[0], "-INT", Some(130)), (cells[1], "-KILL", None)] {
        let mut child = std::process::Command::new(metazoa(dir.path()).get_program())
            .args(["bench", "suite.yaml", "--out", "out"])
            .current_dir(dir.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let latest = dir.path().join("out/cells/tiny").join(cell).join("ckpt/latest");
        while !latest.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let pid = child.id().to_string();
        assert!(
            std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success()
        );
        assert_eq!(child.wait().unwrap().code(), code, "{cell}");
        assert!(!dir.path().join("out/cells/tiny/purer-no-curriculum/seed-0").exists());
        let listed =
            run_in(dir.path(), &["bench", "suite.yaml", "--out", "out", "--dry-run", "--json"]);
        let listed: Value = serde_json::from_str(&listed.stdout).expect(&listed.stderr);
        let states = listed["cells"].as_array().unwrap();
        let state = states.iter().find(|state| state["id"] == format!("tiny/{cell}")).unwrap();
        assert_eq!(state["status"], "unfinished", "{listed}");
    }
    let ran = bench(dir.path(), &text, &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(timeless(dir.path()) == expected, "going on changed the results");
    // The call that was interrupted counted its attempt and its time, the killed one could not.
    let attempts: Vec<u64> = rows(dir.path())
        .iter()
        .filter(|row| row["variant"] == "inversion" && row["seed"] == 0 && row["shot"] == 1)
        .map(|row| row["attempts"].as_u64().unwrap())
        .collect();
    assert_eq!(attempts, [2]);
}

#[test]
fn a_cell_that_fails_is_a_row_and_the_others_go_on() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    std::fs::create_dir(dir.path().join("broken")).unwrap();
    let whole = std::fs::read(repository().join("zoo/ss_001_glyphs_conv4_32.onnx")).unwrap();
    std::fs::write(dir.path().join("broken/cut.onnx"), &whole[..whole.len() / 2]).unwrap();
    let text = suite("").replace("seeds: [0, 1]", "seeds: [0]").replace(
        "methods:\n",
        &format!("  damaged:\n    zoo: broken\n    meta_test: {{glyphs: {{data: {}, split: meta_val}}}}\nmethods:\n", images()),
    );
    let ran = bench(dir.path(), &text, &["--only", "*/inversion/*", "--json"]);
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((result["finished"].as_u64(), result["failed"].as_u64()), (Some(1), Some(1)));
    let rows = rows(dir.path());
    let failed: Vec<&Value> = rows.iter().filter(|row| !row["error"].is_null()).collect();
    assert_eq!((rows.len(), failed.len()), (4, 2));
    for row in failed {
        valid("bench-row", row);
        assert!(row["accuracy"].is_null() && row["scenario"] == "damaged");
        assert!(row["error"].as_str().unwrap().contains("no usable model"), "{row}");
    }
    let page = std::fs::read_to_string(dir.path().join("out/RESULTS.md")).unwrap();
    assert!(
        page.contains("## Failed\n\n| cell | error |\n|---|---|\n| damaged/inversion/seed-0 |"),
        "{page}"
    );
    // It is tried again, with the zoo put right.
    std::fs::write(dir.path().join("broken/cut.onnx"), &whole).unwrap();
    let ran = bench(dir.path(), &text, &["--only", "*/inversion/*", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((result["finished"].as_u64(), result["failed"].as_u64()), (Some(2), Some(0)));
}

#[test]
fn settings_that_have_changed_stop_the_grid_until_it_may_redo_them() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let text = suite("").replace("seeds: [0, 1]", "seeds: [0]");
    assert_eq!(bench(dir.path(), &text, &[]).code, 0);
    let before = written(&dir.path().join("out"));
    let other = text.replace("{warm_up: 1, patience: 1}", "{warm_up: 2, patience: 1}");
    let refused = bench(dir.path(), &other, &[]);
    assert_eq!((refused.code, refused.stdout.as_str()), (1, ""));
    insta::assert_snapshot!(refused.stderr, @r"
    error: cell `tiny/purer/seed-0` was made in `out/cells/tiny/purer/seed-0`
      caused by: its settings have changed: `curriculum.warm_up: 1 -> 2`
    hint: `--redo-changed` removes such runs and makes them anew; or choose another `--out`
    ");
    assert!(before == written(&dir.path().join("out")), "a refused suite changed files");
    // What is not asked for does not stop the rest, and is no result of this suite.
    let ran = bench(dir.path(), &other, &["--only", "inversion"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(rows(dir.path()).iter().all(|row| row["variant"] == "inversion"));
    let ran = bench(dir.path(), &other, &["--redo-changed", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let after = written(&dir.path().join("out/cells/tiny/inversion"));
    assert!(after.iter().all(|(file, when)| before.get(&file.replace("\\", "/")) == Some(when)));
    let config =
        std::fs::read_to_string(dir.path().join("out/cells/tiny/purer/seed-0/config.yaml"));
    assert!(config.unwrap().contains("warm_up: 2"));
    assert_eq!(rows(dir.path()).len(), 6);
    // Something of the user's in a cell's place is not removed.
    std::fs::remove_dir_all(dir.path().join("out/cells/tiny/purer/seed-0")).unwrap();
    std::fs::create_dir(dir.path().join("out/cells/tiny/purer/seed-0")).unwrap();
    std::fs::write(dir.path().join("out/cells/tiny/purer/seed-0/notes.txt"), "mine").unwrap();
    let refused = bench(dir.path(), &text, &["--redo-changed"]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("not a run folder"), "{}", refused.stderr);
    assert!(dir.path().join("out/cells/tiny/purer/seed-0/notes.txt").is_file());
}

#[test]
fn a_dry_run_lists_the_cells_and_does_nothing() {
    let dir = temp_dir();
    let ran = bench(
        dir.path(),
        &suite(""),
        &["--dry-run", "--only", "*no-curriculum/*", "--only", "inversion/seed-1"],
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    insta::assert_snapshot!(ran.stdout, @r"
    tiny/purer-no-curriculum/seed-0  new        0 of 2 evaluations
    tiny/inversion/seed-1            new        0 of 2 evaluations
    tiny/purer-no-curriculum/seed-1  new        0 of 2 evaluations
    3 cells, 0 finished, 0 failed
    ");
    assert!(!dir.path().join("out").exists());
    let none = bench(dir.path(), &suite(""), &["--dry-run", "--only", "fre"]);
    assert_eq!(none.code, 2, "{}", none.stderr);
    assert!(none.stderr.contains("`--only` fits no cell of the suite: `fre`"), "{}", none.stderr);
    // The command line lies over every setting, and the suite decides what a grid must decide.
    let wrong = bench(dir.path(), &suite(""), &["--dry-run", "-s", "meta.stepz=3"]);
    assert!(wrong.code == 2 && wrong.stderr.contains("did you mean `steps`?"), "{}", wrong.stderr);
    let decided = bench(dir.path(), &suite(""), &["--dry-run", "-s", "seed=3"]);
    assert!(decided.code == 2 && decided.stderr.contains("a suite decides it: `seed`"));
}

#[test]
fn a_suite_that_makes_no_sense_is_one_clear_error_and_leaves_nothing() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let good = suite("");
    let with = |from: &str, to: &str| {
        let text = good.replace(from, to);
        assert_ne!(text, good, "{from}");
        text
    };
    let bomb = (0..12).fold("a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned(), |text, n| {
        let list = vec![format!("*a{n}"); 9].join(", ");
        format!("{text}a{}: &a{} [{list}]\n", n + 1, n + 1)
    });
    let cases = [
        (String::new(), "missing field `schema_version`"),
        ("[1, 2".into(), "`suite.yaml`"),
        ("[".repeat(2000), "brackets are nested deeper"),
        (bomb, "`suite.yaml`"),
        (with("seeds:", "seed:"), "did you mean `seeds`?"),
        (
            with("schema_version: 1", "schema_version: 2"),
            "reads suites of `schema_version: 1`, got `2`",
        ),
        (with("seeds: [0, 1]", "seeds: []"), "at least one is needed: `seeds`"),
        (with("seeds: [0, 1]", "seeds: [3, 3]"), "`seeds` holds a value twice: `3`"),
        (with("seeds: [0, 1]", "seeds: [-1]"), "`suite.yaml` line 2"),
        (with("shots: [1, 2]", "shots: [0]"), "must not be 0: `shots`"),
        (with("episodes: 12", "episodes: 0"), "must not be 0: `episodes`"),
        (with("way: 3", "way: 1"), "`way` must be 2 or more: `1`"),
        (with("way: 3", "way: 21"), "21-way episodes need 21 classes, there are `20`"),
        (with("query: 4", "query: 40"), "has 25 usable images, an episode needs 41"),
        (with("  tiny:", "  ../../up:"), "a name that cannot name a folder: `../../up`"),
        (with("  purer-no-curriculum:", "  ..:"), "a name that cannot name a folder: `..`"),
        (with("  purer: {", "  inversion: {"), "the name stands twice: `inversion`"),
        (with("  purer-no-curriculum:", "  purer:"), "have one name: `purer`"),
        (with("of: purer", "of: purrer"), "did you mean `purer`?"),
        (with("method: purer,", "method: magic,"), "methods: `purer`"),
        (with("curriculum: {weight: 0}", "curriculum: {wieght: 0}"), "did you mean `weight`?"),
        (
            with("curriculum: {weight: 0}", "curriculum: {weight: -1}"),
            "ablations: `purer-no-curriculum`",
        ),
        (with("curriculum: {weight: 0}", "seed: 7"), "a suite does not set `seed` there"),
        (
            with("method: inversion}", "method: inversion, zoo: elsewhere}"),
            "in a suite `scenarios.NAME.zoo` decides",
        ),
        (with("split: meta_test", "split: meta_tets"), "there are `meta_test`, `meta_val`"),
        (with("    zoo: zoo\n", ""), "missing field `zoo`"),
        (good.clone() + "icfil: [free]\n", "`icfil` names nothing of the suite: `free`"),
        (
            good.clone() + "sweeps: {s: {setting: meta.steps, values: []}}\n",
            "at least one is needed: `values`",
        ),
        (
            good.clone() + "sweeps: {s: {setting: meta.stepz, values: [1]}}\n",
            "did you mean `steps`?",
        ),
        (
            good.clone() + "sweeps: {s: {setting: meta.backbone, values: [../up.onnx]}}\n",
            "cannot name a folder",
        ),
        (
            good.clone() + "sweeps: {s: {setting: meta.steps, values: [1], scenarios: [tiney]}}\n",
            "did you mean `tiny`?",
        ),
        (
            with("seeds: [0, 1]", &format!("seeds: {:?}", (0..4000).collect::<Vec<_>>())),
            "10000 cells at most (scenarios x variants x seeds), this has `12000`",
        ),
    ];
    let mut wrong = Vec::new();
    for (text, said) in cases {
        let ran = bench(dir.path(), &text, &[]);
        let one_error = ran.stderr.len() < 2000 && ran.stderr.starts_with("error: ");
        let told = ran.stdout.is_empty() && ran.stderr.contains(said) && one_error;
        if !told || !(1..=2).contains(&ran.code) || dir.path().join("out").exists() {
            wrong.push(format!("{said}: exit code {}, {}", ran.code, ran.stderr));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let gone = run_in(dir.path(), &["bench", "nowhere.yaml"]);
    assert!(gone.code == 1 && gone.stderr.contains("nowhere.yaml"), "{}", gone.stderr);
}

#[test]
fn the_small_suite_runs_with_few_steps() {
    let dir = temp_dir();
    let out = dir.path().join("out").display().to_string();
    let few = [
        "meta.steps=2",
        "max_models=3",
        "recover.white_box.steps=1",
        "recover.black_box.steps=1",
        "recover.black_box.directions=1",
        "five.rounds=1",
        "free.warm_up=2",
        "meta.width=8",
    ];
    let mut args = vec![
        "bench",
        "examples/bench_small.yaml",
        "--out",
        &out,
        "--episodes",
        "5",
        "--only",
        "seed-0",
        "--json",
    ];
    args.extend(few.iter().flat_map(|setting| ["-s", setting]));
    let ran = run_in(&repository(), &args);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(result["finished"].as_u64(), Some(3 + 1 + 3));
    let queries = result["rows"][0]["queries"].as_u64();
    assert!(queries > Some(0), "one of the models is only asked: {queries:?}");
    let page = std::fs::read_to_string(dir.path().join("out/RESULTS.md")).unwrap();
    assert!(
        page.contains("## bundled: glyphs, meta-val")
            && page.contains("| free-no-boundary - free |")
    );
}

#[test]
fn the_shared_suite_is_a_grid() {
    let path = repository().join("benches/suites/shared.yaml");
    let suite = Suite::read(&path).unwrap_or_else(|error| panic!("{error}"));
    let names = cell_names(&suite).unwrap_or_else(|error| panic!("{error}"));
    // Three scenarios and seeds of four methods and twenty-four ablations; the points of sweeps.
    assert_eq!(names.len(), 3 * 3 * 28 + 4 * (4 + 5) + 2 * 3 + 7);
    if shared("data/zoo_mh").is_some() {
        let ran = run_in(
            &repository(),
            &["bench", "benches/suites/shared.yaml", "--dry-run", "--only", "MH/"],
        );
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert!(ran.stdout.contains("0 of 12 evaluations"), "{}", ran.stdout);
    }
}
