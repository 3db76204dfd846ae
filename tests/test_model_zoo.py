import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import atss.engine.run as way_in
from atss import load_config, model_zoo
from atss.checkpoints import DETECTORS
from atss.config import files


def test_get_config_by_name():
    cfg = model_zoo.get_config("tables/atss_k3")
    assert cfg.MODEL.ATSS.ASSIGNERS.ATSS.TOP_K == 3
    assert model_zoo.get_config_file("ATSS_R_50_FPN_1x.yaml").endswith("ATSS_R_50_FPN_1x.yaml")
    with pytest.raises(
        ValueError, match=r"unknown config 'ATSS_R_51': choose from .*tables/ssc_box"
    ):
        model_zoo.get_config("ATSS_R_51")


def test_zoo_configs_load_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fine.yaml").write_text("_BASE_: [tables/atss_k17.yaml, fine_tune]\n")
    cfg = load_config("fine.yaml")
    assert cfg.MODEL.ATSS.ASSIGNERS.ATSS.TOP_K == 17
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone"
    for name in ("ATSS_R_18_FPN_small", "ATSS_R_18_FPN_small.yaml", Path("ATSS_R_18_FPN_small")):
        assert load_config(name) == model_zoo.get_config("ATSS_R_18_FPN_small")
    # A file of that name precedes the zoo.
    (tmp_path / "fine_tune.yaml").write_text("SEED: 7\n")
    (tmp_path / "own.yaml").write_text("_BASE_: [ATSS_R_50_FPN_1x, fine_tune.yaml]\n")
    cfg = load_config("own.yaml")
    assert cfg.SEED == 7
    assert cfg.MODEL.BACKBONE.NAME == "build_atss_resnet_fpn_backbone"


def test_training_replaces_the_name_by_the_file(squares, tmp_path):
    """Detectron2's setup also opens args.config_file."""
    where = f"zoo={squares}/annotations.json:{squares}/images"
    opts = ["DATASETS.TRAIN", "('zoo',)", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)]
    argv = ["--config-file", "ATSS_R_18_FPN_small", "--register", where, *opts]
    args = way_in.make_parser().parse_args(argv)
    way_in.prepare(args)
    assert args.config_file == model_zoo.get_config_file("ATSS_R_18_FPN_small")


def test_published_weights_equal_the_page():
    page = (ROOT / "MODEL_ZOO.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| `(\S+\.pth)`.* \| ([\d.]+) \|$", page, re.MULTILINE)
    assert [(x.detector, x.file, str(x.ap)) for x in model_zoo.PUBLISHED] == listed
    assert {x.detector for x in model_zoo.PUBLISHED} == {*DETECTORS}


def test_models_with_and_without_weights(tmp_path, monkeypatch):
    small = model_zoo.get_config("ATSS_R_18_FPN_small")
    small.MODEL.ATSS.NUM_CLASSES, small.MODEL.FPN.OUT_CHANNELS = 3, 64
    small.DATASETS.TRAIN = small.DATASETS.TEST = ()
    monkeypatch.setattr(model_zoo, "get_config", lambda name: small.clone())
    model = model_zoo.get("ATSS_R_18_FPN_small", device="cpu")
    assert not model.training
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    again = model_zoo.get("ATSS_R_18_FPN_small", str(tmp_path / "weights.pth"), "cpu")
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_model_is_on_the_cpu_without_a_gpu(monkeypatch):
    small = model_zoo.get_config("ATSS_R_18_FPN_small")
    small.MODEL.ATSS.NUM_CLASSES, small.MODEL.FPN.OUT_CHANNELS = 3, 64
    small.DATASETS.TRAIN = small.DATASETS.TEST = ()
    assert small.MODEL.DEVICE == "cuda"
    monkeypatch.setattr(model_zoo, "get_config", lambda name: small.clone())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_zoo.get("ATSS_R_18_FPN_small").device.type == "cpu"


def test_installed_folders_are_packages():
    """An editable install maps folders, which Python finds only with an __init__.py."""
    folders = re.search(r"package_dir=({.*?})", (ROOT / "setup.py").read_text())[1]
    folders = ast.literal_eval(folders)
    assert folders.pop("") == "projects/ATSS"
    assert "atss.configs" in folders
    for folder in folders.values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_every_tool_of_a_wheel_prints_its_help(tmp_path):
    """Without the checkout, after `import atss` only."""
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True)
    script = """
import pkgutil, runpy, sys
import atss
print(atss.__file__)
print(atss.model_zoo.get_config_file("ATSS_R_18_FPN_small"))
sys.argv = ["tool", "--help"]
for module in pkgutil.walk_packages(atss.__path__, "atss."):
    if module.name.startswith("atss.tools."):
        print(module.name)
        try:
            runpy.run_module(module.name, run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, stop.code
"""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package, config, *helps = done.stdout.splitlines()
    assert package == f"{tmp_path}/atss/__init__.py"
    assert config == f"{tmp_path}/atss/configs/ATSS_R_18_FPN_small.yaml"
    tools = {path.stem for path in ROOT.glob("tools/*.py")} - {"__init__", "benchmark"}
    assert {x.removeprefix("atss.tools.") for x in helps if x.startswith("atss.tools.")} == tools


def test_config_folder_of_an_installation_at_the_root(monkeypatch):
    """As with pip install --target /app: no project folder above the package."""
    for package, found in (("/app/atss", "/app/atss/configs"), ("/p/q/r/s/atss", "/p/q/configs")):
        monkeypatch.setattr(files, "__file__", f"{package}/config/files.py")
        monkeypatch.setattr(Path, "resolve", lambda self: self)
        monkeypatch.setattr(Path, "is_file", lambda self, found=found: str(self.parent) == found)
        assert files.config_folder() == Path(found)
