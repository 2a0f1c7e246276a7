//! Evaluation images: reading folders, resizing, drawing episodes, pixel baselines.

use std::collections::BTreeSet;
use std::path::Path;

use metazoa::data::decode::Picture;
use metazoa::data::resize::resize_bilinear;
use metazoa::data::{
    Episode, EpisodeSampler, EpisodeShape, ImageFolder, ImageSet, nearest_neighbour,
    nearest_prototype,
};
use metazoa::{Error, ErrorKind};
use sha2::{Digest, Sha256};

use crate::pictures::{write_classes, write_picture};
use crate::support::{shared, temp_dir};

const SIZE: [usize; 2] = [8, 8];
const SHAPE: EpisodeShape = EpisodeShape { way: 3, shot: 2, query: 3 };

/// A set of `counts` images a class, all black.
fn black_set(counts: &[usize]) -> ImageSet {
    let n: usize = counts.iter().sum();
    let names: Vec<(String, usize)> =
        counts.iter().enumerate().map(|(i, &count)| (format!("class_{i}"), count)).collect();
    ImageSet::new([2, 2], vec![0; n * 12], &names).unwrap()
}

fn open_error(root: &Path, split: Option<&str>) -> Error {
    ImageFolder::open(root, split).unwrap_err()
}

#[test]
fn reads_class_folders_in_byte_order_whatever_the_disk_says() {
    let root = temp_dir();
    write_classes(root.path(), &["zebra", "Apple", "mango"], 3, [8, 8]);
    let folder = ImageFolder::open(root.path(), None).unwrap();
    let names: Vec<&str> = folder.classes.iter().map(|class| class.name.as_str()).collect();
    assert_eq!(names, ["Apple", "mango", "zebra"]);
    let (set, rejected) = folder.load(SIZE).unwrap();
    assert!(rejected.is_empty());
    assert_eq!((set.len(), set.classes()[1].range.clone()), (9, 3..6));
}

#[test]
fn pictures_become_canonical_images_channel_by_channel() {
    let root = temp_dir();
    write_picture(&root.path().join("a/0.png"), [2, 1], |x, _| [255, (x * 51) as u8, 0]);
    let (set, _) = ImageFolder::open(root.path(), None).unwrap().load([1, 2]).unwrap();
    let images = set.select(&[0, 0]);
    assert_eq!(images.shape(), [2, 3, 1, 2]);
    assert_eq!(images.image(1), &[1.0, 1.0, 0.0, 0.2, 0.0, 0.0]);
}

#[test]
fn chooses_a_split_by_name_or_by_meaning() {
    let root = temp_dir();
    for split in ["meta_val", "meta_test"] {
        write_classes(&root.path().join(split), &["a", "b"], 2, [8, 8]);
    }
    for asked in ["meta_test", "meta-test", "test", "TEST"] {
        assert_eq!(ImageFolder::open(root.path(), Some(asked)).unwrap().split, "meta_test");
    }
    assert_eq!(ImageFolder::open(root.path(), Some("validation")).unwrap().split, "meta_val");
}

#[test]
fn an_unknown_split_lists_those_there_are() {
    let root = temp_dir();
    for split in ["meta_val", "meta_test"] {
        write_classes(&root.path().join(split), &["a", "b"], 2, [8, 8]);
    }
    let error = open_error(root.path(), Some("train"));
    assert!(error.message().starts_with("no split in `"), "{error}");
    assert_eq!(error.hint_text(), Some("there are `meta_test`, `meta_val`"));
    let error = open_error(root.path(), None);
    assert_eq!(error.message(), "there are several splits: `meta_test`, `meta_val`");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn a_split_of_a_folder_without_splits_is_refused() {
    let root = temp_dir();
    write_classes(root.path(), &["a", "b"], 2, [8, 8]);
    let error = open_error(root.path(), Some("test"));
    assert_eq!(error.hint_text(), Some("its folders are classes: leave out `--split`"));
}

#[test]
fn an_empty_and_a_missing_folder_are_the_users_input() {
    let root = temp_dir();
    assert!(open_error(root.path(), None).message().starts_with("no class folders"));
    let error = open_error(&root.path().join("nowhere"), None);
    assert_eq!(error.kind(), ErrorKind::Input);
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[test]
fn a_bad_picture_is_rejected_alone() {
    let root = temp_dir();
    write_classes(root.path(), &["a", "b"], 3, [8, 8]);
    let whole = std::fs::read(root.path().join("a/001.png")).unwrap();
    std::fs::write(root.path().join("a/001.png"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(root.path().join("b/000.png"), b"this is no picture").unwrap();
    std::fs::write(root.path().join("b/zz.gif"), b"GIF89a").unwrap();
    std::fs::write(root.path().join("b/notes.txt"), b"passed over in silence").unwrap();
    let (set, rejected) = ImageFolder::open(root.path(), None).unwrap().load(SIZE).unwrap();
    assert_eq!(set.len(), 4);
    let paths: Vec<&str> = rejected.iter().map(|rejection| rejection.path.as_str()).collect();
    assert_eq!(paths, ["a/001.png", "b/000.png", "b/zz.gif"]);
    assert_eq!(rejected[2].hint.as_deref(), Some("convert it to PNG"));
}

#[test]
fn a_header_that_claims_a_giant_picture_is_rejected_without_taking_memory() {
    let root = temp_dir();
    write_classes(root.path(), &["a"], 2, [8, 8]);
    let mut bytes = std::fs::read(root.path().join("a/000.png")).unwrap();
    bytes[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    std::fs::write(root.path().join("a/000.png"), bytes).unwrap();
    let (set, rejected) = ImageFolder::open(root.path(), None).unwrap().load(SIZE).unwrap();
    assert_eq!((set.len(), rejected.len()), (1, 1));
}

/// Made with Pillow 12: `Image.frombytes(...).resize((tw, th), Image.BILINEAR)`, SHA-256 of the bytes.
#[test]
fn resizes_byte_for_byte_as_pillow_does() {
    let cases = [
        (37, 23, 32, 32, "33e4d4aee44ee03d"),
        (64, 64, 32, 32, "c958faf782be633c"),
        (100, 75, 28, 28, "82230c69d0c801e8"),
        (16, 16, 50, 41, "d67cbb77904d6076"),
        (32, 32, 32, 32, "1ff4741d4ce89af8"),
        (33, 32, 32, 32, "22bb2d6686a5a52e"),
        (500, 400, 84, 84, "09936c8e47751398"),
    ];
    for (width, height, to_width, to_height, expected) in cases {
        let mut rgb = Vec::new();
        for y in 0..height {
            for x in 0..width {
                rgb.extend((0..3).map(|c| ((x * 7 + y * 13 + c * 50) * (x + 3) + y * y) as u8));
            }
        }
        let resized = resize_bilinear(Picture { width, height, rgb }, to_height, to_width);
        let hash: String =
            Sha256::digest(&resized.rgb).iter().take(8).map(|b| format!("{b:02x}")).collect();
        assert_eq!(hash, expected, "{width}x{height} to {to_width}x{to_height}");
    }
}

#[test]
fn too_few_classes_and_too_few_images_are_named() {
    let few_classes = EpisodeSampler::new(&black_set(&[9, 9]), SHAPE, 0, "").unwrap_err();
    insta::assert_snapshot!(few_classes, @"3-way episodes need 3 classes, there are `2`");
    let few_images = EpisodeSampler::new(&black_set(&[9, 4, 5, 3]), SHAPE, 0, "").unwrap_err();
    insta::assert_snapshot!(
        few_images,
        @"class `class_3` has 3 usable images, an episode needs 5 (and 1 more are short)"
    );
    assert_eq!(few_images.kind(), ErrorKind::Input);
}

#[test]
fn support_and_query_are_disjoint_and_belong_to_their_labels() {
    let set = black_set(&[5, 7, 11, 6]);
    let sampler = EpisodeSampler::new(&set, SHAPE, 3, "test").unwrap();
    for index in 0..200 {
        let episode = sampler.episode(index);
        let all: BTreeSet<usize> = episode.support.iter().chain(&episode.query).copied().collect();
        assert_eq!(all.len(), 3 * 5, "an image was drawn twice in episode {index}");
        assert_eq!(BTreeSet::from_iter(&episode.classes).len(), 3);
        for (position, image) in episode.query.iter().enumerate() {
            let class = episode.classes[episode.query_label(position)];
            assert!(set.classes()[class].range.contains(image));
        }
        for (position, image) in episode.support.iter().enumerate() {
            assert!(set.classes()[episode.classes[position / 2]].range.contains(image));
        }
    }
}

#[test]
fn an_episode_depends_on_seed_split_and_number_only() {
    let set = black_set(&[8, 8, 8, 8, 8]);
    let draw = |seed, split: &str, index| -> Episode {
        EpisodeSampler::new(&set, SHAPE, seed, split).unwrap().episode(index)
    };
    assert_eq!(draw(1, "test", 7), draw(1, "test", 7));
    for other in [draw(2, "test", 7), draw(1, "val", 7), draw(1, "test", 8)] {
        assert_ne!(draw(1, "test", 7).support, other.support);
    }
}

#[test]
fn every_image_is_drawn_about_equally_often() {
    let set = black_set(&[10; 5]);
    let sampler = EpisodeSampler::new(&set, SHAPE, 0, "").unwrap();
    let mut seen = [0usize; 50];
    for index in 0..2000 {
        let episode = sampler.episode(index);
        episode.support.iter().chain(&episode.query).for_each(|&image| seen[image] += 1);
    }
    // Binomial(2000, 3/5 * 5/10): mean 600, standard deviation 20.5.
    assert!(seen.iter().all(|&count| (500..700).contains(&count)), "{seen:?}");
}

#[test]
fn nearest_rules_agree_with_distances_worked_out_by_hand() {
    // Two classes, two shots, on a line: {0, 10} and {5, 7}; means 5 and 6.
    let support = [0.0, 10.0, 5.0, 7.0];
    let queries = [9.0, 6.4, 1.0, 5.2];
    assert_eq!(nearest_neighbour(&support, &queries, 1, 2), [0, 1, 0, 1]);
    assert_eq!(nearest_prototype(&support, &queries, 1, 2), [1, 1, 0, 0]);
}

#[test]
fn reads_the_shared_glyphs() {
    let Some(root) = shared("data/glyphs") else { return };
    let folder = ImageFolder::open(&root, Some("meta_test")).unwrap();
    let (set, rejected) = folder.load([32, 32]).unwrap();
    assert_eq!((set.classes().len(), set.len(), rejected.len()), (20, 1800, 0));
}
