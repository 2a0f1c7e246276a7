//! Few-shot benchmarks as users have them on disk: a tiny one of each layout, read, chosen from and evaluated.

use std::path::Path;

use metazoa::data::{DataSource, ImageFolder};
use metazoa::{Error, ErrorKind};
use serde_json::{Value, json};

use crate::pictures::write_picture;
use crate::runs::finished_run;
use crate::support::{run_in, temp_dir};

const CLASSES: [&str; 6] = ["ant", "bee", "cat", "dog", "elk", "fox"];
/// Which of them a split has.
const SPLITS: [(&str, std::ops::Range<usize>); 3] =
    [("train", 0..2), ("val", 2..3), ("test", 3..6)];

/// A picture of 8x8 that tells its class and its number.
fn picture(path: &Path, class: usize, number: usize) {
    write_picture(path, [8, 8], |x, y| {
        [(class * 40) as u8, (number * 60) as u8, (x * 8 + y) as u8]
    });
}

/// `FOLDER/CLASS/CLASS-N.EXT`, four pictures a class.
fn class_folders(folder: &Path, classes: &[&str], extension: &str) {
    for name in classes {
        let class = CLASSES.iter().position(|one| one == name).unwrap_or(7);
        for number in 0..4 {
            picture(&folder.join(name).join(format!("{name}-{number}.{extension}")), class, number);
        }
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn names(folder: &ImageFolder) -> Vec<&str> {
    folder.classes.iter().map(|class| class.name.as_str()).collect()
}

/// The names of the files of a class, without their folders.
fn files(folder: &ImageFolder, class: usize) -> Vec<String> {
    let name = |path: &std::path::PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    folder.classes[class].files.iter().map(name).collect()
}

/// Every split has its classes with four pictures each, all of which can be read.
fn holds_the_splits(root: &Path, prefix: &str) {
    for (split, range) in SPLITS {
        let folder =
            ImageFolder::open(root, Some(split)).unwrap_or_else(|error| panic!("{split}: {error}"));
        assert_eq!(folder.split, format!("{prefix}{split}"));
        assert_eq!(names(&folder), CLASSES[range.clone()], "{split}");
        let (set, rejected) = folder.load([8, 8]).unwrap();
        assert!(rejected.is_empty() && set.len() == 4 * range.len(), "{split}: {rejected:?}");
        // The pictures themselves: red tells the class, green the number.
        for (class, images) in range.zip(set.classes()) {
            let found = set.select(&images.range.clone().collect::<Vec<_>>());
            for number in 0..4 {
                let pixel =
                    |channel: usize| (found.image(number)[channel * 64] * 255.0).round() as usize;
                let near = |a: usize, b: usize| a.abs_diff(b) <= 12;
                assert!(
                    near(pixel(0), class * 40) && near(pixel(1), number * 60),
                    "{split} {number}"
                );
            }
        }
    }
}

fn refused(path: &Path, split: Option<&str>) -> Error {
    ImageFolder::open(path, split).unwrap_err()
}

#[test]
fn folders_by_split_as_in_mini_and_tiered_imagenet() {
    for (prefix, extension) in [("", "png"), ("meta_", "png"), ("", "JPEG")] {
        let root = temp_dir();
        for (split, range) in SPLITS {
            class_folders(
                &root.path().join(format!("{prefix}{split}")),
                &CLASSES[range],
                extension,
            );
        }
        holds_the_splits(root.path(), prefix);
    }
}

#[test]
fn text_lists_of_classes_as_in_cifar_fs() {
    let root = temp_dir();
    class_folders(&root.path().join("data"), &CLASSES, "png");
    for (split, range) in SPLITS {
        let list = root.path().join(format!("splits/bertinetto/{split}.txt"));
        write(&list, &format!("{}\n\n", CLASSES[range].join("\r\n")));
    }
    holds_the_splits(root.path(), "");
    let all = ImageFolder::open(root.path(), Some("data")).unwrap();
    assert_eq!(names(&all), CLASSES);
    let error = refused(root.path(), None);
    assert_eq!(error.message(), "there are several splits: `data`, `test`, `train`, `val`");
    let error = refused(root.path(), Some("tset"));
    assert_eq!(error.hint_text(), Some("there are `data`, `test`, `train`, `val`"));
    // A second set of lists: which one must be said, by its path.
    write(&root.path().join("splits/own/test.txt"), "ant\nbee\n");
    let error = refused(root.path(), Some("test"));
    assert!(error.message().starts_with("several are called `test`: "), "{error}");
    let own = ImageFolder::open(&root.path().join("splits/own/test.txt"), None).unwrap();
    assert_eq!((names(&own), own.split.as_str()), (vec!["ant", "bee"], "test"));
}

#[test]
fn tables_of_pictures_as_in_mini_imagenet() {
    // Ravi and Larochelle, LibFewShot, PURER: all pictures in one folder, `filename,label`.
    let flat = temp_dir();
    for (class, name) in CLASSES.iter().enumerate() {
        for number in 0..4 {
            picture(&flat.path().join(format!("images/{name}-{number}.png")), class, number);
        }
    }
    let rows = |range: std::ops::Range<usize>, row: &dyn Fn(&str, usize) -> String| -> String {
        let of = |name: &&str| (0..4).map(|number| row(name, number)).collect::<String>();
        CLASSES[range].iter().map(of).collect()
    };
    for (split, range) in SPLITS {
        let rows = rows(range, &|name, number| format!("{name}-{number}.png,{name}\n"));
        write(&flat.path().join(format!("{split}.csv")), &format!("filename,label\n{rows}"));
    }
    holds_the_splits(flat.path(), "");
    assert!(refused(flat.path(), None).message().starts_with("there are several splits"));

    // easyfsl: `class_name,image_name`, an index in front, pictures by class, lists apart.
    let folders = temp_dir();
    class_folders(&folders.path().join("images"), &CLASSES, "png");
    for (split, range) in SPLITS {
        let rows = rows(range, &|name, number| format!("7,\"{name}\",{name}-{number}.png\r\n"));
        let text = format!("\u{feff},class_name,image_name\r\n{rows}");
        write(&folders.path().join(format!("split/{split}.csv")), &text);
    }
    holds_the_splits(folders.path(), "");
    // The same files in the same order in both.
    let [a, b] =
        [&flat, &folders].map(|root| ImageFolder::open(root.path(), Some("test")).unwrap());
    assert_eq!(files(&a, 1), files(&b, 1));

    // Written on another machine, a picture twice, one that is gone.
    let text = "filename,label\n/datasets/mini/images/ant/ant-1.png,ant\n\
                D:\\mini\\images\\ant\\ant-1.png,ant\n/datasets/mini/images/ant/ant-0.png,ant\nant/gone.png,ant\n";
    write(&folders.path().join("mine.csv"), text);
    let mine = ImageFolder::open(&folders.path().join("mine.csv"), None).unwrap();
    let mut kept = files(&mine, 0);
    kept.sort();
    assert_eq!(kept, ["ant-0.png", "ant-1.png", "gone.png"]);
    let (set, rejected) = mine.load([8, 8]).unwrap();
    assert_eq!((set.len(), rejected.len()), (2, 1));
    assert!(rejected[0].path.ends_with("gone.png"), "{rejected:?}");
}

#[test]
fn json_lists_as_for_cub_and_fc100() {
    let root = temp_dir();
    class_folders(&root.path().join("images"), &CLASSES, "png");
    // What CUB-200-2011 brings along is no split.
    for file in ["images.txt", "classes.txt", "train_test_split.txt", "image_class_labels.txt"] {
        write(&root.path().join(file), "1 1\n");
    }
    write(&root.path().join("attributes/attributes.txt"), "1 has_wings\n");
    let whole = ImageFolder::open(root.path(), None).unwrap();
    assert_eq!((names(&whole), whole.split.as_str()), (CLASSES.to_vec(), "images"));
    let error = refused(root.path(), Some("test"));
    assert_eq!(error.hint_text(), Some("there are `images`"));
    let of = |range: &std::ops::Range<usize>, path: &dyn Fn(&str) -> String| -> Vec<String> {
        CLASSES[range.clone()].iter().map(|name| path(name)).collect()
    };
    type Form = fn(
        &std::ops::Range<usize>,
        &dyn Fn(&std::ops::Range<usize>, &dyn Fn(&str) -> String) -> Vec<String>,
    ) -> Value;
    let easyfsl: Form = |range, of| json!({"class_names": of(range, &str::to_owned), "class_roots": of(range, &|name| format!("./data/CUB/images/{name}"))});
    let torchmeta: Form = |range, of| json!(of(range, &str::to_owned));
    let pairs: Form = |range, of| {
        let pair = |name: String| json!(["animals", name]);
        json!(of(range, &str::to_owned).into_iter().map(pair).collect::<Vec<_>>())
    };
    let nested: Form = |range, of| json!({"images": of(range, &str::to_owned)});
    let filelist: Form = |range, of| {
        let images = of(range, &|name| {
            (0..4).map(|n| format!("/data/cub/images/{name}/{name}-{n}.png ")).collect()
        });
        let images: Vec<&str> = images.iter().flat_map(|all| all.split_whitespace()).collect();
        let labels: Vec<usize> = (0..images.len()).map(|image| range.start + image / 4).collect();
        json!({"label_names": CLASSES, "image_names": images, "image_labels": labels})
    };
    for form in [easyfsl, torchmeta, pairs, nested, filelist] {
        for (split, range) in SPLITS {
            write(&root.path().join(format!("{split}.json")), &form(&range, &of).to_string());
        }
        let test = std::fs::read_to_string(root.path().join("test.json")).unwrap();
        let folder = ImageFolder::open(root.path(), Some("test"))
            .unwrap_or_else(|error| panic!("{test}: {error}"));
        let ends: Vec<&str> =
            names(&folder).into_iter().map(|name| name.rsplit('/').next().unwrap()).collect();
        assert_eq!(ends, CLASSES[3..6], "{test}");
        assert_eq!(
            files(&folder, 0),
            ["dog-0.png", "dog-1.png", "dog-2.png", "dog-3.png"],
            "{test}"
        );
    }
    holds_the_splits(root.path(), "");
    // The filelists of Chen et al. call their splits so.
    for (split, name) in [("train", "base"), ("test", "novel")] {
        let list = root.path().join(format!("{split}.json"));
        std::fs::rename(list, root.path().join(format!("filelists_{name}.json"))).unwrap();
        let from = root.path().join(format!("filelists_{name}.json"));
        std::fs::rename(from, root.path().join(format!("{name}.json"))).unwrap();
    }
    let novel = ImageFolder::open(root.path(), Some("test")).unwrap();
    assert_eq!((names(&novel), novel.split.as_str()), (CLASSES[3..6].to_vec(), "novel"));
}

#[test]
fn alphabets_and_characters_as_in_omniglot() {
    let root = temp_dir();
    for (part, alphabets) in
        [("images_background", ["Latin", "Greek"]), ("images_evaluation", ["Atlantean", "Tengwar"])]
    {
        for (class, alphabet) in alphabets.iter().enumerate() {
            for character in ["character01", "character02"] {
                for number in 0..4 {
                    let file = format!("{part}/{alphabet}/{character}/000{class}_{number}.png");
                    picture(&root.path().join(file), class, number);
                }
            }
            write(
                &root
                    .path()
                    .join(part.replace("images", "strokes"))
                    .join(alphabet)
                    .join("character01/0.txt"),
                "1,2",
            );
        }
    }
    let source = DataSource::find(root.path()).unwrap();
    assert_eq!(source.splits(), ["images_background", "images_evaluation"]);
    let expected = [
        "Atlantean/character01",
        "Atlantean/character02",
        "Tengwar/character01",
        "Tengwar/character02",
    ];
    for asked in ["test", "images_evaluation", "evaluation"] {
        let folder = ImageFolder::open(root.path(), Some(asked)).unwrap();
        assert_eq!(
            (names(&folder), folder.split.as_str()),
            (expected.to_vec(), "images_evaluation")
        );
    }
    let direct = ImageFolder::open(&root.path().join("images_evaluation"), None).unwrap();
    assert_eq!((names(&direct), direct.split.as_str()), (expected.to_vec(), ""));
    let background = ImageFolder::open(root.path(), Some("train")).unwrap();
    assert_eq!(names(&background)[0], "Greek/character01");
    // An alphabet alone is a folder of classes.
    let latin = ImageFolder::open(&root.path().join("images_background/Latin"), None).unwrap();
    assert_eq!(names(&latin), ["character01", "character02"]);
}

#[test]
fn packed_pictures_are_refused_with_what_to_do() {
    let root = temp_dir();
    for (file, hint) in [
        ("CIFAR_FS_test.pickle", "`python examples/unpack_pickles.py FILE... --out FOLDER`"),
        ("test_images_png.pkl", "`python examples/unpack_pickles.py FILE... --out FOLDER`"),
        ("data.hdf5", "write its pictures to FOLDER/SPLIT/CLASS/*.png"),
        ("CUB_200_2011.tgz", "unpack it and give the folder"),
    ] {
        let folder = root.path().join(file.replace('.', "_"));
        write(&folder.join(file), "no pictures");
        for (path, split) in
            [(folder.clone(), None), (folder.clone(), Some("test")), (folder.join(file), None)]
        {
            let error = refused(&path, split);
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.message().starts_with("packed pictures are not read: `"), "{error}");
            assert!(
                error.message().contains(file) && error.hint_text().unwrap().starts_with(hint),
                "{error}"
            );
        }
    }
}

#[test]
fn a_list_that_cannot_be_followed_says_why() {
    let root = temp_dir();
    class_folders(&root.path().join("images"), &CLASSES, "png");
    // Something beside the folder that no list may reach.
    let inside = root.path().join("data");
    class_folders(&inside.join("images"), &CLASSES, "png");
    picture(&root.path().join("secret/x-0.png"), 0, 0);
    for (file, text, said) in [
        ("test.csv", "", "no columns of file names and of classes in the header ``"),
        ("test.csv", "a,b\n1,2\n", "in the header `a,b`"),
        ("test.csv", "filename,label\nant-0.png\n", "row 2 has too few columns: `ant-0.png`"),
        ("test.csv", "filename,label\n", "the list names no class"),
        (
            "test.csv",
            "filename,label\nyak-0.png,yak\n",
            "a listed class has no picture here: `yak`",
        ),
        (
            "test.csv",
            "filename,label\n../secret/x-0.png,x\n",
            "not the path of a class or picture: `../secret/x-0.png`",
        ),
        (
            "test.csv",
            "filename,label\nx-0.png,../secret\n",
            "a listed class has no picture here: `../secret`",
        ),
        (
            "test.txt",
            "ant\nyak\ngnu\n",
            "a listed class has no picture here, as 1 more of 3: `gnu`",
        ),
        ("test.txt", "../secret\n", "not the path of a class or picture: `../secret`"),
        ("test.txt", "ant-0.png,ant\n", "a line is more than a class name"),
        ("test.json", "[1, 2]", "not a class name: `1`"),
        ("test.json", "{\"class_names\": [\"ant\"]", "the list is not JSON"),
        (
            "test.json",
            "{\"class_names\": [\"ant\"], \"class_roots\": []}",
            "differ in length: `1` and `0`",
        ),
        (
            "test.json",
            "{\"class_names\": [\"ant\"], \"class_roots\": [3]}",
            "must be a list of texts: `class_roots`",
        ),
        (
            "test.json",
            "{\"label_names\": [\"ant\"], \"image_names\": [\"ant-0.png\"], \"image_labels\": [1]}",
            "`image_labels` must be numbers below 1",
        ),
        ("test.json", &"[".repeat(100_000), "the list is not JSON"),
    ] {
        let list = inside.join(file);
        write(&list, text);
        let error = refused(&inside, Some("test"));
        assert!(error.message().contains(said), "{said}: {error}");
        assert!(error.to_string().contains(&format!("list `{}`", list.display())), "{error}");
        assert!(error.kind() == ErrorKind::Input && error.to_string().len() < 1000, "{error}");
        std::fs::remove_file(list).unwrap();
    }
    std::fs::write(inside.join("test.csv"), [0xff, 0xfe, 0, 1]).unwrap();
    assert!(refused(&inside, Some("test")).message().starts_with("the list is not UTF-8"));
    write(&inside.join("notes.md"), "ant");
    assert!(
        refused(&inside.join("notes.md"), None)
            .message()
            .starts_with("not a folder and not a list")
    );
}

#[test]
fn a_benchmark_is_evaluated_by_its_split_and_too_few_images_are_named() {
    let dir = temp_dir();
    finished_run(&dir.path().join("run"));
    let root = dir.path().join("cub");
    class_folders(&root.join("images"), &CLASSES, "png");
    let list =
        |classes: &[&str]| json!({"class_names": classes, "class_roots": classes}).to_string();
    write(&root.join("val.json"), &list(&CLASSES[..2]));
    write(&root.join("test.json"), &list(&CLASSES[2..]));
    let eval = |split: &str, query: &str| {
        let args = [
            "eval", "run", "--data", "cub", "--split", split, "--way", "3", "--shot", "1",
            "--query",
        ];
        run_in(dir.path(), &[&args[..], &[query, "--episodes", "8", "--json"]].concat())
    };
    let ran = eval("test", "3");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&result["split"], &result["classes"], &result["images"]),
        (&"test".into(), &4.into(), &16.into())
    );
    assert!(dir.path().join("run/eval/cub-test-3way-1shot-inductive.json").is_file());
    let short = eval("test", "4");
    assert_eq!((short.code, short.stdout.as_str()), (1, ""), "{}", short.stderr);
    let said = "class `cat` has 4 usable images, an episode needs 5 (and 3 more are short)";
    assert!(short.stderr.contains(said), "{}", short.stderr);
    let few = eval("val", "3");
    assert!(few.stderr.contains("3-way episodes need 3 classes, there are `2`"), "{}", few.stderr);
    let unknown = eval("train", "3");
    assert_eq!(unknown.code, 1);
    assert!(
        unknown.stderr.contains("hint: there are `images`, `test`, `val`"),
        "{}",
        unknown.stderr
    );
}
