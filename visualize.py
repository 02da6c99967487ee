"""Pictures of what a network looks at and for, what it is trained on, how it groups images.

attention: self-attention of the class token in the last block of a vision transformer, over images or
a film: Caron et al., arXiv:2104.14294, figures 1, 3; with --voc how well it segments objects, figure 4.
patches: patches in the colours of their features, by principal components (src/pictures/patches.py).
neighbours: images, or those of --queries, with the images of the data nearest to them, and a table.
crops: multi-crops of a few images after their photometry, each framed in the colour of its window.
clusters: which cluster each image is in, by prototypes or k-means, and what clusters know of labels.
classes: a map of the classes by t-SNE or PCA of the means of their features, with an image of each.
curves: the curves of several runs in one picture, with what their evaluations say.
filters: weights of the first layer; or images that maximise the response of filters, by gradient
ascent (Yosinski et al., arXiv:1506.06579), beside those of the data that activate them most.
activations: the latter alone, with a table. Both are figures of DeepCluster, arXiv:1807.05520.

  python visualize.py attention --pretrained runs/dino   a run: its args.json says the rest
  python visualize.py attention --pretrained_weights dino.pth --image_path cat.jpg --threshold 0.6
  python visualize.py attention --pretrained runs/dino --voc VOCdevkit --baseline deit_small.pth
  python visualize.py neighbours --pretrained runs/swav --data_path my_images --queries a.jpg b.jpg
  python visualize.py clusters --pretrained resnet50.pth --num_clusters 100 --data_path my_images
  python visualize.py curves --runs runs/swav runs/dino --curves loss knn
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
import itertools
import logging
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from src import dist
from src.data.augment import Augment
from src.data.datasets import IMAGENET, usual_std
from src.data.multicrop import MultiCropDataset, collate_crops, generator
from src.evaluate import flags as eval_flags
from src.evaluate.progress import Progress
from src.evaluate.splits import check_labelled
from src.evaluate.voc_segments import open_segmented
from src.labels.features import extract_features
from src.nets.backbones import is_vit
from src.nets.pooling import forward_of_feature, stride_of_positions
from src.nets.pretrained import open_pretrained
from src.pictures import activations as activation_pictures
from src.pictures import attention as attention_maps
from src.pictures import cluster_contents, cluster_tables, responses
from src.pictures import clusters as cluster_pictures
from src.pictures import filters as filter_pictures
from src.pictures import flags as picture_flags
from src.pictures.attention_masks import (
    BASELINE,
    BEST,
    Overlaps,
    draw_masks,
    enlarge_masks,
    maps_of_segments,
    masks_of,
    picture_of_mask,
    picture_of_truth,
    report_masks,
)
from src.pictures.class_map import class_means, draw_classes, place_by_pca, place_by_tsne
from src.pictures.clusters import (
    add_cluster_args,
    check_folders,
    choose_clusters,
    draw_colours,
    draw_sizes,
    image_names,
    write_folders,
)
from src.pictures.crops import draw_crops
from src.pictures.frames import in_batches, open_frames
from src.pictures.neighbours import draw_queries, nearest_of_others, open_queries
from src.pictures.patches import colours_of_patches, draw_patches
from src.pictures.run_curves import choose_panels, draw_runs, read_runs
from src.pictures.sheets import to_uint8
from src.run import checkpoint, flags, image_flags
from src.run.health import UNIQUE_DISTANCE
from src.run.lock import hold_folder, release_folders
from src.run.log import duration, setup_logging

logger = logging.getLogger(__name__)

ON_SHEET = 12  # images on the sheet of all images
ATTENTION = "Attention of the class token in the last block"
LOG_SECONDS = 5.0
MASS = 0.6  # share of the attention that a mask holds, in figure 4
CLUSTER_SETTINGS = (
    "pretrained", "data_path", "split", "head", "num_clusters", "feature", "neighbours", "seed",
)  # fmt: skip


# ============ attention ============
@torch.no_grad()
def attention(args):
    """Write the pictures of every image to --dump_path, or measure their masks with --voc."""
    check_attends(args.arch)
    if args.voc:
        attention_of_voc(args)
        return
    device = dist.resolve_device(args.device)
    frames, count, normalisation, file_names = open_images(args)
    network = eval_flags.open_network(args)
    model, source = network.model.to(device), network.origin
    if not args.pretrained:
        logger.warning(
            "WARNING: no --pretrained: the network is UNTRAINED, its maps show nothing learned"
        )
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in normalisation)
    at_once = partial(attention_maps.images_at_once, model)
    folder, several = Path(args.dump_path), count != 1
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")

    animation, rows, done = attention_maps.Animation(), [], 0
    start = logged = time.perf_counter()
    frames = (
        (name, attention_maps.fit_image(x, args.image_size, args.patch_size)) for name, x in frames
    )
    for names, images in in_batches(frames, at_once):
        x = (torch.stack(images).to(device).float() / 255 - mean) / std  # (B, C, H, W)
        rows_of_patches, columns = (side // args.patch_size for side in x.shape[2:])
        weights = model.get_last_selfattention(x)  # (B, heads, T, T)
        maps = attention_maps.class_attention(
            weights, rows_of_patches, columns, num_registers=args.num_registers
        )
        maps = maps.float().cpu()
        if not maps.isfinite().all():
            raise ValueError(f"--pretrained {args.pretrained} makes attention that is not finite")
        for name, image, heads in zip(names, images, maps, strict=True):
            pictures = attention_maps.draw_attention(image, heads, args.threshold)
            sheet = attention_maps.image_sheet(
                pictures,
                heads,
                args.threshold,
                f"{ATTENTION}: {file_names.get(name, name)}",
                source,
            )
            write_pictures(pictures, sheet, folder / name if several else folder)
            if len(rows) < ON_SHEET:
                summary = attention_maps.summary_pictures(pictures)
                rows.append((file_names.get(name, name), summary))
            if several and args.image_path:
                shown = [x for key, x in pictures.items() if key in ("img", "overlay-mean")]
                animation.add(shown + [x for key, x in pictures.items() if "masks" in key])
        done += len(names)
        now = time.perf_counter()
        if now - logged > LOG_SECONDS:
            logged, rate = now, done / (now - start)
            left = duration((count - done) / rate) if count else "?"
            logger.info(f"image {done} of {count or '?'}, {rate:.2g} images/s, ETA {left}")

    if several:
        attention_maps.summary_sheet(rows, ATTENTION, source).save(folder / "sheet.png")
    if animation.frames:
        animation.save(folder / "attention.gif", args.fps)
    if animation.left_out:
        logger.info(f"attention.gif ends after {len(animation.frames)} frames")
    logger.info(f"{done} images, written to {folder}; look at {folder / 'sheet.png'}")


def check_attends(arch):
    """Raise ValueError for a network without a class token."""
    if not is_vit(arch):
        raise ValueError(
            f"--arch {arch} has no class token that attends to patches: use vit_tiny, vit_small or "
            "vit_base"
        )


def attention_of_voc(args):
    """Compare the masks of the heads with the objects of VOC 2012: a table, a line of JSON, a sheet."""
    images = open_segmented(args.voc)
    images = [images[i] for i in spread(len(images), args.num_images or len(images))]
    network, mass, folder = (
        eval_flags.open_network(args),
        args.threshold or MASS,
        Path(args.dump_path),
    )
    networks = {"network": network}
    if args.baseline == "untrained":
        networks[BASELINE] = network.untrained()
    elif args.baseline:
        networks[BASELINE] = open_pretrained(args.baseline)
        check_attends(networks[BASELINE].arch)
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, a mere baseline")
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")

    overlaps, progress = Overlaps(), Progress(len(images) * len(networks), "images")
    shown = {place: {} for place in spread(len(images), ON_SHEET)}  # (picture, caption) by column
    for name, network in networks.items():
        draws = generator(args.seed)
        segments = maps_of_segments(
            network,
            images,
            args.image_size,
            in_chans=args.in_chans,
            mean=args.mean or network.mean or IMAGENET[0],
            std=args.std or network.std or usual_std(IMAGENET[1]),
            device=dist.resolve_device(args.device),
        )
        for place, (image, labels, heads) in enumerate(segments):
            by_kind = masks_of(heads, mass, draws)
            if name == BASELINE:
                by_kind = {BASELINE: by_kind[BEST]}
            if place in shown and name != BASELINE:
                shown[place]["objects"] = (picture_of_truth(image, labels), "")
            for kind, masks in by_kind.items():
                masks = enlarge_masks(masks, image.shape[1:])
                values = overlaps.add(kind, masks, labels)
                if place in shown and values is not None:
                    best = int(values.argmax())
                    head = f"head {best}: " if len(values) > 1 else ""
                    picture = picture_of_mask(image, masks[best])
                    shown[place][kind] = (picture, f"{head}{100 * values[best]:.0f}")
            progress.count(name)

    origins = {name: network.origin for name, network in networks.items()}
    settings = {"mass": mass, "image_size": list(args.image_size), "networks": origins}
    report_masks(overlaps, settings, folder / "attention_voc.json")
    notes = [f"{name}: {origin}" for name, origin in origins.items()]
    notes.append(
        f"{mass:.0%} of the mass; Jaccard similarity with all objects together, in percent"
    )
    rows = [(images[place].name, shown[place]) for place in shown if BEST in shown[place]]
    if rows:
        draw_masks(rows, folder / "attention_voc.png", notes)
        logger.info(f"look at {folder / 'attention_voc.png'}")


def open_images(args):
    """(frames, their number or None, (mean, std), file names) of --image_path, or of --data_path.

    file names: of --data_path, by the name of the frame.
    """
    file_names = {}
    if args.image_path:
        frames, count = open_frames(args.image_path, args.in_chans)
        mean, std = IMAGENET[0], usual_std(IMAGENET[1])
        if args.in_chans != 3:
            mean, std = ([sum(x) / 3] * args.in_chans for x in (mean, std))
        limit = args.num_images * args.every if args.num_images else None
        frames = itertools.islice(frames, 0, limit, args.every)
        if count:
            count = min(math.ceil(count / args.every), args.num_images or count)
    else:
        dataset = image_flags.open_images(args)
        indices = spread(len(dataset), args.num_images or 4)
        names = {index: f"image_{index:06}" for index in indices}
        frames = ((names[index], dataset.load(index)) for index in indices)
        file_names = {names[i]: Path(dataset.file_name(i)).name for i in indices}
        count, mean, std = len(indices), dataset.mean, usual_std(dataset.std)
    return frames, count, (args.mean or mean, args.std or std), file_names


def write_pictures(pictures, sheet, folder):
    """One PNG for each picture, and all of them on sheet.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    sheet.save(folder / "sheet.png")


def spread(total, number):
    """At most `number` indices below `total`, evenly spaced: of all classes of sorted images."""
    return [i * total // min(number, total) for i in range(min(number, total))]


# ============ patches ============
@torch.no_grad()
def patches(args):
    """Draw patches in the colours of their features: three principal components of all images."""
    network = eval_flags.open_network(args)
    forward = forward_of_feature(network, "patches")
    stride = stride_of_positions(network, forward)
    frames, _, normalisation, file_names = open_images(args)
    folder, device = Path(args.dump_path), dist.resolve_device(args.device)
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")
    if not args.pretrained:
        logger.warning(
            "WARNING: no --pretrained: the network is UNTRAINED, what it finds alike is not learned"
        )
    network.model.to(device)
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in normalisation)
    names, images, maps = [], [], []
    for name, image in frames:
        image = attention_maps.fit_image(image, args.image_size, stride)
        features = forward(((image.to(device).float() / 255 - mean) / std)[None])[0].float().cpu()
        names.append(name)
        images.append(image)
        maps.append(features.unflatten(0, [side // stride for side in image.shape[1:]]))
    colours = colours_of_patches(maps, args.foreground)
    notes = [network.origin, "red, green, blue: the first three components of all these patches"]
    if args.foreground:
        notes.append("black: what the first component tells from them, as it tells the edges")
    drawn = [(names[i], images[i], colours[i]) for i in range(len(names))]
    draw_patches(drawn, folder, notes)
    for name, file in file_names.items():
        logger.info(f"{name}.png is of {file}")
    logger.info(f"{len(names)} images, written to {folder}; look at {folder / 'sheet.png'}")


# ============ neighbours ============
def neighbours(args):
    """Draw images, or those of --queries, and those of the data nearest to them by their features."""
    dataset, folder = eval_flags.open_split(args), Path(args.dump_path)
    queries, rows = dataset, spread(len(dataset), args.num_images)
    own = rows
    if args.queries:
        queries = open_queries(args.queries, args.in_chans)
        rows = range(len(queries))
        places = {os.path.abspath(dataset.file_name(i)): i for i in range(len(dataset))}
        own = [places.get(os.path.abspath(queries.file_name(row))) for row in rows]
    if args.top >= len(dataset):
        raise ValueError(
            f"--top {args.top} is not fewer than the {len(dataset)} images of --data_path "
            f"{args.data_path}: use fewer"
        )
    network, features = features_of_images(args, dataset)
    if args.queries:
        asked, _ = extract_features(
            network.model, queries, **feature_options(args, network, dataset)
        )
    else:
        asked = features[list(rows)]
    cosines, indices = nearest_of_others(features, asked, own, args.top)
    source = f"{args.feature} of {network.origin}, centre crops compared by cosine"
    draw_queries(queries, rows, dataset, cosines, indices, folder, source)
    logger.info(f"{len(rows)} queries; written to {folder}, look at {folder / 'neighbours.png'}")


def features_of_images(args, dataset):
    """(network, features (N, D) of the images of a dataset); locks the folder."""
    network = eval_flags.open_network(args, args.feature)
    checkpoint.check_writable(args.dump_path)
    hold_folder(args.dump_path, f"visualize_{args.picture}")
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, its features are too")
    network.model.to(dist.resolve_device(args.device))
    features, _ = extract_features(
        network.model, dataset, **feature_options(args, network, dataset)
    )
    return network, features


def feature_options(args, network, dataset):
    """How features are computed, the same for the data and for queries; see extraction_options."""
    device = dist.resolve_device(args.device)
    if args.use_fp16 is False:
        args.precision = "fp32"
    return eval_flags.extraction_options(args, network, dataset, device)


# ============ classes ============
def classes(args):
    """Draw a map of the classes, each where the mean of its features lies, with an image of it."""
    dataset = eval_flags.open_split(args)
    check_labelled(dataset, "--data_path")
    network, features = features_of_images(args, dataset)
    means, numbers, rows = class_means(features, dataset.labels)
    if len(means) < 4:
        raise ValueError(f"--data_path {args.data_path} has {len(means)} classes: a map needs four")
    if args.method == "pca":
        points, how = place_by_pca(means, 2), "two principal components"
    else:
        perplexity = args.perplexity or min(20.0, (len(means) - 1) / 3)
        points = place_by_tsne(
            means,
            args.pca_dim,
            perplexity=perplexity,
            learning_rate=args.learning_rate,
            iterations=args.iterations,
            seed=args.seed,
        )
        dim = min(args.pca_dim, len(means) - 1, means.shape[1])
        how = f"t-SNE of {dim} principal components, perplexity {perplexity:.3g}"
    notes = [
        f"{args.feature} of {network.origin}; {how}",
        "each class at the mean of its images, shown by the image that is nearest to it",
    ]
    title = f"{len(means):,} classes of {dataset.name}"
    folder = Path(args.dump_path)
    draw_classes(dataset, points, numbers, rows, folder, title, notes)
    logger.info(f"{len(means)} classes; written to {folder}, look at {folder / 'classes.png'}")


# ============ curves ============
def curves(args):
    """Draw the curves of several runs in one picture, and what their evaluations say."""
    runs = read_runs(args.runs)
    panels, path = choose_panels(runs, args.curves), Path(args.dump_path) / "runs.png"
    if not panels:
        raise ValueError("--runs: no two of these runs have logged the same: name --curves")
    try:
        draw_runs(runs, panels, path)
    except ImportError as error:
        raise ValueError("curves need the package matplotlib: pip install matplotlib") from error
    logger.info(f"{len(runs)} runs, drawn to {path}")


# ============ crops ============
def crops(args):
    """Draw the crops of a few images, those of epoch --epoch; the colours are drawn anew."""
    image_flags.fill_in_crops(args)
    dataset = image_flags.open_images(args)
    options = image_flags.augment_options(args, dataset, sum(args.nmb_crops))
    multicrop = MultiCropDataset(
        dataset,
        args.nmb_crops,
        args.size_crops,
        args.min_scale_crops,
        args.max_scale_crops,
        seed=args.seed,
        interpolation=args.interpolation,
    )
    checkpoint.check_writable(args.dump_path)
    hold_folder(args.dump_path, f"visualize_{args.picture}")
    indices = spread(len(dataset), args.num_images)
    batch, _ = collate_crops([multicrop[args.epoch, index] for index in indices])
    views = Augment(**options)(batch, generator(args.seed, args.epoch, 0, 0))  # (B, C, S, S) each

    views = [to_uint8(view, options["mean"], options["std"]) for view in views]
    path = Path(args.dump_path) / "plots" / "multicrop.png"
    source = f"as in {args.pretrained}" if args.pretrained else ""
    draw_crops(multicrop, args.epoch, indices, views, path, source)
    for number, size, scale in zip(args.nmb_crops, args.size_crops, multicrop.scales, strict=True):
        smallest, largest = scale
        logger.info(f"{number} x {size} px, {smallest:g} to {largest:g} of the image's area")
    logger.info(f"{len(indices)} images with their crops, drawn to {path}")


# ============ clusters ============
@torch.no_grad()
def clusters(args):
    """Write which cluster each image is in to --dump_path, and draw clusters."""
    weights = "" if args.num_clusters else args.pretrained
    heads, dino = cluster_tables.read_heads(weights, args.checkpoint_key)
    dataset = eval_flags.open_split(args)
    check_request(args, [len(weight) for weight, _ in heads], len(dataset))
    columns = cluster_contents.read_columns(dataset.metadata, args.columns)
    folder = Path(args.dump_path)
    check_folders(folder, args.folders)
    checkpoint.check_writable(folder)
    hold_folder(folder, f"visualize_{args.picture}")
    feature = args.feature if args.num_clusters else "backbone" if dino else "embedding"
    network = eval_flags.open_network(args, feature)
    device = dist.resolve_device(args.device)
    precision = "fp32" if args.use_fp16 is False else args.precision
    features, colours = cluster_tables.features_of(
        network,
        dino,
        dataset,
        size=args.size,
        device=device,
        precision=dist.resolve_precision(precision, device),
        batch_size=args.batch_size,
        workers=args.workers,
        loader_timeout=args.loader_timeout,
    )

    names, readable = image_names(dataset)
    by_head = cluster_tables.group(
        features, heads, readable, num_clusters=args.num_clusters, seed=args.seed
    )
    assignments, cosines, centroids = by_head[args.head]
    found = cluster_tables.Clusters(
        assignments,
        cosines,
        centroids,
        labels=dataset.labels,
        classes=dataset.classes,
        colours=colours,
        columns=columns,
    )
    if args.neighbours and dataset.labels is not None:
        labels = dataset.labels.masked_fill(~readable, -1)
        found.same_class_edges = cluster_contents.same_class_edges(
            features, labels, args.neighbours, args.seed
        )
    numbers = cluster_tables.write_files(
        folder,
        found,
        names,
        heads=[by_one_head for by_one_head, _, _ in by_head],
        settings={**{name: getattr(args, name) for name in CLUSTER_SETTINGS}, "feature": feature},
    )
    draw_clusters(args, found, dataset, names, folder, network.origin)
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, clusters mean little")
    report_clusters(args, numbers)
    logger.info(
        f"{numbers['images']} images, {numbers['empty']} of {numbers['num_clusters']} clusters empty, "
        f"the largest of {numbers['size_max']}; written to {folder}, look at {folder / 'clusters.png'}"
    )


def report_clusters(args, numbers):
    """Say what clusters know of labels, metadata and colour, and warn of what is odd with them."""
    if "purity" in numbers:
        edges = ""
        if "same_class_edges" in numbers:
            edges = (
                f", {numbers['same_class_edges']:.1%} of {args.neighbours}-NN edges in one class"
            )
        logger.info(
            f"with the labels: accuracy {numbers['accuracy']:.1%}, purity {numbers['purity']:.1%}, NMI "
            f"{numbers['nmi']:.3f}, AMI {numbers['ami']:.3f}, ARI {numbers['ari']:.3f}{edges}"
        )
    for name, column in numbers.get("metadata", {}).items():
        logger.info(
            f"with {name}: NMI {column['nmi']:.3f}, AMI {column['ami']:.3f} ({column['values']:,} values of "
            f"{column['images']:,} images)"
        )
    logger.info(
        f"colours spread by {numbers['colour_spread']:.1f} in clusters, "
        f"{numbers['colour_spread_of_all']:.1f} in all images (of 255)"
    )
    unique, total = numbers["unique"], numbers["num_clusters"]
    if 2 * unique < total:
        logger.warning(
            f"WARNING: only {unique:,} of {total:,} centroids are unique, the others lie within a cosine "
            f"distance of {UNIQUE_DISTANCE:g} of one of these"
        )
    if 2 * numbers["empty"] > total:
        logger.info("note: most prototypes are nearest to no image, as in a run that is young")


def check_request(args, sizes, num_images):
    """Raise ValueError for clusters that are not there; sizes: how many each head has."""
    of_run = f"--pretrained {args.pretrained}" if args.pretrained else "an untrained network"
    number, wanted = args.num_clusters, max(args.show or [0])
    if number and number > num_images:
        images = f"the {num_images} images of --data_path {args.data_path}"
        raise ValueError(f"--num_clusters {number} is more than {images}: use fewer")
    if number and args.head:
        raise ValueError(f"--head {args.head} is of prototypes: leave it out with --num_clusters")
    if not number and not sizes:
        raise ValueError(
            f"{of_run} has no prototypes, which SwAV, DeepCluster-v2, SeLa-v2 and DINO train: give "
            "--num_clusters to cluster its features by k-means"
        )
    if not number and args.head >= len(sizes):
        raise ValueError(
            f"--head {args.head} is not one of the {len(sizes)} of {of_run}, from 0 on"
        )
    number = number or sizes[args.head]
    if wanted >= number:
        raise ValueError(f"--show {wanted} is not there: clusters are numbered 0 to {number - 1}")


def draw_clusters(args, found, dataset, names, folder, source):
    """clusters.png; sizes.png and colours.png where matplotlib is installed; with --folders folders."""
    shown = args.show or choose_clusters(found.sizes, args.num_shown)
    kind = "k-means of the features" if args.num_clusters else "prototypes"
    cluster_pictures.draw_clusters(
        found,
        dataset,
        shown,
        num_images=args.num_images,
        seed=args.seed,
        path=folder / "clusters.png",
        source=f"{kind} of {source}",
    )
    try:
        draw_sizes(found, folder / "sizes.png")
        draw_colours(found, folder / "colours.png")
    except ImportError:
        logger.warning("no sizes.png, no colours.png: pip install matplotlib")
    if args.folders:
        write_folders(folder / "folders", found, dataset, names)


# ============ filters, activations ============
def filters(args):
    """Draw the first layer's filters; with --conv, --layer or --filters what a layer looks for."""
    network, calls = trace_network(args)
    model, folder = network.model, Path(args.dump_path)
    if all(getattr(args, name) is None for name in ("conv", "layer", "filters", "num_filters")):
        first, path = responses.convolutions(model, calls)[0].module, folder / "filters.png"
        checkpoint.check_writable(folder)
        hold_folder(folder, f"visualize_{args.picture}")
        sobel = getattr(model, "sobel", None)
        filter_pictures.draw_first_layer(first, sobel, path, network.origin)
        logger.info(
            f"{first.out_channels} filters, drawn to {path}; --conv, --layer or --filters show what "
            "a layer looks for"
        )
        return
    layer, dataset, chosen, top = rank_images(args, network, calls)
    samples = (dataset.load(index) for index in spread(len(dataset), 16))
    images, responses_before, responses_after = filter_pictures.ascend(
        model,
        layer,
        chosen,
        args.size,
        normalisation=network.normalisation(dataset),
        steps=args.steps,
        step_size=args.step_size,
        decay=args.decay,
        blur_every=args.blur_every,
        blur_sigma=args.blur_sigma,
        clip=args.clip,
        grey=all(bool((image == image[:1]).all()) for image in samples),
        seed=args.seed,
    )
    name = f"filters_{layer.name}"
    (folder / name).mkdir(exist_ok=True)
    for number, image, before, after in zip(
        chosen, images, responses_before, responses_after, strict=True
    ):
        picture = activation_pictures.as_picture(image)
        Image.fromarray(picture).save(folder / name / f"filter_{number:04}.png")
        natural = max((value for _, value in top.of_filter(number)), default=math.nan)
        logger.info(
            f"filter {number}: noise {before:.3g}, after ascent {after:.3g}, best image {natural:.3g}"
        )
    synthetic = list(zip(images, responses_after.tolist(), strict=True))
    path = folder / f"{name}.png"
    activation_pictures.draw_top_images(
        top, chosen, dataset, path, layer.name, network.origin, synthetic
    )
    logger.info(f"{len(chosen)} filters, drawn to {path}")


def activations(args):
    """Write which images the filters of a layer respond to most, and draw them."""
    network, calls = trace_network(args)
    layer, dataset, chosen, top = rank_images(args, network, calls)
    folder = Path(args.dump_path)
    table = folder / "activations.csv"
    listed = chosen if args.filters else range(layer.num_filters)
    activation_pictures.write_table(top, listed, dataset, table)
    activation_pictures.draw_top_images(
        top, chosen, dataset, folder / "activations.png", layer.name, network.origin
    )
    rows, columns = layer.cells
    logger.info(
        f"{layer.name} has {layer.num_filters} filters of {rows} x {columns} cells; written to "
        f"{table}, look at {folder / 'activations.png'}"
    )


def trace_network(args):
    """The network, frozen, on the device, and the use of its modules."""
    network = eval_flags.open_network(args)
    model = network.model.requires_grad_(False)
    if not args.pretrained:
        logger.warning("WARNING: no --pretrained: the network is UNTRAINED, as its filters are")
    model.to(dist.resolve_device(args.device))
    return network, responses.trace(model, args.size, args.in_chans)


def rank_images(args, network, calls):
    """(layer, images, filters to draw, what each filter responds to most)."""
    layer = responses.find_layer(network.model, calls, conv=args.conv, name=args.layer)
    dataset, device = eval_flags.open_split(args), dist.resolve_device(args.device)
    picture_flags.check_filters(args, layer, len(dataset))
    checkpoint.check_writable(args.dump_path)
    hold_folder(args.dump_path, f"visualize_{args.picture}")
    precision = "fp32" if args.use_fp16 is False else args.precision
    precision = dist.resolve_precision(precision, device)
    top = activation_pictures.find_top_images(
        network.model,
        layer,
        dataset,
        number=args.top,
        size=args.size,
        normalisation=network.normalisation(dataset),
        device=device,
        batch_size=args.batch_size,
        num_workers=args.workers,
        loader_timeout=args.loader_timeout,
        precision=precision,
    )
    chosen = list(dict.fromkeys(args.filters or [])) or top.most_active(args.num_filters or 8)
    return layer, dataset, chosen, top


# ============ main ============
def main(argv: list[str] | None = None) -> int:
    """Draw; returns 0."""
    args = parse_args(argv)
    setup_logging(None, True)
    check_args(args)
    draw, _, _ = COMMANDS[args.picture]
    draw(args)
    release_folders()
    return 0


# ============ arguments ============
def parse_args(argv):
    """The arguments; the command line wins over the run, this over the preset, that over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    parser = get_parser()
    picture = parser.parse_args(argv).picture
    command = next(x for x in parser._actions if x.dest == "picture").choices[picture]
    explicit = flags.explicit_flags(command, argv[1:]) | {"picture": picture}
    _, _, defaults_of = COMMANDS[picture]
    said = defaults_of(eval_flags.with_defaults(command, explicit), explicit)
    return eval_flags.with_defaults(command, explicit, said)


def get_parser() -> argparse.ArgumentParser:
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
    for name, (draw, add_flags, _) in COMMANDS.items():
        add_flags(commands.add_parser(name, doc=draw.__doc__, help=draw.__doc__))
    return parser


COMMANDS = {
    "attention": (attention, picture_flags.add_attention_flags, picture_flags.attention_defaults),
    "patches": (patches, picture_flags.add_patches_flags, picture_flags.patches_defaults),
    "neighbours": (
        neighbours,
        picture_flags.add_neighbours_flags,
        picture_flags.network_defaults,
    ),
    "classes": (classes, picture_flags.add_classes_flags, picture_flags.network_defaults),
    "curves": (curves, picture_flags.add_curves_flags, picture_flags.no_defaults),
    "crops": (crops, picture_flags.add_crops_flags, picture_flags.crops_defaults),
    "clusters": (clusters, add_cluster_args, picture_flags.network_defaults),
    "filters": (filters, picture_flags.add_filters_flags, picture_flags.network_defaults),
    "activations": (
        activations,
        picture_flags.add_activations_flags,
        picture_flags.network_defaults,
    ),
}


def check_args(args) -> None:
    """Raise ValueError on arguments that do not fit together."""
    if args.picture == "curves":
        if not args.runs:
            raise ValueError("--runs must be given: the folders of runs, such as runs/a runs/b")
        return
    eval_flags.check_images(args)
    if args.picture in ("filters", "activations") and args.conv and args.layer:
        raise ValueError(f"--conv {args.conv} and --layer {args.layer}: give one of them")
    if args.picture in ("attention", "patches") and len(args.image_size) > 2:
        raise ValueError(
            f"--image_size has {len(args.image_size)} values: give height and width, or one"
        )
    if args.picture == "attention":
        if args.voc and args.image_path:
            raise ValueError("--voc brings its images: leave out --image_path")
        if args.baseline and not args.voc:
            raise ValueError("--baseline is measured with --voc: give the folder VOCdevkit")
        if args.threshold and args.threshold > 1:
            raise ValueError(f"--threshold {args.threshold:g} is a share: use one from 0 to 1")


if __name__ == "__main__":
    flags.run(main)
