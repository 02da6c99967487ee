"""Where a training step's time goes: SwAV with a ResNet-50 or DINO with a ViT-S/16, part by part.

A step begins with a batch in pinned memory of the host and ends with the updated weights. Ours: uint8
crops, photometry on the device, the operations of main_swav.py or main_dino.py in bf16 where the GPU
has it; once as it is and once compiled. Published: its photometry is the loader's, so that its step
begins with finished float32 crops, of four times the bytes; then the published formulation of
bench/train_step.py or bench/dino_step.py, contiguous, in fp16 with loss scaling.

On a GPU the parts are times between CUDA events: what the device did, or waited for, from one mark to
the next. The third table counts the kernels of a step and the share of the step that they fill: far
below 100 % the CPU is too slow to ask for the next kernel.

    python -m bench.step_profile --method swav --device cuda [--batch 64 --no-compile]
    python -m bench.step_profile --method dino --device cuda

A batch that does not fit into the GPU's memory is halved until it does.
"""

import argparse
import copy
import gc
import statistics
import time

import torch

from bench import dino_step, train_step
from bench.dino_loss import build_criterion
from bench.measure import get_parser, parse_args, print_table, waiting
from main_dino import NUM_GLOBAL
from src import dist
from src.data.augment import Augment
from src.run.run import place_network

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Flags of each method's published run that the step depends on, and what --smoke makes of them.
DEFAULTS = {
    "swav": {"arch": "resnet50", "local_crops": 6, "outputs": 3000},
    "dino": {"arch": "vit_small", "local_crops": 8, "outputs": 65536},
}
SMOKE_OF_METHOD = {
    "swav": {"arch": "resnet10", "local_crops": 6, "outputs": 30},
    "dino": {"arch": "vit_micro", "local_crops": 2, "outputs": 64},
}
SMOKE = {"batch": 2, "sizes": [32, 16], "patch_size": 8, "steps": 1, "warmup": 1, "compile": False}
AUGMENT = {
    "swav": lambda local_crops: Augment(MEAN, STD),
    "dino": lambda local_crops: Augment(
        MEAN,
        STD,
        color_jitter=(0.4, 0.4, 0.2, 0.1),
        blur_prob=[1.0, 0.1] + [0.5] * local_crops,
        solarize_prob=[0.0, 0.2] + [0.0] * local_crops,
    ),
}


class PartClock:
    """Called with a part's name at its end; `parts()` has the milliseconds of each since `start()`.

    On a GPU marks are events in its stream, which hold nothing up; elsewhere the clock on the wall.
    """

    def __init__(self, device):
        self.device = device
        self.marks = []

    def start(self):
        self.marks = []
        self("start")

    def __call__(self, part):
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((part, moment))

    def parts(self):
        """{part: milliseconds}, in their order; the device must have finished."""
        milliseconds = {}
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            if self.device.type == "cuda":
                milliseconds[part] = before.elapsed_time(after)
            else:
                milliseconds[part] = (after - before) * 1e3
        return milliseconds


# ============ what is profiled ============
def host_batches(args, device):
    """(uint8 crops of a batch, one tensor a resolution; the same as float32, one tensor a crop)."""
    pin = device.type == "cuda"
    numbers = (NUM_GLOBAL, args.local_crops)
    pixels, crops = [], []
    for number, size in zip(numbers, args.sizes, strict=True):
        shape = (args.batch, number, size, size, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        pixels.append(images.pin_memory() if pin else images)
        for crop in images.unbind(1):
            crop = (crop / 255 - 0.45).div_(0.226).contiguous()
            crops.append(crop.pin_memory() if pin else crop)
    return pixels, crops


def loading(args, process):
    """Two functions that bring a batch to the device: the published form's, and ours."""
    device = process.device
    pixels, crops = host_batches(args, device)
    augment = AUGMENT[args.method](args.local_crops)
    draws = torch.Generator().manual_seed(0)

    def published(mark):
        on_device = [crop.to(device, non_blocking=True) for crop in crops]
        mark("copy")
        return on_device

    def ours(mark):
        on_device = [images.to(device, non_blocking=True) for images in pixels]
        mark("copy")
        augmented = augment(on_device, draws)
        mark("photometry")
        return augmented

    return published, ours


def swav_forms(args, process, precision, compiled):
    """{name: function(mark) that makes one training step}."""
    device = process.device
    load_published, load_ours = loading(args, process)
    network = train_step.build_network(args.arch, args.outputs)

    def published_form():
        model = copy.deepcopy(network).to(device)
        optimizer = train_step.PublishedLARC(model.parameters())
        scaler = dist.grad_scaler(device, train_step.published_precision(device))
        return lambda mark: train_step.published_step(
            model, load_published(mark), optimizer, scaler, device, mark
        )

    def our_form(compiled):
        model = place_network(
            copy.deepcopy(network),
            process,
            sync_bn="none",
            syncbn_process_group_size=0,
            compiled=compiled,
        )
        optimizer = train_step.our_larc(model.parameters())
        scaler = dist.grad_scaler(device, precision)
        return lambda mark: train_step.our_step(
            model,
            load_ours(mark),
            optimizer,
            scaler,
            device=device,
            precision=precision,
            mark=mark,
        )

    return name_forms(published_form, our_form, compiled)


def dino_forms(args, process, precision, compiled):
    """As swav_forms."""
    device = process.device
    load_published, load_ours = loading(args, process)
    networks = dino_step.build_networks(
        args.arch, args.patch_size, args.sizes[0], args.outputs, drop_path_rate=0.1
    )

    def published_form():
        student, teacher = (dino_step.write_out(copy.deepcopy(x)).to(device) for x in networks)
        center = torch.zeros(1, args.outputs, device=device)
        optimizer = dino_step.published_adamw(student)
        scaler = dist.grad_scaler(device, train_step.published_precision(device))
        return lambda mark: dino_step.published_step(
            student, teacher, load_published(mark), center, optimizer, scaler, mark
        )

    def our_form(compiled):
        student, teacher = (
            place_network(
                copy.deepcopy(x),
                process,
                sync_bn="none",
                syncbn_process_group_size=0,
                compiled=compiled,
            )
            for x in networks
        )
        criterion = build_criterion(args.outputs, NUM_GLOBAL + args.local_crops, device)
        optimizer = dino_step.our_adamw(student)
        scaler = dist.grad_scaler(device, precision)
        return lambda mark: dino_step.our_step(
            student,
            teacher,
            load_ours(mark),
            criterion,
            optimizer,
            scaler,
            precision=precision,
            mark=mark,
        )

    return name_forms(published_form, our_form, compiled)


def name_forms(published_form, our_form, compiled):
    forms = {"published": published_form(), "ours": our_form(compiled=False)}
    if compiled:
        forms["ours, compiled"] = our_form(compiled=True)
    return forms


FORMS = {"swav": swav_forms, "dino": dino_forms}


# ============ measuring ============
def measure(step, args, device, clock):
    """Seconds of a step, from --steps of them in a row, and the parts of each, {part: ms}."""
    wait = waiting(device)
    parts = []
    wait()
    start = time.perf_counter()
    for _ in range(args.steps):
        clock.start()
        step(clock)
        parts.append(clock)
        clock = PartClock(device)
    wait()
    seconds = (time.perf_counter() - start) / args.steps
    return seconds, [each.parts() for each in parts]


def peak_memory_mb(step, device):
    """Peak of a step beyond what lies on the device between steps; None but on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(train_step.unmarked)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def profile(args, process, precision, compiled):
    """Measure all forms in turn and print the tables."""
    device = process.device
    torch.manual_seed(0)
    forms = FORMS[args.method](args, process, precision, compiled)
    for step in forms.values():
        for _ in range(args.warmup):
            step(train_step.unmarked)
    seconds = {name: [] for name in forms}
    parts = {name: [] for name in forms}
    for _ in range(args.repeats):
        for name, step in forms.items():
            mean, of_steps = measure(step, args, device, PartClock(device))
            seconds[name].append(mean)
            parts[name] += of_steps
    seconds = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {name: peak_memory_mb(step, device) for name, step in forms.items()}
    print_steps(args, precision, seconds, memory, device)
    print_parts(args, parts)
    if device.type == "cuda":
        print_kernels(args, forms, seconds)


def title_of(args):
    sizes = f"{NUM_GLOBAL} x {args.sizes[0]} + {args.local_crops} x {args.sizes[1]} px"
    return f"{args.method} {args.arch}, batch {args.batch}, {sizes}, K {args.outputs}"


def print_steps(args, precision, seconds, memory, device):
    rows = []
    for name, time_of_step in seconds.items():
        kind = train_step.published_precision(device) if name == "published" else precision
        megabytes = "-" if memory[name] is None else memory[name]
        rate = args.batch / time_of_step
        faster = seconds["published"] / time_of_step
        rows.append([name, kind, time_of_step * 1e3, rate, faster, megabytes])
    header = ["form", "precision", "ms", "images/s", "times faster", "MB beyond networks"]
    print_table(f"Step from the host's batch on: {title_of(args)}", header, rows, args.json)


def print_parts(args, parts):
    """Medians over all steps; a part that a form does not have is "-"."""
    names = []  # of parts, in the order in which they come
    for steps in reversed(parts.values()):
        names += [name for name in steps[0] if name not in names]
    rows = []
    for name in names:
        row = [name]
        for steps in parts.values():
            times = [step[name] for step in steps if name in step]
            row.append(statistics.median(times) if times else "-")
        rows.append(row)
    header = ["part", *(f"{form}, ms" for form in parts)]
    print_table(f"Parts of a step: {title_of(args)}", header, rows, args.json)


def print_kernels(args, forms, seconds):
    """Kernels, copies and memsets of one step, and the share of the step in which one was running."""
    rows = []
    for name, step in forms.items():
        activity = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activity) as profiler:
            step(train_step.unmarked)
            torch.cuda.synchronize()
        on_gpu = [
            event.duration_ns()
            for event in profiler.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA
        ]
        busy = sum(on_gpu) / 1e9 / seconds[name]
        rows.append([name, len(on_gpu), sum(on_gpu) / 1e6, 100 * busy])
    header = ["form", "kernels and copies", "ms of them", "% of the step"]
    print_table(f"Kernels of a step: {title_of(args)}", header, rows, args.json)


def with_memory(run, batch):
    """`run(batch)`, with half of the batch again and again while the GPU's memory runs out."""
    while True:
        try:
            return run(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Not in the except clause, where the error still holds the tensors of the failed step.
        gc.collect()
        torch.cuda.empty_cache()
        print(f"batch {batch}: out of memory, trying {batch // 2}", flush=True)
        batch //= 2


def main(argv=None):
    parser = get_parser(__doc__, repeats=5)
    parser.add_argument("--method", choices=[*FORMS], default="swav")
    parser.add_argument("--arch", default=None, help="resnet50 or vit_small")
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs=2, default=[224, 96])
    parser.add_argument("--local_crops", type=int, default=None, help="6 or 8")
    parser.add_argument("--outputs", type=int, default=None, help="K, 3000 or 65536")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=10, help="steps of each repeat")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not timed")
    args = parse_args(parser, SMOKE, argv)
    defaults = SMOKE_OF_METHOD if args.smoke else DEFAULTS
    for name, value in defaults[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    process = dist.init(args.device)
    precision = dist.default_precision(process.device)

    def run(batch, compiled):
        args.batch = batch
        profile(args, process, precision, compiled)
        return batch

    # Compiling takes a minute: what does not need it is printed before.
    batch = with_memory(lambda batch: run(batch, False), args.batch)
    if args.compile:
        gc.collect()
        with_memory(lambda batch: run(batch, True), batch)


if __name__ == "__main__":
    main()
