//! Settings of meta-training as a user meets them: the built binary on two models of the bundled zoo.

use serde_json::Value;

use crate::main_job::{CONV4, small_zoo, train};
use crate::support::temp_dir;

#[test]
fn classes_of_one_name_are_merged_when_the_settings_say_so() {
    let dir = temp_dir();
    let zoo = small_zoo(dir.path(), &CONV4);
    // The second model gets the first one's names; two classes in all would be merged by chance otherwise.
    let sidecar = |name: &str| zoo.join(format!("{name}.yaml"));
    let names = |name: &str| {
        let text = std::fs::read_to_string(sidecar(name)).unwrap();
        let line = text.lines().find(|line| line.starts_with("id2label")).unwrap();
        (line.to_owned(), text.clone())
    };
    let ((wanted, _), (own, text)) = (names(CONV4[0]), names(CONV4[1]));
    std::fs::write(sidecar(CONV4[1]), text.replace(&own, &wanted)).unwrap();
    let ten_ways = ["-s", "meta.steps=2", "-s", "meta.way=10"];
    let apart = train(dir.path(), "apart", &ten_ways);
    assert_eq!(apart.code, 0, "{}", apart.stderr);
    let by_name = ["-s", "meta.merge_classes=by-name"];
    let refused = train(dir.path(), "ten", &[&ten_ways[..], &by_name].concat());
    assert_eq!((refused.code, refused.stdout.as_str()), (1, ""));
    assert!(refused.stderr.contains("10 classes count as 5"), "{}", refused.stderr);
    assert!(refused.stderr.contains("the bank has `5`"), "{}", refused.stderr);
    // Each class now has the six images of both models.
    let wide = ["-s", "meta.steps=2", "-s", "meta.shot=6", "-s", "meta.query=6"];
    let merged = train(dir.path(), "five", &[&wide[..], &by_name].concat());
    let result: Value = serde_json::from_str(&merged.stdout).expect(&merged.stderr);
    assert_eq!((merged.code, &result["stop_reason"]), (0, &Value::from("done")));
}
