"""Where the checks run, what they find, and what several of them need."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.model import Case, random_batch
from benchmarks.peers import NUM_CLASSES
from detectron2.config import CfgNode

from atss import load_config, model_zoo
from atss.config import config_names

ROOT = Path(__file__).resolve().parents[2]
# What others are made of, or what is laid over them.
RECIPES = ("Base-ATSS", "small", "ablation", "digits", "fine_tune", "fine_tune_coco")


@dataclass(frozen=True)
class Setting:
    """
    Attributes:
        device: "cuda" or "cpu".
        small: thin networks on small images, to try the checks themselves.
        folder: for what they write.
    """

    device: str
    small: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Besides fp32."""
        return ("bf16", "fp16") if self.on_gpu else ("bf16",)

    @property
    def configs(self) -> list[str]:
        """Names of those that are trained as they stand."""
        trained = [name for name in config_names() if name not in RECIPES]
        return trained[::16] if self.small else trained

    def options(self, *options: object) -> list[str]:
        """Over any config: random weights, no data."""
        thin: tuple[object, ...] = ()
        if self.small:
            thin = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ATSS.NUM_CONVS", 1)
        fixed = (
            *("MODEL.DEVICE", self.device, "MODEL.WEIGHTS", "", "SEED", 1),
            *("MODEL.ATSS.NUM_CLASSES", NUM_CLASSES, "MODEL.TIMM.PRETRAINED", False),
            *("DATASETS.TRAIN", "()", "DATASETS.TEST", "()"),
        )
        return [str(x) for x in (*fixed, *thin, *options)]

    def config(self, name: str, *options: object) -> CfgNode:
        """A config for random images."""
        return load_config(model_zoo.get_config_file(name), opts=self.options(*options))

    def images(self, count: int, hw: Sequence[int], objects: int = 7) -> list[dict]:
        """Noise with random boxes, in Detectron2's format."""
        case = Case("fp32", False, count, *hw, objects, self.device, "")
        return random_batch(case)

    def case(self, precision: str, config: str, objects: int = 7, batch: int = 2) -> Case:
        """What tools/benchmark.py measures, two images of COCO's usual size."""
        height, width = (96, 128) if self.small else (800, 1344)
        file = model_zoo.get_config_file(config)
        thin = tuple(self.options()) if self.small else ()
        return Case(
            *(precision, precision != "fp32", batch, height, width, objects, self.device, file),
            options=thin,
        )

    def command(self, *words: object) -> list[str]:
        """A Python command with the libraries of this process."""
        return [sys.executable, "-W", "ignore", *map(str, words)]


@dataclass
class Finding:
    """What a check says.

    Attributes:
        passed: whether all is as it should be; None for a mere measurement.
        said: in a few words.
        figures: for the report.
    """

    passed: bool | None
    said: str
    figures: dict = field(default_factory=dict)
