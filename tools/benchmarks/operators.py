"""Operators that a step starts on a GPU, and waits of the host: counted on a CPU.

With few images a GPU is faster than the host that starts its operators, so these counts determine
the time of a step.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_inductor_cache
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from atss import Assignment, Predictions, add_atss_config
from atss.assigners import ASSIGNER_REGISTRY, use_engine
from atss.modeling import branch, foreach
from atss.modeling.criterion import divide

from .model import OURS, Case, build, random_batch, sgd
from .peers import Peer
from .scenes import NUM_CLASSES, Scene, random_scene
from .timing import table

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ENGINES = ("tables", "lists")
OBJECTS = (14, 200, 2000)
BESIDE = (OURS, "detectron2-retinanet", "detectron2-fcos")
TAIL = "decoding, assignment, criterion"
# Only our detector divides the losses in a separate step.
FORWARD = ("images", "backbone", "head", TAIL, "division of losses")
BACKWARD = (
    "division, backward",
    f"{TAIL}, backward",
    "head, backward",
    "backbone, backward",
    "optimizer",
)
PARTS = (*FORWARD, *BACKWARD)


@dataclass
class Counts:
    """Counts since the last lap.

    Attributes:
        operators: number of operators, without views.
        waits: operators that return a value, or a shape that depends on values, to the host, and
            copies that are not non-blocking.
        to_host, to_gpu: copies of tensors.
    """

    operators: int = 0
    waits: int = 0
    to_host: int = 0
    to_gpu: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        return self.operators, self.waits, self.to_host, self.to_gpu


class Counter(TorchDispatchMode):
    """Counts the operators of all tensors.

    Attributes:
        now: counts since the last lap.
        laps: {part: counts} of the parts that :meth:`lap` ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.laps = Counts(), {}

    def lap(self, name: str) -> None:
        """End a part."""
        self.laps[name], self.now = self.now, Counts()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.now.operators += not function.is_view
        return function(*args, **(kwargs or {}))


class SimulatedGPU(Counter):
    """A simulated device "cuda" that counts its operators, waits and copies.

    Its tensors are FakeTensors, which raise an error if devices are mixed or if the host reads a
    value. Each has a real tensor on the CPU beside it, so values are right. Tensors of the host are
    real, and their operators are not counted. A backward pass is impossible: torch's builds for
    CUDA refuse one without a GPU.

    Args:
        may_wait: count waits; False: raise torch's error at the first one.
    """

    def __init__(self, may_wait: bool = True) -> None:
        super().__init__()
        self.may_wait = may_wait
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.entered = ExitStack()

    def __enter__(self) -> "SimulatedGPU":
        enter = self.entered.enter_context
        # torch.autocast refuses to run without a GPU.
        enter(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        enter(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
        # cuDNN's operators have no values on a CPU; without cuDNN the number of operators is equal.
        enter(torch.backends.cudnn.flags(enabled=False))
        enter(self.fake)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.entered.close()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        device = torch.device(kwargs.get("device") or CPU)
        if not on_gpu and device == CPU:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function.namespace == "prim":  # reads the device
            return function(*args, **kwargs)
        self.now.operators += not function.is_view
        with unset_fake_temporarily():
            on_cpu = {"device": CPU} if "device" in kwargs else {}
            values = function(*tree_map(_value, args), **tree_map(_value, kwargs | on_cpu))
        if _sets_where_true(function, args):
            self._wait(DynamicOutputShapeException(function))
        try:
            result = function(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            self._wait(error)
            return tree_map(self._on_gpu, values)
        self._count_copies(function, args, kwargs, tensors, result)
        return tree_map(_with_value, result, values)

    def _wait(self, error: Exception) -> None:
        if not self.may_wait:
            raise error
        self.now.waits += 1

    def _count_copies(self, function, args, kwargs, tensors, result) -> None:
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        to_host = any(isinstance(x, Tensor) and x.device == CPU for x in tree_leaves(result))
        # A scalar tensor of the host is an argument of a kernel, not a copy.
        from_host = [x for x in tensors if not isinstance(x, FakeTensor) and (copies or x.dim())]
        to_gpu = bool(from_host) and not to_host
        self.now.to_host += to_host
        self.now.to_gpu += to_gpu
        blocks = not (kwargs.get("non_blocking") or (copies and True in args[2:]))
        self.now.waits += (to_host or to_gpu) and blocks

    def _on_gpu(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        with unset_fake_temporarily():
            shape = torch.empty_like(value, device="meta")
        return _with_value(FakeTensor(self.fake, shape, torch.device("cuda:0")), value)


def _sets_where_true(function: Callable, args: tuple) -> bool:
    """Return whether it is x[mask] = values, for which a GPU searches the true elements, but a
    FakeTensor does not. A single value becomes a masked_fill on both."""
    put = torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default
    masks = function in put and any(x is not None and x.dtype == torch.bool for x in args[1])
    return masks and args[2].numel() > 1


def _value(x: object) -> object:
    return x.value if isinstance(x, FakeTensor) else x


def _with_value(result: object, value: object) -> object:
    """Return a result on the GPU with its value beside it, or a result on the host."""
    if not isinstance(result, FakeTensor) or result.device == CPU:
        return value
    result.value = value
    return result


# ------------------------------------------------------------------------------------------------
# Rules
# ------------------------------------------------------------------------------------------------


def registered_rules() -> Iterator[tuple[str, Callable]]:
    """Yield the name of every rule and the rule with its default arguments."""
    cfg = get_cfg()
    add_atss_config(cfg)
    node = cfg.MODEL.ATSS
    for node.ASSIGNER, _ in ASSIGNER_REGISTRY:
        injected = {"num_levels": len(node.IN_FEATURES), "num_classes": NUM_CLASSES}
        yield node.ASSIGNER, ASSIGNER_REGISTRY.build(node, **injected)


def on_gpu(scene: Scene) -> Scene:
    """Copy a scene to the simulated GPU."""
    anchors, gt, predictions = scene
    output = predictions.output.map(lambda x: x.to(GPU))
    anchors = replace(anchors, boxes=anchors.boxes.to(GPU))
    return anchors, gt.to(GPU), Predictions(output, predictions.boxes.to(GPU))


def count_rule(
    rule: Callable, scene: Scene, engine: str, may_wait: bool = True, **limit: int
) -> tuple[Counts, Assignment]:
    """Return counts of one call on the GPU, with anchors of an earlier call, and its result."""
    with SimulatedGPU(may_wait) as gpu, use_engine(engine, **limit):
        anchors, gt, predictions = on_gpu(scene)
        few = replace(gt, **{x: getattr(gt, x)[:2] for x in ("boxes", "classes", "image_index")})
        rule(anchors, few, predictions)
        gpu.lap("first call")
        assignment = rule(anchors, gt, predictions)
        gpu.lap("call")
        on_host = Assignment(*(x if x is None else x.cpu() for x in vars(assignment).values()))
    return gpu.laps["call"], on_host


def print_rules() -> dict:
    """Print a table of every rule; return {rule: {engine: {objects: counts}}}."""
    report, rows = {}, []
    for name, rule in registered_rules():
        report[name] = {engine: {} for engine in ENGINES}
        for engine in ENGINES:
            for objects in OBJECTS:
                counts, _ = count_rule(rule, random_scene(objects, 2), engine)
                report[name][engine][objects] = vars(counts)
        rows.append([name, *(_cell(x) for each in report[name].values() for x in each.values())])
    header = ["rule", *(f"{engine}, {n:,}" for engine in ENGINES for n in OBJECTS)]
    print("\noperators (waits, copies) of one call; two images of 800 x 1344, objects of both\n")
    print(table(header, rows))
    return report


def _cell(counts: Mapping[str, int]) -> str:
    copies = counts["to_host"] + counts["to_gpu"]
    return f"{counts['operators']:,} ({counts['waits']:,}, {copies})"


# ------------------------------------------------------------------------------------------------
# The whole step
# ------------------------------------------------------------------------------------------------


def count_step(name: str, case: Case) -> dict[str, Counts]:
    """Counts of the parts of a training step, of our detector or of a peer.

    The forward pass is counted on the simulated GPU. Backward pass and optimizer are counted on the
    CPU, with the casts of CUDA's autocast, whose GroupNorm is float32, and grouped as on a GPU.
    """
    peer, batch = build(name, case), random_batch(case)
    optimizer = sgd(peer.model, foreach=True)
    grouped = mock.patch.object(foreach, "ONE_BY_ONE", frozenset())
    with grouped, mock.patch.object(F, "group_norm", _group_norm_of_cuda):
        for _ in range(2):
            counter = _step(peer, batch, optimizer)
    with SimulatedGPU() as gpu:
        peer.model.to(GPU)
        for _ in range(2):
            gpu.laps.clear()
            with _laps_of_forward(peer.model, gpu), EventStorage(1):
                peer.losses(batch)
            gpu.lap(FORWARD[4] if TAIL in gpu.laps else TAIL)
    return {name: (gpu.laps | counter.laps).get(name, Counts()) for name in PARTS}


def _group_norm_of_cuda(x: Tensor, *args: object, call: Callable = F.group_norm) -> Tensor:
    return call(x.float(), *args)


def _step(peer: Peer, batch: list[dict], optimizer: torch.optim.Optimizer) -> Counter:
    """Count a step on the CPU, with laps of the parts of its backward pass and the optimizer."""
    peer.model.train()
    optimizer.zero_grad()
    counter, outputs = Counter(), {}
    with ExitStack() as hooks, counter, EventStorage(1):
        totals = hooks.enter_context(_laps_of_division(counter))
        for part in ("backbone", "head"):
            module, keep = peer.model.get_submodule(part), partial(_keep, outputs, part)
            hooks.enter_context(module.register_forward_hook(keep))
        losses = peer.losses(batch)
        # Autograd runs the later of two operators first, so the gradient of any output of a part is
        # complete after the backward pass of all later parts, and before that of the part.
        for outs, lap in zip(
            (totals, outputs["head"], outputs["backbone"]), BACKWARD[:3], strict=True
        ):
            for x in outs:
                x.register_hook(partial(_first, counter, lap))
        counter.laps.clear()
        counter.lap("forward")
        sum(losses.values()).backward()
        counter.lap(BACKWARD[3])
        optimizer.step()
        counter.lap(BACKWARD[4])
    return counter


def _keep(outputs: dict, part: str, module: nn.Module, given: object, output: object) -> None:
    outputs[part] = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]


def _first(counter: Counter, lap: str, gradient: Tensor) -> None:
    if lap not in counter.laps:
        counter.lap(lap)


@contextmanager
def _laps_of_division(counter: Counter) -> Iterator[list[Tensor]]:
    """End the lap of the tail when our detector divides its losses; yield the undivided losses."""
    totals: list[Tensor] = []

    def divide_apart(quotients: dict) -> dict:
        counter.lap(TAIL)
        totals.extend(x.total for x in quotients.values() if x.total.requires_grad)
        return divide(quotients)

    with mock.patch.object(branch, "divide", divide_apart):
        yield totals


@contextmanager
def _laps_of_forward(model: nn.Module, counter: Counter) -> Iterator[None]:
    model.train()
    with ExitStack() as hooks, _laps_of_division(counter):
        begins = model.backbone.register_forward_pre_hook(lambda *_: counter.lap(FORWARD[0]))
        hooks.enter_context(begins)
        for part in FORWARD[1:3]:
            module = model.get_submodule(part)
            ends = module.register_forward_hook(lambda *_, part=part: counter.lap(part))
            hooks.enter_context(ends)
        yield


def count_kernels(case: Case) -> Counts:
    """Count the kernels of decoding, assignment and criterion under torch.compile, forward and
    backward, and the operators that it does not compile; on the CPU, in minutes.

    Raises:
        ValueError: if torch.compile makes no kernels.
    """
    peer = build(OURS, replace(case, options=(*case.options, "MODEL.ATSS.COMPILE", "tail")))
    codes: list[str] = []
    save = mock.patch.object(GraphLowering, "save_output_code", codes.append)
    with save, fresh_inductor_cache(), EventStorage(1):
        torch._dynamo.reset()
        metrics.reset()
        peer.model.train()
        sum(peer.losses(random_batch(case)).values()).backward()
    if not codes:
        raise ValueError("torch.compile makes no kernels here")
    left = re.compile(r"^ +(?:\w+ = )?(?:torch\.ops\.aten|aten|extern_kernels)\.[\w.]+\(", re.M)
    return Counts(metrics.generated_kernel_count + sum(len(left.findall(code)) for code in codes))


def print_steps(case: Case, compiled: bool) -> dict:
    """Print a table of the parts of a step for each precision; return {precision: {name: {part:
    counts}}}.

    Args:
        compiled: also count ours with MODEL.ATSS.COMPILE "tail".
    """
    kernels = count_kernels(case) if compiled else None
    report = {}
    for precision in ("fp32", "bf16"):
        counted = {name: count_step(name, replace(case, precision=precision)) for name in BESIDE}
        if kernels is not None:
            tail = {TAIL: kernels, BACKWARD[1]: Counts()}
            counted[f"{OURS}, compiled"] = counted[OURS] | tail
        sums = {name: sum(parts.values(), Counts()) for name, parts in counted.items()}
        rows = [[part, *(x[part].operators for x in counted.values())] for part in PARTS]
        rows.append(["sum", *(f"{x.operators:,}" for x in sums.values())])
        rows.append(["waits", *(x.waits for x in sums.values())])
        rows.append(["copies to the GPU", *(x.to_gpu for x in sums.values())])
        rows.append(["copies to the host", *(x.to_host for x in sums.values())])
        print(
            f"\noperators of a training step, {precision}; {case.batch} images of "
            f"{case.height} x {case.width} with {case.boxes} boxes each\n"
        )
        print(table(["", *counted], rows))
        report[precision] = {
            name: {part: vars(counts) for part, counts in parts.items()}
            for name, parts in counted.items()
        }
    return report
