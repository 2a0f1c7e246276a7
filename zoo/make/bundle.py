#!/usr/bin/env python3
"""Picks the bundled zoo out of the full data folder: bundle.py DATA [ZOO]

DATA holds zoo_ss, zoo_sh, zoo_mh, zoo_edge (made by make_zoo.py) and glyphs/{meta_val,meta_test}
(made by make_data.py). Files are copied byte for byte under their own names; the first images of a
class are taken, so the choice is the same every time. Needs only Python.
"""
import pathlib
import shutil
import sys

MODELS = {
    # several architectures on glyphs, batch normalisation kept (convnext has layer normalisation)
    "zoo_sh": ["sh_000_glyphs_conv4_64", "sh_003_glyphs_vgg_bn", "sh_004_glyphs_mobilenetv2",
               "sh_006_glyphs_convnext_ln_gelu"],
    # the other two domains, and two more architectures
    "zoo_mh": ["mh_001_icons_conv4_32", "mh_002_textures_conv4_32", "mh_003_glyphs_resnet10",
               "mh_006_glyphs_senet_sigmoid", "mh_008_textures_densenet"],
    # small and accurate, on glyph classes that the models above do not know
    "zoo_ss": ["ss_001_glyphs_conv4_32", "ss_011_glyphs_conv4_32", "ss_028_glyphs_conv4_32"],
    # folded batch normalisation, int8, softmax output, uint8 images with channels last
    "zoo_edge": ["edge_export_dynamo_default", "edge_int8_qdq", "edge_softmax", "edge_nhwc_uint8"],
}
# split: (classes, images a class); 20 images are one class of a 5-shot, 15-query episode
IMAGES = {"meta_val": (8, 20), "meta_test": (20, 25)}


def main(data, zoo):
    for folder, names in MODELS.items():
        for name in names:
            for suffix in (".onnx", ".yaml"):
                shutil.copyfile(data / folder / (name + suffix), zoo / (name + suffix))
    for split, (classes, images) in IMAGES.items():
        for source in sorted((data / "glyphs" / split).iterdir())[:classes]:
            target = zoo / "images" / "glyphs" / split / source.name
            target.mkdir(parents=True, exist_ok=True)
            for image in sorted(source.glob("*.png"))[:images]:
                shutil.copyfile(image, target / image.name)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]),
         pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path(__file__).parent.parent)
