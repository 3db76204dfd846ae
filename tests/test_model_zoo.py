import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from atss import model_zoo
from atss.checkpoints import DETECTORS
from atss.config import read


def test_configs_by_name():
    cfg = model_zoo.get_config("tables/atss_k3")
    assert cfg.MODEL.ATSS.ASSIGNERS.ATSS.TOP_K == 3
    assert model_zoo.get_config_file("ATSS_R_50_FPN_1x.yaml").endswith("ATSS_R_50_FPN_1x.yaml")
    with pytest.raises(ValueError, match=r"no config 'ATSS_R_51'; known are .*tables/ssc_box"):
        model_zoo.get_config("ATSS_R_51")


def test_published_weights_are_those_of_the_page():
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


def test_without_a_gpu_models_are_on_the_cpu(monkeypatch):
    small = model_zoo.get_config("ATSS_R_18_FPN_small")
    small.MODEL.ATSS.NUM_CLASSES, small.MODEL.FPN.OUT_CHANNELS = 3, 64
    small.DATASETS.TRAIN = small.DATASETS.TEST = ()
    assert small.MODEL.DEVICE == "cuda"
    monkeypatch.setattr(model_zoo, "get_config", lambda name: small.clone())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_zoo.get("ATSS_R_18_FPN_small").device.type == "cpu"


def test_all_folders_that_are_installed_are_packages():
    """Without an __init__.py, Python does not find what an editable install maps elsewhere."""
    folders = re.search(r"package_dir=({.*?})", (ROOT / "setup.py").read_text())[1]
    folders = ast.literal_eval(folders)
    assert folders.pop("") == "projects/ATSS"
    assert "atss.configs" in folders
    for folder in folders.values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_an_installation_at_the_root(monkeypatch):
    """pip install --target /app: there is no folder of the project above the package."""
    for package, found in (("/app/atss", "/app/atss/configs"), ("/p/q/r/s/atss", "/p/q/configs")):
        monkeypatch.setattr(read, "__file__", f"{package}/config/read.py")
        monkeypatch.setattr(Path, "resolve", lambda self: self)
        monkeypatch.setattr(Path, "is_file", lambda self, found=found: str(self.parent) == found)
        assert read.config_folder() == Path(found)
