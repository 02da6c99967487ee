"""Pictures of what a network looks at and for, what it is trained on, how it groups images.

attention: self-attention of the class token in the last block of a vision transformer, over images or
a film: Caron et al., arXiv:2104.14294, figures 1, 3; with --voc how well it segments objects, figure 4.
patches: patches in the colours of their features, by principal components (src/pictures/patches.py).
neighbours: images, or those of --queries, with the images of the data nearest to them, and a table.
crops: multi-crops of a few images after their photometry, each framed in the colour of its window.
clusters: which cluster each image is in, by prototypes or k-means, and what clusters know of labels.
classes: a map of the classes by t-SNE or PCA of the means of their features, with an image of each.
curves: the curves of several runs in one picture, with what their evaluations say.
report: several runs side by side on one HTML page, without a network.
sobel: what Sobel filters leave of images, and what the first layer makes of it (thesis, Figure 3.5).
filters: weights of the first layer; or images that maximise the response of filters, by gradient
ascent (Yosinski et al., arXiv:1506.06579), beside those of the data that activate them most.
activations: the latter alone, with a table. Both are figures of DeepCluster, arXiv:1807.05520.

  python visualize.py attention --pretrained runs/dino   a run: its args.json says the rest
  python visualize.py attention --pretrained_weights dino.pth --image_path cat.jpg --threshold 0.6
  python visualize.py attention --pretrained runs/dino --voc VOCdevkit --baseline deit_small.pth
  python visualize.py neighbours --pretrained runs/swav --data_path my_images --queries a.jpg b.jpg
  python visualize.py clusters --pretrained resnet50.pth --num_clusters 100 --data_path my_images
  python visualize.py report runs/swav runs/dino --output report.html
  python visualize.py filters --pretrained runs/deepcluster --conv 13 --filters 3 17 99

attention: img.png, attn-head0.png, ..., and with --threshold mask_th0.6_head0.png, ..., as published;
attn-mean.png, overlay-*.png, and sheet.png, all in one; of frames attention.gif.

Deviations: without weights networks are untrained, and say so. Attention: the authors' script takes an
image from the web by default, sees 480 px whatever was trained on, has random colours. Kept: two values
of --image_size change the shape; what is no whole patch is cut off. DeepCluster's ascent maximises a
softmax over filters, in images of any range; ours the response itself, within what pixels can be.
"""

if __name__ == "__main__":  # before torch, whose loading takes seconds
    from src.run import signals

    signals.catch()

import argparse
import sys

from src.pictures.attention_command import ATTENTION
from src.pictures.classes_command import CLASSES
from src.pictures.clusters_command import CLUSTERS
from src.pictures.crops_command import CROPS
from src.pictures.curves_command import CURVES
from src.pictures.filters_command import ACTIVATIONS, FILTERS
from src.pictures.neighbours_command import NEIGHBOURS
from src.pictures.patches_command import PATCHES
from src.pictures.report_command import REPORT
from src.pictures.sobel_command import SOBEL
from src.run import flags
from src.run.lock import release_folders
from src.run.log import setup_logging

COMMANDS = {
    "attention": ATTENTION,
    "patches": PATCHES,
    "neighbours": NEIGHBOURS,
    "classes": CLASSES,
    "curves": CURVES,
    "report": REPORT,
    "crops": CROPS,
    "clusters": CLUSTERS,
    "sobel": SOBEL,
    "filters": FILTERS,
    "activations": ACTIVATIONS,
}


def main(argv: list[str] | None = None) -> int:
    """Draw; returns 0."""
    args = parse_args(argv)
    setup_logging(None, True)
    command = COMMANDS[args.picture]
    command.check(args)
    command.draw(args)
    release_folders()
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a picture, which the command line begins with; see Command.parse."""
    argv = sys.argv[1:] if argv is None else argv
    parser = get_parser()
    picture = parser.parse_args(argv).picture
    parsers = next(x for x in parser._actions if x.dest == "picture").choices
    return COMMANDS[picture].parse(parsers[picture], picture, argv[1:])


def get_parser() -> argparse.ArgumentParser:
    """A parser with one for each picture."""

    def command_parser(prog, doc, **_):
        parser = flags.Parser(doc)
        parser.prog = prog
        return parser

    parser = flags.Parser(__doc__)
    parser.usage = f"%(prog)s {{{','.join(COMMANDS)}}} [flags]"
    commands = parser.add_subparsers(
        prog=parser.prog,
        title="pictures",
        dest="picture",
        required=True,
        parser_class=command_parser,
    )
    for name, command in COMMANDS.items():
        doc = command.draw.__doc__
        command.add_flags(commands.add_parser(name, doc=doc, help=doc))
    return parser


if __name__ == "__main__":
    flags.run(main)
