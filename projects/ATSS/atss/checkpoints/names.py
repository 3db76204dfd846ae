"""Parameter names of the authors' code, of mmdet and of this project, as patterns.

A table is a list of (pattern, replacement). The first pattern that matches the whole name counts;
its replacement is a template, a function of the match, or None to drop the entry.
"""

import re
from collections.abc import Callable, Mapping

Rule = tuple[str, str | Callable[[re.Match], str] | None]

_HEAD = {"cls": "cls_subnet", "bbox": "bbox_subnet", "reg": "bbox_subnet"}


def _plus_one(text: str) -> int:
    return int(text) + 1


def _resnet(root: str, offset: str, plain: str) -> list[Rule]:
    """Return the rules for the stages of a ResNet.

    Args:
        root: pattern of their module.
        offset, plain: names of a deformable convolution's offset predictor, and of itself.
    """
    stage = rf"{root}\.layer(\d)\.(\d+)\."

    def block(tail: str) -> Callable[[re.Match], str]:
        return lambda m: f"backbone.bottom_up.res{_plus_one(m[1])}.{m[2]}." + m.expand(tail)

    return [
        (stage + rf"conv2\.{offset}\.(\w+)", block(r"conv2_offset.\3")),
        (stage + rf"conv2\.{plain}(weight)", block(r"conv2.\3")),
        (stage + r"(conv\d)\.(weight)", block(r"\3.\4")),
        (stage + r"bn(\d)\.num_batches_tracked", None),
        (stage + r"bn(\d)\.(\w+)", block(r"conv\3.norm.\4")),
        (stage + r"downsample\.0\.(\w+)", block(r"shortcut.\3")),
        (stage + r"downsample\.1\.num_batches_tracked", None),
        (stage + r"downsample\.1\.(\w+)", block(r"shortcut.norm.\3")),
    ]


# Stages of pytorchcv's MobileNetV2 that timm counts as two: {stage: units of the first}. timm's
# stages are counted from 0.
_SPLIT_STAGES = {4: 4, 5: 3}


def _mobilenet_unit(tail: str) -> Callable[[re.Match], str]:
    def rename_unit(m: re.Match) -> str:
        stage, unit = int(m[1]), int(m[2])
        first = _SPLIT_STAGES.get(stage, unit)
        block = stage - 1 + (stage > min(_SPLIT_STAGES)) + (unit > first)
        unit = unit - first if unit > first else unit
        return f"backbone.bottom_up.net.blocks.{block}.{unit - 1}." + m.expand(tail)

    return rename_unit


def _mobilenet() -> list[Rule]:
    """Return the rules for pytorchcv's MobileNetV2, to timm's names."""
    root = r"backbone\.features\."
    net = "backbone.bottom_up.net."
    rules: list[Rule] = [
        (root + r"init_block\.conv\.(weight)", rf"{net}conv_stem.\1"),
        (root + r"init_block\.bn\.(\w+)", rf"{net}bn1.\1"),
    ]
    for i, layer in enumerate(("pw", "dw", "pwl"), 1):
        unit = root + rf"stage(\d)\.unit(\d)\.conv{i}\."
        rules += [
            (unit + r"conv\.(weight)", _mobilenet_unit(rf"conv_{layer}.\3")),
            (unit + r"bn\.(\w+)", _mobilenet_unit(rf"bn{i}.\3")),
        ]
    return rules


OFFICIAL: list[Rule] = [
    (r"rpn\.anchor_generator\.cell_anchors\.\d", None),
    (r"backbone\.body\.stem\.conv1\.(\w+)", r"backbone.bottom_up.stem.conv1.\1"),
    (r"backbone\.body\.stem\.bn1\.(\w+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
    *_resnet(r"backbone\.body", "offset", r"conv\."),
    (
        r"backbone\.fpn\.fpn_inner(\d)\.(\w+)",
        lambda m: f"backbone.fpn_lateral{_plus_one(m[1])}.{m[2]}",
    ),
    (
        r"backbone\.fpn\.fpn_layer(\d)\.(\w+)",
        lambda m: f"backbone.fpn_output{_plus_one(m[1])}.{m[2]}",
    ),
    (r"backbone\.fpn\.top_blocks\.(p[67]\.\w+)", r"backbone.top_block.\1"),
    (
        r"rpn\.head\.(cls|bbox)_tower\.(\d+(?:\.offset|\.conv)?\.\w+)",
        lambda m: f"head.{_HEAD[m[1]]}.{m[2]}",
    ),
    (r"rpn\.head\.cls_logits\.(\w+)", r"head.cls_score.\1"),
    (r"rpn\.head\.bbox_pred\.(\w+)", r"head.bbox_pred.\1"),
    (r"rpn\.head\.centerness\.(\w+)", r"head.ctrness.\1"),
    (r"rpn\.head\.scales\.(\d)\.scale", r"head.scales.\1.scale"),
]

# mmdet counts modules of a tower (convolution, norm, ReLU); we count these layers.
_MMDET: list[Rule] = [
    (r"backbone\.conv1\.(\w+)", r"backbone.bottom_up.stem.conv1.\1"),
    (r"backbone\.bn1\.num_batches_tracked", None),
    (r"backbone\.bn1\.(\w+)", r"backbone.bottom_up.stem.conv1.norm.\1"),
    *_resnet("backbone", "conv_offset", ""),
    *_mobilenet(),
    (
        r"neck\.lateral_convs\.(\d)\.conv\.(\w+)",
        lambda m: f"backbone.fpn_lateral{int(m[1]) + 3}.{m[2]}",
    ),
    (
        r"neck\.fpn_convs\.([012])\.conv\.(\w+)",
        lambda m: f"backbone.fpn_output{int(m[1]) + 3}.{m[2]}",
    ),
    (
        r"neck\.fpn_convs\.([34])\.conv\.(\w+)",
        lambda m: f"backbone.top_block.p{int(m[1]) + 3}.{m[2]}",
    ),
    (
        r"bbox_head\.(cls|reg)_convs\.(\d)\.conv\.conv_offset\.(\w+)",
        lambda m: f"head.{_HEAD[m[1]]}.{3 * int(m[2])}.offset.{m[3]}",
    ),
    (
        r"bbox_head\.(cls|reg)_convs\.(\d)\.conv\.(\w+)",
        lambda m: f"head.{_HEAD[m[1]]}.{3 * int(m[2])}.{m[3]}",
    ),
    (
        r"bbox_head\.(cls|reg)_convs\.(\d)\.gn\.(\w+)",
        lambda m: f"head.{_HEAD[m[1]]}.{3 * int(m[2]) + 1}.{m[3]}",
    ),
    (r"bbox_head\.scales\.(\d)\.scale", r"head.scales.\1.scale"),
    (r"bbox_head\.integral\.project", "box_coder.project"),
]


def mmdet_rules(predictors: Mapping[str, str]) -> list[Rule]:
    return [
        *_MMDET,
        *(
            (rf"bbox_head\.{re.escape(theirs)}\.(\w+)", rf"head.{ours}.\1")
            for ours, theirs in predictors.items()
        ),
    ]


_TOWER = {"cls_subnet": "cls_convs", "bbox_subnet": "reg_convs"}
_STAGE = r"backbone\.bottom_up\.res(\d)\.(\d+)\."


def _layer(tail: str) -> Callable[[re.Match], str]:
    return lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}." + m.expand(tail)


def to_mmdet_rules(lowest: int, laterals: int, predictors: Mapping[str, str]) -> list[Rule]:
    """Return the table to mmdet, whose FPN counts its levels from zero.

    Args:
        lowest: number of the lowest level, 3 for P3.
        laterals: number of levels from stages of the backbone.
        predictors: {our layer of the head: mmdet's}.
    """
    return [
        (r"backbone\.bottom_up\.stem\.conv1\.(weight)", r"backbone.conv1.\1"),
        (r"backbone\.bottom_up\.stem\.conv1\.norm\.(\w+)", r"backbone.bn1.\1"),
        (_STAGE + r"conv2_offset\.(\w+)", _layer(r"conv2.conv_offset.\3")),
        (_STAGE + r"conv(\d)\.norm\.(\w+)", _layer(r"bn\3.\4")),
        (_STAGE + r"(conv\d\.\w+)", _layer(r"\3")),
        (_STAGE + r"shortcut\.norm\.(\w+)", _layer(r"downsample.1.\3")),
        (_STAGE + r"shortcut\.(\w+)", _layer(r"downsample.0.\3")),
        (
            r"backbone\.fpn_lateral(\d)\.(\w+)",
            lambda m: f"neck.lateral_convs.{int(m[1]) - lowest}.conv.{m[2]}",
        ),
        (
            r"backbone\.fpn_output(\d)\.(\w+)",
            lambda m: f"neck.fpn_convs.{int(m[1]) - lowest}.conv.{m[2]}",
        ),
        # The first of the two is named p6 at any level.
        (
            r"backbone\.top_block\.p([67])\.(\w+)",
            lambda m: f"neck.fpn_convs.{int(m[1]) - 6 + laterals}.conv.{m[2]}",
        ),
        (
            r"head\.(\w+_subnet)\.(0|3|6|9)\.offset\.(\w+)",
            lambda m: f"bbox_head.{_TOWER[m[1]]}.{int(m[2]) // 3}.conv.conv_offset.{m[3]}",
        ),
        (
            r"head\.(\w+_subnet)\.(0|3|6|9)\.(?:conv\.)?(\w+)",
            lambda m: f"bbox_head.{_TOWER[m[1]]}.{int(m[2]) // 3}.conv.{m[3]}",
        ),
        (
            r"head\.(\w+_subnet)\.(1|4|7|10)\.(\w+)",
            lambda m: f"bbox_head.{_TOWER[m[1]]}.{int(m[2]) // 3}.gn.{m[3]}",
        ),
        *(
            (rf"head\.{re.escape(ours)}\.(\w+)", rf"bbox_head.{theirs}.\1")
            for ours, theirs in predictors.items()
        ),
        (r"head\.scales\.(\d)\.scale", r"bbox_head.scales.\1.scale"),
        (r"box_coder\.project", "bbox_head.integral.project"),
    ]


def rename(names: list[str], rules: list[Rule]) -> tuple[dict[str, str], list[str]]:
    """Apply a table: {old name: new name}, without dropped names, and names without a match."""
    new, unknown = {}, []
    for name in names:
        for pattern, replacement in rules:
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            if callable(replacement):
                new[name] = replacement(match)
            elif replacement is not None:
                new[name] = match.expand(replacement)
            break
        else:
            unknown.append(name)
    return new, unknown
