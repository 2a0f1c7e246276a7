//! What the engine refuses by design, and why.

/// Operators by family: a classifier of images needs none of them at inference.
const FAMILIES: [(&str, &[&str]); 9] = [
    (
        "sequences, optionals and maps are no tensors",
        &[
            "ConcatFromSequence",
            "Optional",
            "OptionalGetElement",
            "OptionalHasElement",
            "SequenceAt",
            "SequenceConstruct",
            "SequenceEmpty",
            "SequenceErase",
            "SequenceInsert",
            "SequenceLength",
            "SequenceMap",
            "SplitToSequence",
        ],
    ),
    (
        "text",
        &["RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"],
    ),
    (
        "training: losses and optimisers",
        &[
            "NegativeLogLikelihoodLoss",
            "SoftmaxCrossEntropyLoss",
            "ai.onnx.preview.training.Adagrad",
            "ai.onnx.preview.training.Adam",
            "ai.onnx.preview.training.Gradient",
            "ai.onnx.preview.training.Momentum",
        ],
    ),
    (
        "random numbers",
        &[
            "Bernoulli",
            "Multinomial",
            "RandomNormal",
            "RandomNormalLike",
            "RandomUniform",
            "RandomUniformLike",
        ],
    ),
    (
        "classical machine learning",
        &[
            "ai.onnx.ml.ArrayFeatureExtractor",
            "ai.onnx.ml.Binarizer",
            "ai.onnx.ml.LabelEncoder",
            "ai.onnx.ml.TreeEnsemble",
        ],
    ),
    ("decodes files", &["ImageDecoder"]),
    (
        "signal processing",
        &["BlackmanWindow", "DFT", "HammingWindow", "HannWindow", "MelWeightMatrix", "STFT"],
    ),
    ("a shape that depends on the image", &["NonMaxSuppression", "Unique"]),
    ("recurrent networks", &["GRU", "LSTM", "RNN"]),
];

/// Cases by their names: types and modes that the file format in use cannot hold or that only
/// training has.
const NAMES: [(&str, &[&str]); 5] = [
    (
        "numbers of 8, 6, 4 and 2 bits that are no integers of 8",
        &[
            "float8",
            "FLOAT8",
            "e4m3",
            "e5m2",
            "e8m0",
            "E8M0",
            "float4",
            "FLOAT4",
            "FLOAT4E2M1",
            "int4",
            "INT4",
            "int2",
            "INT2",
            "e2m1",
        ],
    ),
    ("text", &["STRING", "_string", "strings"]),
    (
        "sequences, optionals and maps are no tensors",
        &["sequence", "_seq", "optional", "test_identity_opt", "test_if_opt"],
    ),
    (
        "language models: recurrent state, experimental attention",
        &["linear_attention", "causal_conv_with_state", "flexattention", "flex_attention"],
    ),
    ("training mode", &["training", "_train_", "dropout_random", "_default_ratio_mask_"]),
];

/// Why a case is refused by design; `None` when it should pass.
pub(super) fn by_design(name: &str, operators: &[String]) -> Option<&'static str> {
    let by_operator = FAMILIES
        .iter()
        .find(|(_, family)| operators.iter().any(|operator| family.contains(&operator.as_str())));
    let by_name = NAMES.iter().find(|(_, parts)| parts.iter().any(|part| name.contains(part)));
    by_operator.map(|(reason, _)| *reason).or(by_name.map(|(reason, _)| *reason))
}
