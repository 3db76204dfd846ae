import pytest
import torch

from atss import model_zoo


def test_configs_by_name():
    cfg = model_zoo.get_config("tables/atss_k3")
    assert cfg.MODEL.ATSS.ASSIGNERS.ATSS.TOP_K == 3
    assert model_zoo.get_config_file("ATSS_R_50_FPN_1x.yaml").endswith("ATSS_R_50_FPN_1x.yaml")
    with pytest.raises(ValueError, match=r"no config 'ATSS_R_51'; known are .*tables/ssc_box"):
        model_zoo.get_config("ATSS_R_51")


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
