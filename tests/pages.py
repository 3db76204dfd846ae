"""The code and the commands of documentation pages."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import ROOT, make_input
from detectron2.modeling import build_model
from torch import nn

from atss import load_config
from atss.config.branches import kinds


@contextmanager
def run_page(page: str) -> Iterator[tuple[dict, list[str]]]:
    """Run the Python of a page; remove the parts that it registers afterwards.

    Yields:
        the names that the code defines, and the text of each yaml of the page.
    """
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    before = [(kind, dict(kind.entries)) for kind in kinds()]
    names: dict = {"__name__": page}
    try:
        for language, code in blocks:
            if language == "python":
                exec(compile(code, page, "exec"), names)
        yield names, [code for language, code in blocks if language == "yaml"]
    finally:
        for kind, entries in before:
            kind.entries = entries


def read_shell(page: str) -> str:
    """Return the blocks of a page but Python, yaml and json, with continued lines joined."""
    text = (ROOT / page).read_text()
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    shell = [
        (x.start(), x[2]) for x in fenced.finditer(text) if x[1] not in ("python", "yaml", "json")
    ]
    rest = fenced.sub(lambda x: "-" * len(x[0]), text)
    indented = [(x.start(), x[0]) for x in re.finditer(r"(?<=\n\n)(?: {4}.*\n)+", rest)]
    return "".join(code for _, code in sorted(shell + indented)).replace("\\\n", " ")


def train(config: Path, code: str) -> nn.Module:
    """Return the model of a page's yaml, after the losses of one step.

    Args:
        config: where the yaml is written.
        code: the text of the yaml.
    """
    config.write_text(code.replace("configs/", f"{ROOT}/configs/"))
    opts = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "")
    opts += ("DATASETS.TRAIN", "()", "DATASETS.TEST", "()", "MODEL.ATSS.NUM_CLASSES", 3)
    model = build_model(load_config(config, opts=opts)).train()
    losses = model([make_input([[20, 20, 90, 80]], [0])])
    assert torch.isfinite(sum(losses.values()))
    return model
