//! The export forms of the meta-model, run in ONNX Runtime against ProtoNet's rule written out here.

use std::collections::BTreeMap;
use std::path::Path;

use metazoa::access::session::{Session, Tensor};
use metazoa::graph::{ConstantTensor, Dimension, Graph, Port};
use metazoa::meta::backbone::{Backbone, BnMode};
use metazoa::meta::export::{classifier_graph, episode_graph};
use metazoa::onnx::{ExportInfo, load, write};
use metazoa::tensor::Images;

use crate::support::{repository, runtime, temp_dir};

/// A trained network of the bundled zoo stands for a backbone: its logits are the embedding.
const BACKBONE: &str = "zoo/ss_001_glyphs_conv4_32.onnx";

fn backbone() -> Graph {
    let path = repository().join(BACKBONE);
    load(&path, path.parent().unwrap()).unwrap().graph
}

fn open(folder: &Path, name: &str, graph: &Graph) -> Session {
    let path = folder.join(name);
    write(&path, graph, &ExportInfo::new(BTreeMap::new())).unwrap();
    runtime().open(&path).unwrap()
}

/// Images of a fixed pattern, different for each seed.
fn images(n: usize, seed: usize) -> Tensor {
    let values = (0..n * 3072).map(|i| ((i * 7 + seed * 131) as f32 * 0.37).sin()).collect();
    Tensor::f32([n, 3, 32, 32], values)
}

fn embed(session: &mut Session, graph: &Graph, images: Tensor) -> Vec<Vec<f64>> {
    let (input, output) = (graph.inputs[0].name.as_str(), graph.outputs[0].name.as_str());
    let result = session.run(vec![(input, images)], &[output]).unwrap().remove(0);
    let size = result.shape[1];
    result
        .values
        .to_f32()
        .chunks(size)
        .map(|row| row.iter().map(|&x| f64::from(x)).collect())
        .collect()
}

#[test]
fn the_episode_graph_is_protonet_for_any_number_of_ways() {
    let temp = temp_dir();
    let embedding = backbone();
    let mut plain = open(temp.path(), "embedding.onnx", &embedding);
    let mut episode = open(temp.path(), "episode.onnx", &episode_graph(&embedding).unwrap());
    let cases: [(&[i64], usize); 5] = [
        (&[0, 1, 2, 3, 4], 6),
        (&[0, 0, 0, 1, 1, 1], 1),
        (&[4, 2, 0, 0, 2, 1, 3, 4], 3),
        (&[0], 2),
        // No image of class 1: it is never the answer.
        (&[0, 2, 2], 4),
    ];
    for (labels, n_query) in cases {
        let (support, query) = (images(labels.len(), 1), images(n_query, 2));
        let logits = episode
            .run(
                vec![
                    ("support_images", support.clone()),
                    ("support_labels", Tensor::i64([labels.len()], labels.to_vec())),
                    ("query_images", query.clone()),
                ],
                &["logits"],
            )
            .unwrap()
            .remove(0);
        let way = *labels.iter().max().unwrap() as usize + 1;
        assert_eq!(logits.shape, [n_query, way]);
        let support = embed(&mut plain, &embedding, support);
        let query = embed(&mut plain, &embedding, query);
        let logits = logits.values.to_f32();
        for (row, query) in logits.chunks(way).zip(&query) {
            for (class, &logit) in row.iter().enumerate() {
                let members: Vec<_> = support
                    .iter()
                    .zip(labels)
                    .filter(|(_, label)| **label == class as i64)
                    .collect();
                if members.is_empty() {
                    assert_eq!(logit, f32::NEG_INFINITY);
                    continue;
                }
                let expected: f64 = -(0..query.len())
                    .map(|d| {
                        members.iter().map(|(row, _)| row[d]).sum::<f64>() / members.len() as f64
                            - query[d]
                    })
                    .map(|difference| difference * difference)
                    .sum::<f64>();
                let error = (f64::from(logit) - expected).abs();
                assert!(error <= 1e-5 * expected.abs().max(1.0), "{logit} instead of {expected}");
            }
        }
    }
}

#[test]
fn the_classifier_graph_is_a_linear_head_on_the_embedding() {
    let temp = temp_dir();
    let embedding = backbone();
    let size = 5;
    let weight: Vec<f32> = (0..3 * size).map(|i| (i as f32 * 0.7).cos() * 3.0).collect();
    let bias = [0.5f32, -1.0, 2.0];
    let constant = |shape: &[usize], values: &[f32]| ConstantTensor::f32(shape, values.to_vec());
    let head = (constant(&[3, size], &weight), constant(&[3], &bias));
    let graph = classifier_graph(&embedding, head.0, head.1).unwrap();
    assert_eq!(graph.inputs[0].name, "images");
    let mut classifier = open(temp.path(), "classifier.onnx", &graph);
    let mut plain = open(temp.path(), "embedding.onnx", &embedding);
    let logits = classifier.run(vec![("images", images(4, 3))], &["logits"]).unwrap().remove(0);
    assert_eq!(logits.shape, [4, 3]);
    let rows = embed(&mut plain, &embedding, images(4, 3));
    for (row, logits) in rows.iter().zip(logits.values.to_f32().chunks(3)) {
        for ((weight, bias), &logit) in weight.chunks(size).zip(bias).zip(logits) {
            let product = row.iter().zip(weight).map(|(a, &b)| a * f64::from(b)).sum::<f64>();
            let expected = product + f64::from(bias);
            assert!((f64::from(logit) - expected).abs() <= 1e-5 * expected.abs().max(1.0));
        }
    }
    let zeros = |shape: &[usize]| constant(shape, &vec![0.0; shape.iter().product()]);
    for (weight, bias) in [([2, 7], 2), ([2, size], 3)] {
        classifier_graph(&embedding, zeros(&weight), zeros(&[bias])).unwrap_err();
    }
}

#[test]
fn a_backbone_that_cannot_be_composed_is_refused_with_the_reason() {
    let refuse = |graph: &Graph, words: &str| {
        let error = episode_graph(graph).expect_err(words);
        assert!(error.to_string().contains(words), "`{words}` is not in: {error}");
        assert!(error.hint_text().is_some());
    };
    let sound = backbone();
    refuse(&Graph { opset: 9, ..sound.clone() }, "operator set 11 or newer");
    let mut fixed = sound.clone();
    let shape = fixed.inputs[0].shape.as_mut().unwrap();
    shape[0] = Dimension::Fixed(1);
    refuse(&fixed, "free batch size");
    let mut two = sound.clone();
    two.inputs.push(Port { name: "mask".into(), ..sound.inputs[0].clone() });
    refuse(&two, "one input, found `2`");
}

#[test]
fn the_built_in_backbone_leaves_with_the_embeddings_of_its_tape() {
    let temp = temp_dir();
    let backbone = Backbone::conv4(8, 3).unwrap();
    let embedding = backbone.to_graph(32, 32).unwrap();
    let mut plain = open(temp.path(), "embedding.onnx", &embedding);
    let canonical = |tensor: &Tensor| {
        let values = tensor.values.to_f32().iter().map(|x| x * 0.5 + 0.5).collect();
        Images::new(values, [tensor.shape[0], 3, 32, 32]).unwrap()
    };
    let batch = canonical(&images(5, 4));
    let expected = backbone.embed(&batch, BnMode::Running).unwrap();
    let fed = Tensor::f32([5, 3, 32, 32], batch.into_data());
    let found: Vec<f64> = embed(&mut plain, &embedding, fed).concat();
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0.0_f32, |scale, x| scale.max(x.abs()));
    assert!(scale > 0.0);
    for (found, expected) in found.iter().zip(&expected) {
        assert!(
            (found - f64::from(*expected)).abs() <= 1e-5 * f64::from(scale),
            "{found} {expected}"
        );
    }
    // And composed, it is a sound file: ONNX Runtime opens it.
    let episode = open(temp.path(), "episode.onnx", &episode_graph(&embedding).unwrap());
    let names: Vec<_> = episode.inputs().iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["support_images", "support_labels", "query_images"]);
    assert_eq!(episode.inputs()[0].dims, [None, Some(3), Some(32), Some(32)]);
}
