//! Served models: what a server answers is what the file answers, every query is counted as the server counts it, and
//! what can go wrong on the way goes wrong here on purpose.

use std::path::{Path, PathBuf};
use std::time::Duration;

use metazoa::access::remote::Authorization;
use metazoa::access::zero_order::{Estimator, ZeroOrder};
use metazoa::access::{BlackOptions, BlackTeacher, Teacher};
use metazoa::app::context::{Context, Secrets};
use metazoa::app::ingest_remote::look;
use metazoa::tensor::{Images, RngStream};
use metazoa::zoo::{Access, ModelSpec, OutputKind, candidates, read};
use metazoa::{Error, ErrorKind, Result};
use serde_json::Value;

use crate::serve::{Data, Fault, Server};
use crate::support::{Ran, metazoa, repository, run_in, runtime, temp_dir};

pub(crate) const OPTIONS: BlackOptions = BlackOptions {
    zero_order: ZeroOrder {
        estimator: Estimator::Forward,
        directions: 4,
        radius: 0.01,
        frequencies: 8,
        pack: 64,
    },
    batch: 16,
};

pub(crate) fn model(name: &str) -> PathBuf {
    repository().join("zoo").join(format!("{name}.onnx"))
}

/// What the file's own sidecar says, for a sidecar of the served model.
pub(crate) fn said(name: &str) -> String {
    let text = std::fs::read_to_string(model(name).with_extension("yaml")).unwrap();
    let wanted = |line: &&str| !line.starts_with("schema_version") && !line.starts_with("model_");
    text.lines().filter(wanted).map(|line| format!("{line}\n")).collect()
}

fn spec(server: &Server, more: &str) -> Result<ModelSpec> {
    spec_of(&server.sidecar(more), &Secrets::new(|_| None))
}

fn spec_of(yaml: &str, secrets: &Secrets) -> Result<ModelSpec> {
    let folder = temp_dir();
    let path = folder.path().join("served.yaml");
    std::fs::write(&path, yaml).unwrap();
    look(&candidates::remote_at(&path)?, secrets).map(|model| model.spec)
}

fn connect(server: &Server, name: &str, query_budget: Option<u64>) -> BlackTeacher {
    let spec = ModelSpec { query_budget, ..spec(server, &said(name)).unwrap() };
    BlackTeacher::connect(spec, None, OPTIONS).unwrap()
}

fn noise(n: usize) -> Images {
    let mut rng = RngStream::new(1, "test", "remote", 0);
    Images::new((0..n * 3072).map(|_| rng.uniform()).collect(), [n, 3, 32, 32]).unwrap()
}

const CONV4: &str = "ss_001_glyphs_conv4_32";

#[test]
fn a_served_model_answers_what_its_file_answers() {
    for (name, kind) in [
        (CONV4, OutputKind::Logits),
        ("edge_softmax", OutputKind::Probabilities),
        ("edge_int8_qdq", OutputKind::Logits),
    ] {
        let images = noise(37);
        let local = read::read_file(&model(name)).unwrap().spec;
        let local = BlackTeacher::open(local, runtime(), OPTIONS).unwrap();
        let expected = local.logits(&images).unwrap();
        for data in [Data::Json, Data::Binary] {
            let server = Server::start(&model(name), "m", data);
            let teacher = connect(&server, name, None);
            assert_eq!((teacher.spec().access, teacher.spec().output_kind), (Access::Remote, kind));
            assert_eq!(server.queries(), 0, "first contact spends nothing");
            assert_eq!(teacher.logits(&images).unwrap(), expected, "{name} {data:?}");
            assert_eq!((server.queries(), server.requests()), (37, 3));
            assert_eq!(teacher.queries(), 37);
        }
    }
}

/// What the server saw and what we say we spent.
fn counts(server: &Server, teacher: &BlackTeacher) -> (u64, u64) {
    (server.queries(), teacher.queries())
}

#[test]
fn failures_that_pass_are_tried_again_and_every_try_counts() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let teacher = connect(&server, CONV4, None);
    let good = teacher.logits(&noise(5)).unwrap();
    for fault in [Fault::Status(500), Fault::Status(503), Fault::Cut, Fault::HalfAnswer] {
        let before = teacher.queries();
        server.faults(&[fault, fault]);
        assert_eq!(teacher.logits(&noise(5)).unwrap(), good, "{fault:?}");
        assert_eq!(teacher.queries() - before, 15, "{fault:?}");
        let (seen, spent) = counts(&server, &teacher);
        assert_eq!(seen, spent, "{fault:?}");
    }
}

#[test]
fn refusals_and_nonsense_are_not_tried_again() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let teacher = connect(&server, CONV4, None);
    for (fault, said, hint) in [
        (Fault::Status(400), "status 400 (on purpose)", "log"),
        (Fault::Status(401), "status 401", "header_env"),
        (Fault::Status(413), "status 413", "max_batch_size"),
        (Fault::Status(429), "status 429", "log"),
        (Fault::Status(302), "status 302", "log"),
        (Fault::Nonsense, "no JSON", ""),
    ] {
        let before = server.requests();
        server.faults(&[fault]);
        let error = teacher.logits(&noise(2)).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert!(error.hint_text().unwrap_or_default().contains(hint), "{error:?}");
        assert_eq!(server.requests() - before, 1, "{fault:?}");
    }
    let (seen, spent) = counts(&server, &teacher);
    assert_eq!((seen, spent), (12, 12), "what the server saw is spent, whatever it answered");
    teacher.logits(&noise(2)).unwrap();
}

#[test]
fn a_slow_server_is_given_its_time_and_no_more() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let yaml = server.sidecar(&said(CONV4)).replace("model_name", "timeout_s: 0.5, model_name");
    let spec = spec_of(&yaml, &Secrets::new(|_| None)).unwrap();
    let teacher = BlackTeacher::connect(spec, None, OPTIONS).unwrap();
    server.faults(&[Fault::Slow(Duration::from_millis(100))]);
    teacher.logits(&noise(2)).unwrap();
    assert_eq!(counts(&server, &teacher), (2, 2));
    server.faults(&[Fault::Slow(Duration::from_millis(1500))]);
    teacher.logits(&noise(2)).unwrap();
    assert_eq!(counts(&server, &teacher), (6, 6), "the late answer was paid too");
}

#[test]
fn a_connection_that_was_refused_costs_nothing() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let teacher = connect(&server, CONV4, Some(100));
    teacher.logits(&noise(3)).unwrap();
    server.kill();
    let error = teacher.logits(&noise(3)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Input);
    assert!(error.to_string().contains("refused 6 times"), "{error}");
    assert!(error.hint_text().unwrap().contains("start the server"), "{error:?}");
    assert_eq!((teacher.queries(), teacher.budget().remaining()), (3, Some(97)));
}

/// 20 queries: 8 answered, a failing request of 8 sent once, then its second sending no longer fits.
#[test]
fn a_budget_is_not_overdrawn_by_retries() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let teacher = connect(&server, CONV4, Some(20));
    teacher.logits(&noise(8)).unwrap();
    server.faults(&[Fault::Status(500); 6]);
    let error = teacher.logits(&noise(8)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Budget, "{error}");
    assert_eq!(counts(&server, &teacher), (16, 16));
    server.faults(&[]);
    teacher.logits(&noise(4)).unwrap();
    assert_eq!(teacher.logits(&noise(1)).unwrap_err().kind(), ErrorKind::Budget);
    assert_eq!(counts(&server, &teacher), (20, 20));
}

#[test]
fn the_filling_of_a_fixed_batch_travels_and_counts() {
    let Some(folder) = crate::support::shared("data/zoo_edge") else { return };
    let server = Server::start(&folder.join("edge_fixed_batch8.onnx"), "m", Data::Binary);
    let teacher = BlackTeacher::connect(spec(&server, "").unwrap(), None, OPTIONS).unwrap();
    teacher.logits(&noise(11)).unwrap();
    assert_eq!(counts(&server, &teacher), (16, 16));
}

#[test]
fn a_server_that_serves_something_else_by_now_is_noticed() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let known = spec(&server, &said(CONV4)).unwrap();
    let changed = ModelSpec { input_name: "pixels".into(), ..known.clone() };
    let error = BlackTeacher::connect(changed, None, OPTIONS).unwrap_err();
    assert!(error.to_string().contains("has changed"), "{error}");
    let yaml = server.sidecar("").replace("'m'", "'other'");
    let error = spec_of(&yaml, &Secrets::new(|_| None)).unwrap_err();
    assert!(error.to_string().contains("status 404 (no such model)"), "{error}");
    assert!(error.hint_text().unwrap().contains("model_name"), "{error:?}");
}

#[test]
fn a_token_comes_from_the_environment_and_a_missing_one_is_told() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let yaml = server.sidecar("").replace("model_name", "header_env: METAZOO_TOKEN, model_name");
    let error: Error = spec_of(&yaml, &Secrets::new(|_| None)).unwrap_err();
    assert!(error.to_string().contains("not set: `METAZOO_TOKEN`"), "{error}");
    let secrets = Secrets::new(|name| (name == "METAZOO_TOKEN").then(|| "open-sesame".into()));
    let spec = spec_of(&yaml, &secrets).unwrap();
    let token = Authorization::new("Bearer open-sesame").unwrap();
    let teacher = BlackTeacher::connect(spec, Some(token), OPTIONS).unwrap();
    teacher.logits(&noise(1)).unwrap();
    assert!(server.authorizations().len() >= 3);
    assert!(server.authorizations().iter().all(|value| value == "Bearer open-sesame"));
}

/// A redirect is an answer like any other that is none: nothing is sent on, least of all the token.
#[test]
fn a_redirect_is_not_followed() {
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let elsewhere = Server::start(&model(CONV4), "m", Data::Json);
    let known = spec(&server, &said(CONV4)).unwrap();
    let token = Authorization::new("open-sesame").unwrap();
    let teacher = BlackTeacher::connect(known, Some(token), OPTIONS).unwrap();
    server.faults(&[Fault::Redirect(elsewhere.address())]);
    let error = teacher.logits(&noise(3)).unwrap_err();
    assert!(error.to_string().contains("status 307"), "{error}");
    assert_eq!(counts(&server, &teacher), (3, 3));
    assert_eq!((elsewhere.requests(), elsewhere.authorizations().len()), (0, 0));
}

/// A sidecar with a secret in it is refused, and the message does not repeat the secret.
#[test]
fn secrets_in_a_sidecar_are_refused_without_repeating_them() {
    for line in [
        "endpoint: {url: 'http://user:hush@host:1'}",
        "endpoint: {url: 'http://host:1', header_env: 'Bearer hush'}",
    ] {
        let error = spec_of(&format!("schema_version: 1\n{line}\n"), &Secrets::new(|_| None));
        let error = error.unwrap_err();
        assert!(error.hint_text().is_some() && !format!("{error:?}").contains("hush"), "{error:?}");
    }
    let secrets = Secrets::new(|_| Some("hush".into()));
    assert!(!format!("{:?}", Context { secrets, ..Context::silent(0) }.secrets).contains("hush"));
}

/// Few images and steps; the main settings of a run of seconds.
const QUICK: [&str; 16] = [
    "-s",
    "recover.images_per_class=6",
    "-s",
    "recover.white_box.steps=2",
    "-s",
    "recover.black_box.steps=4",
    "-s",
    "recover.black_box.directions=3",
    "-s",
    "recover.black_box.features=4",
    "-s",
    "meta.shot=2",
    "-s",
    "meta.query=3",
    "-s",
    "meta.steps=4",
];
/// Queries of a model of five classes under [`QUICK`]: four steps of 30 images and 3 directions, and the judging.
const WHOLE: u64 = 30 * (4 * 4 + 1);

fn train(dir: &Path, more: &[&str]) -> Ran {
    let mut args = vec!["train", "zoo", "--out", "run", "--json"];
    args.extend(QUICK);
    args.extend(more);
    run_in(dir, &args)
}

pub(crate) fn outcome<'a>(result: &'a Value, id: &str) -> &'a Value {
    let models = result["models"].as_array().unwrap();
    models.iter().find(|model| model["id"] == id).unwrap_or_else(|| panic!("{id}: {result}"))
}

pub(crate) fn copy_model(zoo: &Path, from: &str, to: &str, more: &str) {
    std::fs::create_dir_all(zoo).unwrap();
    std::fs::copy(model(from), zoo.join(format!("{to}.onnx"))).unwrap();
    std::fs::write(
        zoo.join(format!("{to}.yaml")),
        format!("schema_version: 1\n{}{more}", said(from)),
    )
    .unwrap();
}

pub(crate) fn serve_in(zoo: &Path, server: &Server, id: &str, more: &str) {
    let yaml = server.sidecar(&format!("{}{more}", said(CONV4)));
    std::fs::write(zoo.join(format!("{id}.yaml")), yaml).unwrap();
}

/// One run of a white box, local black boxes and served models; a server is killed, a file replaced and a budget
/// spent on the way, and all others finish. Each server has seen what the run reports.
#[test]
fn a_run_outlives_the_death_of_its_models_and_counts_what_the_servers_saw() {
    let dir = temp_dir();
    let zoo = dir.path().join("zoo");
    copy_model(&zoo, CONV4, "a_white", "");
    copy_model(&zoo, CONV4, "b_black", "access: black-box\n");
    copy_model(&zoo, CONV4, "c_poor", "access: black-box\nquery_budget: 300\n");
    copy_model(&zoo, CONV4, "z_replaced", "access: black-box\n");
    let servers: Vec<Server> =
        (0..4).map(|_| Server::start(&model(CONV4), "m", Data::Json)).collect();
    let [good, dying, poor, shaky] = &servers[..] else { panic!() };
    serve_in(&zoo, good, "d_good", "");
    serve_in(&zoo, dying, "e_dying", "");
    serve_in(&zoo, poor, "f_poor", "query_budget: 250\n");
    serve_in(&zoo, shaky, "g_shaky", "");
    dying.die_after(200);
    shaky.faults(&[Fault::Status(500), Fault::Cut, Fault::Status(502)]);
    // The last of the models is replaced while the first are being asked: one worker takes them in turn.
    let replaced = zoo.join("z_replaced.onnx");
    let other = std::fs::read(model("ss_011_glyphs_conv4_32")).unwrap();
    let watched = dir.path().join("run/bank");
    let swap = std::thread::spawn(move || {
        while std::fs::read_dir(&watched).map_or(0, Iterator::count) == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::fs::write(&replaced, other).unwrap();
    });
    let ran = train(dir.path(), &["--jobs", "1"]);
    swap.join().unwrap();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(result["models_used"], 6, "{result}");
    for (id, access, stop) in [
        ("a_white", "white-box", "done"),
        ("b_black", "black-box", "done"),
        ("c_poor", "black-box", "budget-spent"),
        ("d_good", "remote", "done"),
        ("e_dying", "remote", "failed"),
        ("f_poor", "remote", "budget-spent"),
        ("g_shaky", "remote", "done"),
        ("z_replaced", "black-box", "failed"),
    ] {
        let row = outcome(&result, id);
        assert_eq!(
            (row["access"].as_str(), row["stop_reason"].as_str()),
            (Some(access), Some(stop)),
            "{row}"
        );
        assert_eq!(row["images"], if stop == "failed" { 0 } else { 30 }, "{row}");
    }
    for (id, server) in [("d_good", good), ("e_dying", dying), ("f_poor", poor), ("g_shaky", shaky)]
    {
        assert_eq!(outcome(&result, id)["queries"], server.queries(), "{id}");
    }
    assert_eq!(outcome(&result, "b_black")["queries"], WHOLE);
    assert_eq!(outcome(&result, "d_good")["queries"], WHOLE);
    assert!(outcome(&result, "g_shaky")["queries"].as_u64().unwrap() > WHOLE, "retries count");
    // Two steps of 120 fit into 250 and 300; then 10 and 60 are left, of which 30 judge the images.
    assert_eq!(outcome(&result, "f_poor")["queries"], 240);
    assert_eq!(outcome(&result, "c_poor")["queries"], 270);
    assert_eq!(outcome(&result, "z_replaced")["queries"], 0);
    let why = outcome(&result, "z_replaced")["error"].as_str().unwrap().to_owned();
    assert!(why.contains("has changed"), "{why}");
    let total: u64 = result["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["queries"].as_u64().unwrap())
        .sum();
    assert_eq!(result["queries"], total);
    let report = run_in(dir.path(), &["report", "run"]);
    assert_eq!(report.code, 0, "{}", report.stderr);
    let page = std::fs::read_to_string(dir.path().join("run/report.html")).unwrap();
    assert!(page.contains("budget-spent"), "the report does not say whose budget was spent");
}

/// Killed without warning while a server is being asked, resumed: together no query more than the budget, and each
/// one the server saw is in the count.
#[test]
fn a_budget_survives_kill_9_and_resume_to_the_query() {
    let dir = temp_dir();
    let zoo = dir.path().join("zoo");
    copy_model(&zoo, CONV4, "a_white", "");
    let server = Server::start(&model(CONV4), "m", Data::Json);
    serve_in(&zoo, &server, "m", "max_batch_size: 7\n");
    let mut args = vec!["train", "zoo", "--out", "run", "--budget", "400"];
    args.extend(QUICK);
    let mut child = std::process::Command::new(metazoa(dir.path()).get_program())
        .args(&args)
        .current_dir(dir.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while server.queries() < 150 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let counted = || -> u64 {
        let file = std::fs::read_dir(dir.path().join("run/queries")).unwrap().next().unwrap();
        std::fs::read_to_string(file.unwrap().path()).unwrap().trim().parse().unwrap()
    };
    let (seen, written) = (server.queries(), counted());
    assert!((150..400).contains(&seen), "killed too late: {seen}");
    // Two workers at most were about to send when they died.
    assert!(seen <= written && written <= seen + 14, "{seen} {written}");
    let again = run_in(dir.path(), &["train", "--out", "run", "--resume", "--json"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    let result: Value = serde_json::from_str(&again.stdout).unwrap();
    let row = outcome(&result, "m");
    assert_eq!(row["query_budget"], 400);
    assert_eq!(row["stop_reason"], "budget-spent");
    assert_eq!(row["queries"], counted());
    assert!(counted() <= 400 && server.queries() <= counted(), "{}", server.queries());
    assert_eq!(counted() - written, server.queries() - seen, "the second call counts exactly");
}

/// Shares are fixed before the first query: the same images for one worker and two, and never more than the budget.
#[test]
fn the_budget_of_a_run_is_shared_among_its_models_whatever_the_jobs() {
    let dir = temp_dir();
    let zoo = dir.path().join("zoo");
    copy_model(&zoo, CONV4, "a", "access: black-box\n");
    copy_model(&zoo, CONV4, "b", "access: black-box\nquery_budget: 130\n");
    copy_model(&zoo, "ss_011_glyphs_conv4_32", "c", "access: black-box\n");
    let mut banks = Vec::new();
    for jobs in ["1", "2"] {
        let out = format!("run{jobs}");
        let mut args = vec!["train", "zoo", "--out", &out, "--json", "--budget", "500"];
        args.extend(["--jobs", jobs, "--max-open", "1"]);
        args.extend(QUICK);
        let ran = run_in(dir.path(), &args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let result: Value = serde_json::from_str(&ran.stdout).unwrap();
        for (id, budget, queries) in [("a", 185, 150), ("b", 130, 120), ("c", 185, 150)] {
            let row = outcome(&result, id);
            assert_eq!((&row["query_budget"], &row["queries"]), (&budget.into(), &queries.into()));
            assert_eq!(row["stop_reason"], "budget-spent", "{row}");
        }
        let mut bank: Vec<(PathBuf, Vec<u8>)> =
            std::fs::read_dir(dir.path().join(out).join("bank"))
                .unwrap()
                .map(|entry| entry.unwrap())
                .map(|entry| (entry.file_name().into(), std::fs::read(entry.path()).unwrap()))
                .collect();
        bank.sort();
        banks.push(bank);
    }
    assert!(banks[0] == banks[1], "the jobs changed the images");
}

/// With everything said (-vv), in failure and success, the token shows nowhere.
#[test]
fn the_token_is_written_nowhere() {
    let dir = temp_dir();
    let zoo = dir.path().join("zoo");
    std::fs::create_dir(&zoo).unwrap();
    let server = Server::start(&model(CONV4), "m", Data::Json);
    let token = "sesame-81c2e5";
    let yaml =
        server.sidecar(&said(CONV4)).replace("model_name", "header_env: TOKEN_81, model_name");
    std::fs::write(zoo.join("m.yaml"), yaml).unwrap();
    server.faults(&[Fault::Status(500), Fault::Cut, Fault::Echo(503)]);
    let mut said = String::new();
    let ingest = ["ingest", "zoo", "-vv"];
    let train = ["train", "zoo", "--out", "run", "-vv"];
    for (args, quick) in [(ingest.as_slice(), 0), (train.as_slice(), QUICK.len())] {
        let mut command = metazoa(dir.path());
        let output =
            command.env("TOKEN_81", token).args(args).args(&QUICK[..quick]).output().unwrap();
        said.push_str(&String::from_utf8(output.stdout).unwrap());
        said.push_str(&String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success(), "{said}");
    }
    // Refused for good by a server that repeats what it was sent: the reason stands in `run.json` and on stderr.
    server.faults(&[Fault::Echo(401); 1]);
    let mut command = metazoa(dir.path());
    let args = ["train", "zoo", "--out", "refused", "-vv"];
    let output = command.env("TOKEN_81", token).args(args).args(QUICK).output().unwrap();
    assert!(!output.status.success());
    said.push_str(&String::from_utf8(output.stderr).unwrap());
    assert!(said.contains("status 401 (unknown token Bearer [token])"), "{said}");
    assert!(server.authorizations().iter().all(|value| value == &format!("Bearer {token}")));
    assert!(said.contains("again in"), "retries are logged: {said}");
    assert!(!said.contains(token), "the token was logged");
    let mut files = 0;
    for entry in walkdir::WalkDir::new(dir.path()) {
        let entry = entry.unwrap();
        if entry.file_type().is_file() {
            files += 1;
            let bytes = std::fs::read(entry.path()).unwrap();
            let found = bytes.windows(token.len()).any(|window| window == token.as_bytes());
            assert!(!found, "the token is in {}", entry.path().display());
        }
    }
    assert!(files > 5);
}

#[test]
fn ingest_lists_served_models_and_a_dead_server_rejects_its_own_only() {
    let dir = temp_dir();
    let zoo = dir.path().join("zoo");
    copy_model(&zoo, CONV4, "a_white", "");
    let server = Server::start(&model(CONV4), "m", Data::Json);
    serve_in(&zoo, &server, "m", "");
    let dead = Server::start(&model(CONV4), "m", Data::Json);
    serve_in(&zoo, &dead, "gone", "");
    dead.kill();
    let ran = run_in(dir.path(), &["ingest", "zoo", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    let rows = result["models"].as_array().unwrap();
    let row = |path: &str| rows.iter().find(|row| row["path"] == path).unwrap();
    assert_eq!(row("m.yaml")["access"], "remote");
    assert_eq!(row("m.yaml")["classes"], 5);
    assert_eq!(row("a_white.onnx")["access"], "white-box");
    assert_eq!(row("gone.yaml")["status"], "rejected");
    assert!(row("gone.yaml")["reason"].as_str().unwrap().contains("refused"), "{result}");
    assert!(row("gone.yaml")["hint"].as_str().unwrap().contains("start the server"));
    assert_eq!(server.queries(), 0, "looking at a model is no query");
    let mut args = vec!["invert", "zoo/m.yaml", "--per-class", "6", "--out", "out", "--json"];
    args.extend(&QUICK[..10]);
    let ran = run_in(dir.path(), &args);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(result["queries"], server.queries());
}

/// A server that is not ours: MLServer, where TEST_MLSERVER names its program (CONTRIBUTING.md, "Tests").
#[test]
fn mlserver_is_asked_as_our_own_server_is() {
    let Some(program) = std::env::var_os("TEST_MLSERVER") else {
        eprintln!("SKIPPED: TEST_MLSERVER names no `mlserver` program");
        return;
    };
    let dir = temp_dir();
    let port = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let ports = [port(), port(), port()];
    let file = repository().join("tests/python/mlserver/onnx_model.py");
    std::fs::copy(file, dir.path().join("onnx_model.py")).unwrap();
    std::fs::copy(model(CONV4), dir.path().join("m.onnx")).unwrap();
    let known = read::read_file(&model(CONV4)).unwrap().spec;
    let tensor = |name: &str, shape: &[i64]| serde_json::json!({"name": name, "datatype": "FP32", "shape": shape});
    let settings = serde_json::json!({
        "name": "m",
        "implementation": "onnx_model.OnnxModel",
        "parameters": {"uri": dir.path().join("m.onnx")},
        "inputs": [tensor(&known.input_name, &[-1, 3, 32, 32])],
        "outputs": [tensor(&known.logits_output, &[-1, 5])],
    });
    std::fs::write(dir.path().join("model-settings.json"), settings.to_string()).unwrap();
    let [http_port, grpc_port, metrics_port] = ports;
    let settings = serde_json::json!({
        "host": "127.0.0.1", "http_port": http_port, "grpc_port": grpc_port,
        "metrics_port": metrics_port, "parallel_workers": 0,
    });
    std::fs::write(dir.path().join("settings.json"), settings.to_string()).unwrap();
    let mut child = std::process::Command::new(program)
        .args(["start", "."])
        .current_dir(dir.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let url = format!("http://127.0.0.1:{http_port}");
    let yaml =
        format!("schema_version: 1\nendpoint: {{url: '{url}', model_name: m}}\n{}", said(CONV4));
    let begin = std::time::Instant::now();
    let spec = loop {
        match spec_of(&yaml, &Secrets::new(|_| None)) {
            Ok(spec) => break spec,
            Err(error) if begin.elapsed() > Duration::from_secs(90) => {
                child.kill().unwrap();
                panic!("{error}");
            }
            Err(_) => {}
        }
    };
    let images = noise(20);
    let teacher = BlackTeacher::connect(spec, None, OPTIONS).unwrap();
    let answer = teacher.logits(&images);
    let seen = std::fs::read_to_string(dir.path().join("queries.txt"));
    child.kill().unwrap();
    child.wait().unwrap();
    let expected = BlackTeacher::open(known, runtime(), OPTIONS).unwrap().logits(&images).unwrap();
    let answer = answer.unwrap();
    assert!(answer.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4));
    assert_eq!((seen.unwrap().as_str(), teacher.queries()), ("20", 20));
}
