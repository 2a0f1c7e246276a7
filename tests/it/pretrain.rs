//! A meta-model that starts from what all models answer to drawings, as a user runs it.

use serde_json::Value as Json;

use crate::bidf::labels_only;
use crate::free::events;
use crate::main_job::{CONV4, kill_once_there, small_zoo, train};
use crate::remote::{copy_model, model, outcome, serve_in};
use crate::serve::{Data, Server};
use crate::support::{run_in, temp_dir};

const SHORT: [&str; 8] = [
    "-s",
    "meta.start=distilled",
    "-s",
    "pretrain.images=1300",
    "-s",
    "pretrain.steps=30",
    "-s",
    "pretrain.batch=16",
];

/// Killed while it distils, and while it asks: the same bytes, and nobody is asked again about what was kept.
#[test]
fn a_killed_distillation_resumes_to_the_bytes_of_an_uninterrupted_one() {
    for (sign, images) in
        [("pretrain/state.safetensors", 1300), ("pretrain/answers.safetensors", 6000)]
    {
        let images = format!("pretrain.images={images}");
        let more = ["--method=inversion", "-s", "access=black-box", "-s", &images];
        let dir = kill_once_there(&[&SHORT[..], &more].concat(), sign);
        let run = |name: &str| dir.path().join(name);
        let losses: Vec<f64> =
            events(&run("whole"), "pretrain").iter().map(|e| e["loss"].as_f64().unwrap()).collect();
        assert_eq!(losses.len(), 3, "{losses:?}");
        // Thirty small batches of six thousand drawings tell nothing yet.
        assert!(images.ends_with("6000") || losses[2] < losses[0], "{losses:?}");
        for file in ["start.safetensors", "pretrain/answers.safetensors"] {
            let bytes = |name: &str| std::fs::read(run(name).join(file)).unwrap();
            assert!(bytes("whole") == bytes("killed"), "{file}");
        }
        let queries = |name: &str| -> u64 {
            let text = std::fs::read_to_string(run(name).join("run.json")).unwrap();
            let record: Json = serde_json::from_str(&text).unwrap();
            let models = record["outcomes"].as_array().unwrap();
            models.iter().map(|model| model["queries"].as_u64().unwrap()).sum()
        };
        let (whole, killed) = (queries("whole"), queries("killed"));
        // Two models, four rounds of 512 between what is kept; a recovery step that was cut off is paid again.
        assert!(whole <= killed && killed < whole + 2 * 2048 + 2000, "{sign}: {whole} {killed}");
    }
}

/// With any number of workers the same bytes; a network from a file is what is distilled into, and the file is not read
/// again.
#[test]
fn a_start_is_distilled_into_the_users_own_network() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    let file = dir.path().join("own.onnx");
    std::fs::copy(model(CONV4[0]), &file).unwrap();
    let backbone = format!("meta.backbone={}", file.display());
    let start = |name: &str, more: &[&str]| -> Vec<u8> {
        let short = ["-s", "meta.steps=2", "-s", "recover.white_box.steps=2"];
        let ran = train(dir.path(), name, &[&SHORT[..], &short, more].concat());
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        std::fs::read(dir.path().join(name).join("start.safetensors")).unwrap()
    };
    let one = start("one", &["--jobs", "1"]);
    assert!(one == start("two", &["--jobs", "2"]), "jobs changed the bytes");
    let own = start("own", &["-s", &backbone]);
    let before = std::fs::read(dir.path().join("own/backbone.safetensors")).unwrap();
    assert!(own != before && own != one);
    std::fs::remove_file(&file).unwrap();
    std::fs::remove_file(dir.path().join("own/start.safetensors")).unwrap();
    let again = run_in(dir.path(), &["train", "--out", "own", "--resume"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(own == std::fs::read(dir.path().join("own/start.safetensors")).unwrap());
    // Too few drawings to draw episodes from are told before anything is recovered.
    let few = [&SHORT[..], &["-s", "pretrain.images=3", "-s", "meta.steps=2"]].concat();
    let ran = train(dir.path(), "few", &few);
    assert!(ran.code != 0 && ran.stderr.contains("raise `pretrain.images`"), "{}", ran.stderr);
    assert!(!dir.path().join("few/bank").exists() || bank_is_empty(&dir.path().join("few/bank")));
}

fn bank_is_empty(bank: &std::path::Path) -> bool {
    std::fs::read_dir(bank).unwrap().next().is_none()
}

/// A scores file, one that tells labels only and a served model that dies after its first drawings: the others go on.
#[test]
fn a_model_that_fails_is_asked_no_more() {
    let dir = temp_dir();
    let zoo = dir.path().join("zoo");
    copy_model(&zoo, CONV4[0], "a_scores", "");
    labels_only(&zoo, "l_labels");
    let server = Server::start(&model(CONV4[1]), "m", Data::Json);
    serve_in(&zoo, &server, "z_dying", "");
    server.die_after(700);
    let more = [
        "--method=inversion",
        "-s",
        "access=black-box",
        "-s",
        "recover.black_box.steps=1",
        "-s",
        "meta.steps=4",
    ];
    let ran = train(dir.path(), "run", &[&SHORT[..], &more].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stderr.contains("`z_dying` is asked about no more drawings"), "{}", ran.stderr);
    let result: Json = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(outcome(&result, "z_dying")["queries"], server.queries());
    assert_eq!(result["models_used"], 2);
    let answers = dir.path().join("run/pretrain/answers.safetensors");
    let store = metazoa::tensor::TensorStore::load(&answers).unwrap();
    for (id, answered) in [("a_scores", 1300), ("l_labels", 1300), ("z_dying", 512)] {
        assert_eq!(store.tensors[id].shape, [answered, 5], "{id}");
    }
}

/// Drawings take their share of a budget, the rest is the method's, and none of it is overspent.
#[test]
fn drawings_share_the_budget() {
    let dir = temp_dir();
    small_zoo(dir.path(), &CONV4);
    for (name, method, own) in [
        ("visits", "--method=bidf-mkd", ["-s", "recover.black_box.run_budget=2000"]),
        ("inverted", "--method=inversion", ["-s", "recover.black_box.query_budget=1000"]),
    ] {
        let more = [
            method,
            "--no-progress",
            "-s",
            "access=black-box",
            "-s",
            "five.images_per_class=4",
            "-s",
            "five.features=4",
            "-s",
            "five.steps=1",
            "-s",
            "recover.black_box.directions=2",
            "-s",
            "meta.steps=4",
            "-s",
            "pretrain.query_share=0.4",
        ];
        let ran = train(dir.path(), name, &[&SHORT[..], &more, &own].concat());
        assert_eq!(ran.code, 0, "{name}: {}", ran.stderr);
        let result: Json = serde_json::from_str(&ran.stdout).unwrap();
        let store = metazoa::tensor::TensorStore::load(
            &dir.path().join(name).join("pretrain/answers.safetensors"),
        )
        .unwrap();
        // Two models: 400 drawings each of 1,000 queries each.
        assert!(store.tensors.values().all(|answers| answers.shape == [400, 5]), "{name}");
        let queries = result["queries"].as_u64().unwrap();
        assert!(queries > 800 && queries <= 2000, "{name}: {queries}");
        assert_eq!(result["models_used"], 2, "{name}");
    }
    let more = ["--method=bidf-mkd", "-s", "access=black-box", "--budget", "1"];
    let poor = train(dir.path(), "poor", &[&SHORT[..], &more].concat());
    assert!(poor.code != 0 && poor.stderr.contains("covers no drawing"), "{}", poor.stderr);
    for wrong in ["pretrain.query_share=0", "pretrain.temperature=-1", "pretrain.batch=0"] {
        let ran = train(dir.path(), "wrong", &["-s", wrong]);
        let key = wrong.split('=').next().unwrap();
        assert!(ran.code != 0 && ran.stderr.contains(key), "{wrong}: {}", ran.stderr);
        assert!(!dir.path().join("wrong").exists());
    }
}
