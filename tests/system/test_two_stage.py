"""Runs of train_net.py with Detectron2's detectors of two stages."""

import json
import math
from pathlib import Path

import export
import pytest
import torch
from conftest import NARROW
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from trainings import flatten, forget, train

import atss.engine.run as way_in
from atss import Predictor, load_config
from atss.checkpoints import SafeCheckpointer
from atss.data import datasets
from atss.engine.evaluation import build_evaluator

SHORT = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ATSS.NUM_CONVS": 1,
    "MODEL.ROI_HEADS.NUM_CLASSES": -1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "DATASETS.TRAIN": ("ellipses",),
    "DATASETS.TEST": ("ellipses",),
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": (64, 80),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "SEED": 1,
}


@pytest.fixture(scope="module")
def ellipses(squares, tmp_path_factory):
    """The squares' boxes, with ellipses as masks."""
    content = json.loads((squares / "annotations.json").read_text())
    angles = [2 * math.pi * i / 24 for i in range(24)]
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        points = ((1 + math.cos(a), 1 + math.sin(a)) for a in angles)
        annotation["segmentation"] = [
            [v for p, q in points for v in (x + p * w / 2, y + q * h / 2)]
        ]
    file = tmp_path_factory.mktemp("ellipses") / "ellipses.json"
    file.write_text(json.dumps(content))
    return f"ellipses={file}:{squares}/images"


def arguments(source, output, config, *options, **opts):
    values = SHORT | {"OUTPUT_DIR": output} | opts
    return [
        *("--config-file", f"two_stage/{config}", "--register", source, *options),
        *flatten(values),
        *map(str, NARROW[2:]),
    ]


MASKS = "Mask_R_50_FPN_1x_ATSS_first_stage"


@pytest.mark.slow
def test_masks_resume_bit_for_bit(ellipses, tmp_path):
    whole = train(arguments(ellipses, tmp_path / "whole", MASKS))
    forget("ellipses")
    first = train(arguments(ellipses, tmp_path / "out", MASKS), stop_after=1)
    forget("ellipses")
    rest = train(arguments(ellipses, tmp_path / "out", MASKS, "--resume"))
    assert first | rest == whole


def test_masks_train_evaluate_and_predict(ellipses, tmp_path):
    train(arguments(ellipses, tmp_path / "out", MASKS, **{"SOLVER.MAX_ITER": 2}))
    metrics = {}
    for line in (tmp_path / "out/metrics.json").read_text().splitlines():
        metrics |= json.loads(line)
    for name in ("loss_mask", "loss_box_reg", "loss_rpn_loc", "loss_rpn_centerness"):
        assert math.isfinite(metrics[name])
    assert {"bbox/AP", "segm/AP"} <= metrics.keys()
    config = (tmp_path / "out/config.yaml").read_text()
    assert "CLASS_NAMES:\n    - blue\n    - orange" in config
    predictor = Predictor(tmp_path / "out")
    assert predictor.names == ["blue", "orange"]
    image = ellipses.partition(":")[2] + "/0.png"
    assert predictor(image).boxes.shape[1] == 4

    with pytest.raises(SystemExit, match="error: only an ATSSDetector can be exported"):
        export.main([str(tmp_path / "out"), "--output", str(tmp_path / "out.onnx")])
    forget("ellipses")
    weights = {"MODEL.WEIGHTS": tmp_path / "out/model_final.pth"}
    values = weights | {
        "MODEL.META_ARCHITECTURE": "ProposalNetwork",
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    }
    argv = arguments(ellipses, tmp_path / "recall", MASKS, "--eval-only", **values)
    args = way_in.make_parser().parse_args(argv)
    results = way_in.run(args, way_in.prepare(args))
    assert {*results["box_proposals"]} == {"AR@100", "AR@300", "AR@1000"}


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [(80, "MODEL.ROI_HEADS.NUM_CLASSES is 80, but data set ellipses has 2")],
)
def test_number_of_classes_is_compared_with_the_data(ellipses, tmp_path, classes, sentence):
    argv = arguments(ellipses, tmp_path, MASKS, **{"MODEL.ROI_HEADS.NUM_CLASSES": classes})
    with pytest.raises(ValueError, match=sentence):
        way_in.prepare(way_in.make_parser().parse_args(argv))


@pytest.mark.parametrize("name", ["Mask_R_50_FPN_1x_ATSS_RPN", MASKS])
def test_checkpoint_of_detectron2_loads_where_names_fit(name, tmp_path, caplog):
    """The log lists what begins anew."""
    opts = ["MODEL.DEVICE", "cpu", *map(str, NARROW), "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
    opts += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.FPN.OUT_CHANNELS", 32]
    theirs = build_model(load_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", opts=opts))
    weights = theirs.state_dict()
    torch.save({"model": weights, "__author__": "Detectron2"}, tmp_path / "theirs.pth")
    ours = build_model(load_config(f"two_stage/{name}", opts=opts))
    before = {k: x.clone() for k, x in ours.state_dict().items()}
    SafeCheckpointer(ours).load(str(tmp_path / "theirs.pth"))
    anew = []
    for key, value in ours.state_dict().items():
        if key in weights:
            assert torch.equal(value, weights[key]), key
        else:
            assert torch.equal(value, before[key])
            anew.append(key)
    assert bool(anew) == (name == MASKS)
    assert all(x.startswith(("proposal_generator.", "backbone.top_block.")) for x in anew)
    for part in {x.rpartition(".")[0] for x in anew}:
        assert part in caplog.text


def test_recall_counts_images_without_proposals(ellipses, tmp_path):
    """Detectron2's evaluator skips them."""
    datasets.register(ellipses)
    cfg = load_config("two_stage/Faster_R_50_FPN_1x_ATSS_RPN", opts=["OUTPUT_DIR", str(tmp_path)])
    content = json.loads(Path(ellipses.partition("=")[2].partition(":")[0]).read_text())
    far = torch.tensor([[120.0, 90.0, 127.0, 95.0]]).repeat(150, 1)
    for found, recall in ((range(8), 100.0), (range(3), 100 * 9 / 21), ((), 0.0)):
        evaluator = build_evaluator(cfg, "ellipses")
        evaluator.reset()
        for image in content["images"]:
            boxes = torch.zeros(0, 4)
            if image["id"] in found:
                of_image = [
                    x["bbox"] for x in content["annotations"] if x["image_id"] == image["id"]
                ]
                boxes = torch.tensor(of_image).reshape(-1, 4).float()
                boxes[:, 2:] += boxes[:, :2]
                boxes = torch.cat([boxes, far])
            logits = torch.linspace(0, 9, len(boxes))
            proposals = Instances((96, 128), proposal_boxes=Boxes(boxes), objectness_logits=logits)
            evaluator.process([{"image_id": image["id"]}], [{"proposals": proposals}])
        measured = evaluator.evaluate()["box_proposals"]
        assert measured["AR@300"] == measured["AR@1000"] == pytest.approx(recall, abs=1e-3)
        assert measured["AR@100"] < 50  # the objects rank behind 150 others
