"""The detector beside its peers: a training step, inference, their parts, and memory."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from atss import GroundTruth, Predictions, load_config
from atss.structures import HeadOutput

from .peers import DTYPES, NUM_CLASSES, PEERS, Peer, in_precision
from .timing import Seconds, Stopwatch, in_fresh_process, in_turn, parts_in_turn, peak_mebibytes

OURS = "ours"
# For the speed of a machine: the side of a multiplied matrix, and the number of copied bytes.
SIDE, COPIED = 4096, 2**28


@dataclass(frozen=True)
class Case:
    """A measurement: precision ("fp32", "bf16" or "fp16"), layout of feature maps, and images. They
    are the same for all models."""

    precision: str
    channels_last: bool
    batch: int
    height: int
    width: int
    boxes: int
    device: str
    config_file: str
    options: tuple[str, ...] = ()
    classes: int = NUM_CLASSES

    @property
    def title(self) -> str:
        layout = "channels last" if self.channels_last else "contiguous"
        return f"{self.precision}, {layout}"


def random_batch(case: Case) -> list[dict]:
    """Return noise with boxes of 8 to 512 pixels, in Detectron2's format; fixed seed."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.tensor([case.width, case.height] * 2)
    batch = []
    for _ in range(case.batch):
        size = (3, case.height, case.width)
        image = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        centre = torch.rand(case.boxes, 2, generator=generator) * corner[:2]
        half = 4 * 64 ** torch.rand(case.boxes, 2, generator=generator)
        boxes = torch.cat([centre - half, centre + half], dim=1).clamp(min=0).minimum(corner)
        classes = torch.randint(0, case.classes, (case.boxes,), generator=generator)
        instances = Instances(size[1:], gt_boxes=Boxes(boxes), gt_classes=classes)
        batch.append({"image": image, "instances": instances, "height": size[1], "width": size[2]})
    return batch


def build_ours(case: Case) -> Peer:
    """Return the detector of a config, in the precision and layout of the case."""
    options = [
        *("MODEL.DEVICE", case.device, "DATASETS.TRAIN", (), "DATASETS.TEST", ()),
        *("MODEL.ATSS.NUM_CLASSES", case.classes),
        *("MODEL.ATSS.PRECISION", case.precision),
        *("MODEL.ATSS.CHANNELS_LAST", case.channels_last),
        *case.options,
    ]
    cfg = load_config(case.config_file, opts=options)
    model = build_model(cfg)
    return Peer(model, (), lambda batch: batch, model, model)


def build(name: str, case: Case) -> Peer:
    """Return our detector or one of PEERS, on the device of the case."""
    torch.manual_seed(0)
    if name == OURS:
        return build_ours(case)
    peer = PEERS[name]()
    peer.model.to(case.device)
    in_precision(peer, DTYPES[case.precision], case.channels_last)
    return peer


def training_step(peer: Peer, batch: list[dict], iteration: int = 1) -> Callable[[], None]:
    """Return a training step: forward, backward and SGD with a learning rate of zero, so that the
    weights stay the same.

    Args:
        iteration: of the training, which decides the phase.
    """
    prepared = peer.prepare(batch)
    optimizer = sgd(peer.model)

    def step() -> None:
        peer.model.train()
        with EventStorage(iteration):
            losses = peer.losses(prepared)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def inference(peer: Peer, batch: list[dict]) -> Callable[[], None]:
    """Return a function from images to detections."""
    prepared = peer.prepare(batch)

    def detect() -> None:
        peer.model.eval()
        with torch.no_grad():
            peer.detect(prepared)

    return detect


def sgd(model: nn.Module, foreach: bool | None = None) -> torch.optim.Optimizer:
    """Return SGD with a learning rate of zero.

    Args:
        foreach: see torch; None: only on a GPU.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, foreach=foreach)


def beside_peers(names: Sequence[str], case: Case, runs: int) -> dict[str, dict[str, Seconds]]:
    """Return {"training step" or "inference": {name: seconds per batch}}, all models in turn."""
    device, batch = torch.device(case.device), random_batch(case)
    models = {name: build(name, case) for name in names}
    steps = {name: training_step(peer, batch) for name, peer in models.items()}
    detects = {name: inference(peer, batch) for name, peer in models.items()}
    return {
        "training step": in_turn(steps, runs, device),
        "inference": in_turn(detects, runs, device),
    }


def beside_configs(files: Sequence[str], case: Case, runs: int) -> dict[str, tuple[Seconds, int]]:
    """Return {config: (seconds of a training step of its last phase, number of parameters)}, all
    configs in turn, that of the case first. A config is named by its file, without the folders if
    no other has that name."""
    device, batch = torch.device(case.device), random_batch(case)
    files = (case.config_file, *files)
    short = Counter(Path(file).stem for file in files)
    steps, parameters = {}, {}
    for file in files:
        torch.manual_seed(0)
        peer = build_ours(replace(case, config_file=file))
        last = load_config(file, opts=case.options).SOLVER.MAX_ITER - 1
        name = Path(file).stem if short[Path(file).stem] == 1 else str(file)
        steps[name] = training_step(peer, batch, last)
        parameters[name] = sum(p.numel() for p in peer.model.parameters())
    seconds = in_turn(steps, runs, device)
    return {name: (seconds[name], parameters[name]) for name in steps}


def parts(case: Case, runs: int) -> dict[str, dict[str, Seconds]]:
    """Measure the parts of our training step and of our inference."""
    device, batch = torch.device(case.device), random_batch(case)
    model = build_ours(case).model
    optimizer = sgd(model)
    instances = [x["instances"] for x in batch]

    def precision():
        if model.precision is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=model.precision)

    def network(watch: Stopwatch):
        images = model.preprocess_image(batch)
        watch.lap("images to one batch")
        with precision():
            features = model.backbone(images.tensor)
            watch.lap("backbone")
            features = [features[name] for name in model.head_in_features]
            predictions: HeadOutput = model.head(features)
            watch.lap("head")
        return images, features, predictions

    def step(watch: Stopwatch) -> None:
        model.train()
        _, features, predictions = network(watch)
        output = predictions.map(lambda x: x.detach().float().requires_grad_())
        anchors = model.anchor_generator.grid(features)
        gt = GroundTruth.from_instances(instances).to(device)
        boxes = model.box_coder.decode(output.box_regression, anchors.boxes, anchors.stride)
        watch.lap("decoding")
        detached = Predictions(output.map(torch.Tensor.detach), boxes.detach())
        branch = model.branches[model.inference].phases[-1]
        assignment = branch.assigner(anchors, gt, detached)
        watch.lap("assignment")
        losses = branch.criterion(output, boxes, anchors, gt, assignment)
        watch.lap("criterion")
        optimizer.zero_grad()
        sum(losses.values()).backward()
        watch.lap("criterion, backward")
        pairs = zip(predictions[:3], output[:3], strict=True)
        tensors, leaves = zip(*((a, b) for a, b in pairs if a is not None), strict=True)
        torch.autograd.backward(tensors, [x.grad for x in leaves])
        watch.lap("head and backbone, backward")
        optimizer.step()
        watch.lap("optimizer")

    @torch.no_grad()
    def detect(watch: Stopwatch) -> None:
        model.eval()
        images, features, predictions = network(watch)
        # No score of an untrained head passes the threshold, so it is lowered until 1,000 (anchor,
        # class) pairs of an image pass, as on a crowded image.
        passing = predictions.map(torch.Tensor.float).probability()
        if model.postprocess.threshold_on_score and predictions.quality is not None:
            quality = predictions.quality.float().sigmoid()[..., None].expand_as(passing)
            passing = model.postprocess.score(passing, quality)
        threshold = passing.flatten().topk(1000 * len(passing)).values[-1]
        model.postprocess.score_thresh = threshold.item()
        watch.lap("(lowering the threshold)")
        model.forward_inference(images, features, {model.inference: predictions})
        watch.lap("post-processing")

    return {
        "training step": parts_in_turn(step, runs, device),
        "inference": parts_in_turn(detect, runs, device),
    }


def batching(case: Case, runs: int) -> tuple[dict[str, Seconds], str]:
    """Return seconds per image of a batch together and one by one, and the difference of the
    detections. The threshold is low enough for an untrained head."""
    model = build_ours(case).model.eval()
    model.postprocess.score_thresh = 0.0101
    batch = random_batch(case)
    functions = {
        "one by one": torch.no_grad()(lambda: [model([x])[0] for x in batch]),
        "together": torch.no_grad()(lambda: model(batch)),
    }
    seconds = in_turn(functions, runs, torch.device(case.device))
    per_image = {k: Seconds(tuple(v / len(batch) for v in s.values)) for k, s in seconds.items()}
    alone, together = ([x["instances"] for x in f()] for f in functions.values())
    if [len(x) for x in alone] != [len(x) for x in together]:
        return per_image, "their numbers of detections differ"
    boxes = [
        (a.pred_boxes.tensor - b.pred_boxes.tensor).abs().max()
        for a, b in zip(alone, together, strict=True)
    ]
    scores = [(a.scores - b.scores).abs().max() for a, b in zip(alone, together, strict=True)]
    return per_image, (
        f"{sum(map(len, alone))} detections, boxes differ by up to {max(boxes):.2g} px, "
        f"scores by {max(scores):.2g}"
    )


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if not function.is_view:
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def floor(case: Case) -> dict[str, float]:
    """Return a lower bound of our step's time on this machine, by parts: operations of its
    convolutions, bytes that its operators read and write, the rate of a large matrix product in the
    same precision, and the bandwidth of a copy."""
    device = torch.device(case.device)
    step = training_step(build_ours(case), random_batch(case))
    step()
    with FlopCounterMode(display=False) as operations, _Traffic() as traffic:
        step()
    dtype = DTYPES[case.precision] or torch.float32
    a = torch.randn(SIDE, SIDE, device=device).to(dtype)
    block = torch.empty(COPIED, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    rates = {"product": lambda: a @ a, "copy": lambda: other.copy_(block)}
    seconds = in_turn(rates, 5, device)
    return {
        "operations": operations.get_total_flops(),
        "bytes": traffic.bytes,
        "operations per second": 2 * SIDE**3 / seconds["product"].median,
        "bytes per second": 2 * block.numel() / seconds["copy"].median,
    }


def peak_memory(name: str, case: Case) -> float:
    """Return the peak MiB of two training steps: on a GPU allocated memory, on a CPU the resident
    memory of a new process."""
    if case.device.startswith("cuda"):
        return _gpu_mebibytes(name, case)
    return in_fresh_process(_cpu_mebibytes, name, case)


def _two_steps(name: str, case: Case) -> None:
    step = training_step(build(name, case), random_batch(case))
    step()
    step()


def _cpu_mebibytes(name: str, case: Case) -> float:
    _two_steps(name, case)
    return peak_mebibytes()


def _gpu_mebibytes(name: str, case: Case) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _two_steps(name, case)
    return torch.cuda.max_memory_allocated() / 2**20
