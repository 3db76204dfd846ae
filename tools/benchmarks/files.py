"""Exported files beside the detector that they were made of, on noise."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model

import atss_runner
from atss.config import for_inference, load_config
from atss.modeling import ATSSDetector
from atss.predictor import find_run

from .timing import Seconds, in_turn

CPU = torch.device("cpu")


def networks(
    run: str, files: Sequence[str], size: tuple[int, int], runs: int, threads: int
) -> dict[str, Seconds]:
    """Time one image through the network: eager in float32 and bfloat16, and each file.

    Args:
        run: folder of a training, or a config; weights do not matter.
        size: (height, width) of the canvas.
        threads: of torch and of the engines.
    """
    torch.set_num_threads(threads)
    cfg = for_inference(load_config(find_run(run, "unused")[0], opts=["MODEL.DEVICE", "cpu"]))
    model = build_model(cfg).eval()
    assert isinstance(model, ATSSDetector)
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 255

    def eager(dtype: torch.dtype | None) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                model.raw(pixels)

        return call

    functions = {"eager, fp32": eager(None), "eager, bf16": eager(torch.bfloat16)}
    sizes = np.array([size])
    for file in files:
        loaded = atss_runner.load(file, threads)
        functions[Path(file).name] = lambda x=loaded: x.outputs(pixels.numpy(), sizes)
    return in_turn(functions, runs, CPU)


def around(file: str, candidates: Sequence[int], runs: int, threads: int) -> dict[str, Seconds]:
    """Time a file's network, and the runner's work before and after it, on a random image.

    Args:
        candidates: numbers of pairs of anchor and class above the threshold.
    """
    detector = atss_runner.load(file, threads)
    short = detector.size[0]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (short * 3 // 2, short * 2, 3), dtype=np.uint8)
    pixels = detector.pixels(image)
    canvas = pixels.shape[2:]
    outputs = {
        name: values[0] for name, values in detector.outputs(pixels, np.array([canvas])).items()
    }
    functions: dict[str, Callable[[], object]] = {
        "before": lambda: detector.pixels(image),
        "network": lambda: detector.outputs(pixels, np.array([canvas])),
    }
    for count in candidates:
        made = np.zeros_like(outputs["probabilities"])
        chosen = rng.permutation(made.size)[:count]
        made.flat[chosen] = rng.uniform(0.1, 1, len(chosen))
        functions[f"after, {len(chosen)} candidates"] = lambda x=made: detector.detections(
            outputs | {"probabilities": x}, canvas, canvas, image.shape[:2]
        )
    return in_turn(functions, runs, CPU)
