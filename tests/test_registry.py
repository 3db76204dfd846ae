import copy
import pickle
from dataclasses import dataclass

import pytest
from conftest import make_cfg
from detectron2.config import CfgNode

from atss import modeling
from atss.errors import Checked, UserError, WrongValue, arg, check_range
from atss.registry import Registry, lookup_key


@dataclass(frozen=True)
class Sharp:
    """A part with an own key, a shared key and an injected argument."""

    width: int
    power: float = 2.0
    share: float = 0.5

    def __post_init__(self):
        check_range("power", self.power, 0, 10)
        if self.share > self.power:
            raise ValueError("a share greater than the power")


def plain(x):
    return x


def kind_of(**options) -> Registry:
    kind = Registry("SHAPE", injected=("width",), **options)
    kind.register(Sharp, name="sharp", keys={"power": "OLD_POWER"})
    kind.register(plain)
    return kind


def node_of(kind: Registry, default: str = "sharp", **values) -> CfgNode:
    node = CfgNode({"OLD_POWER": 2.0})
    node.BRANCH = CfgNode(new_allowed=True)
    kind.add_keys(node, default)
    for key, value in values.items():
        node[key] = value
    return node


def test_signature_gives_keys_and_defaults():
    node = node_of(kind_of())
    assert node == {
        "BRANCH": {},
        "SHAPE": "sharp",
        "SHAPES": {"sharp": {"SHARE": 0.5}},
        "OLD_POWER": 2.0,
    }
    assert kind_of().build(node, width=3) == Sharp(3, 2.0, 0.5)
    node.OLD_POWER, node.SHAPES.sharp.SHARE = 4.0, 0.25
    assert kind_of().build(node, width=3) == Sharp(3, 4.0, 0.25)
    assert kind_of().build(node_of(kind_of(), "plain")) is plain


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda node: node.update(SHAPE="round"),
            r"unknown MODEL\.ATSS\.SHAPE 'round': choose from \['plain', 'sharp'\]",
        ),
        (
            lambda node: node.SHAPES.sharp.update(SHARES=1),
            r"ATSS\.SHAPES\.sharp\.SHARES is no .* of sharp: choose from \['POWER', 'SHARE'\]",
        ),
        (
            lambda node: node.SHAPES.sharp.update(POWER=-1),
            r"^MODEL\.ATSS\.OLD_POWER must be between 0 and 10, got -1",
        ),
        (
            lambda node: node.SHAPES.sharp.update(WIDTH=1),
            r"MODEL\.ATSS\.SHAPES\.sharp\.WIDTH is no argument of sharp",
        ),
        (
            lambda node: node.update(OLD_POWER=11),
            r"^MODEL\.ATSS\.OLD_POWER must be between 0 and 10, got 11",
        ),
        (
            lambda node: node.SHAPES.sharp.update(SHARE=9.0),
            r"MODEL\.ATSS\.SHAPE sharp cannot be used: a share greater than the power",
        ),
    ],
)
def test_wrong_value_is_reported_with_its_key(change, sentence):
    node = node_of(kind_of())
    change(node)
    with pytest.raises(ValueError, match=sentence):
        kind_of().build(node, width=3)


def test_bug_in_a_part_keeps_its_error():
    class Broken:
        def __init__(self):
            self.x = {}["nothing"]

    kind = kind_of()
    kind.register(Broken)
    with pytest.raises(KeyError, match="nothing"):
        kind.build(node_of(kind, "Broken"))


def test_missing_injected_argument_is_reported():
    with pytest.raises(ValueError, match=r"SHAPE sharp requires width, which is neither a key nor"):
        kind_of().build(node_of(kind_of()))


def test_duplicate_names_and_function_arguments_are_errors():
    kind = kind_of()
    with pytest.raises(ValueError, match="SHAPE plain is already registered"):
        kind.register(plain)

    def with_argument(x, y=3):
        return x + y

    with pytest.raises(ValueError, match="function with an argument y: a part with arguments must"):
        kind.register(with_argument)


def test_dataclass_above_register_is_an_error():
    kind = Registry("SHAPE")

    @dataclass
    @kind.register()
    class Swapped(Checked):
        power: float = 2.0

    with pytest.raises(UserError, match=r"Swapped was .* @dataclass must be directly ab"):
        kind.build(node_of(kind, "Swapped"))


@pytest.mark.parametrize("parentheses", [False, True])
def test_registers_as_a_decorator(parentheses):
    kind = Registry("SHAPE")

    def flat(x):
        return x

    assert (kind.register()(flat) if parentheses else kind.register(flat)) is flat
    assert dict(kind) == {"flat": flat}


def test_shared_key_has_one_default():
    kind = kind_of()

    @dataclass
    class Blunt:
        power: float = 3.0

    kind.register(Blunt, keys={"power": "OLD_POWER"})
    with pytest.raises(
        ValueError, match=r"OLD_POWER must be 3\.0, the default of SHAPE Blunt, got 2\.0"
    ):
        node_of(kind)
    with pytest.raises(KeyError, match="OLD_POWER"):
        kind_of().add_keys(CfgNode(), "sharp")


def test_own_key_overrides_shared_key():
    node = node_of(kind_of())
    node.SHAPES.sharp.POWER = 5.0
    assert kind_of().build(node, width=1) == Sharp(1, 5.0)


def test_optional_and_several_parts():
    optional = kind_of(optional=True)
    assert optional.build(node_of(optional, "")) is None
    several = kind_of(several=True, optional=True)
    node = node_of(several, "plain + sharp")
    built = several.build(node, width=1)
    assert built == {"plain": plain, "sharp": Sharp(1)}
    assert list(built) == ["plain", "sharp"]
    assert several.build(node_of(several, "")) == {}
    for names, sentence in (
        ("plain + ", "unknown MODEL.ATSS.SHAPE 'plain [+] ': choose from"),
        ("plain+plain", "names plain t"),
    ):
        with pytest.raises(ValueError, match=sentence):
            several.build(node_of(several, names))


def test_argument_names_a_nested_part():
    shapes, frames = kind_of(), Registry("FRAME", injected=("width",))

    @dataclass(frozen=True)
    class Frame:
        shape: object = plain
        size: int = 1

    frames.register(Frame, parts={"shape": shapes})
    node = node_of(shapes)
    frames.add_keys(node, "Frame")
    assert node.FRAMES.Frame == {"SHAPE": "plain", "SIZE": 1}
    assert frames.build(node) == Frame(plain)
    node.FRAMES.Frame.SHAPE = "sharp"
    assert frames.build(node, width=2) == Frame(Sharp(2))
    # An overlay holds the same part with other arguments.
    node.BRANCH.other = CfgNode({"OLD_POWER": 5.0})
    node.FRAMES.Frame.SHAPE = "other"
    with pytest.raises(ValueError, match=r"SHAPE is 'other': .*BRANCH\.other sets no SHAPE"):
        frames.build(node, width=2)
    node.BRANCH.other.SHAPE = "sharp"
    assert frames.build(node, width=2) == Frame(Sharp(2, 5.0))
    assert list(frames.chosen(node)) == [(frames, "Frame"), (shapes, "sharp")]
    node.FRAMES.Frame.SHAPE = "round"
    known = r"\['other', 'plain', 'sharp'\]"
    with pytest.raises(
        ValueError, match=rf"unknown MODEL\.ATSS\.FRAMES\.Frame\.SHAPE 'round': choose from {known}"
    ):
        frames.build(node)


def test_part_cannot_contain_itself():
    kind = Registry("SHAPE")

    @dataclass(frozen=True)
    class Twice:
        inner: object = None

    kind.register(plain)
    kind.register(Twice, parts={"inner": kind})
    node = node_of(kind, "Twice")
    assert kind.build(node) == Twice(None)
    node.SHAPES.Twice.INNER = "plain"
    assert kind.build(node) == Twice(plain)
    node.SHAPES.Twice.INNER = "Twice"
    with pytest.raises(ValueError, match=r"SHAPES\.Twice\.INNER 'Twice' is Twice itself"):
        kind.build(node)


@dataclass(frozen=True)
class Bounded(Checked):
    share: float = arg(0.5, low=0, high=1)
    side: str = arg("left", choices=("left", "right"))


@dataclass(frozen=True)
class Narrow(Bounded):
    share: float = arg(0.2, low=0.1, high=0.3)

    def __post_init__(self):
        super().__post_init__()
        if self.side == "right":
            raise ValueError("no right side")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.5}, r"share must be between 0 and 1, got 1\.5"),
        ({"share": float("nan")}, "share must be between 0 and 1, got nan"),
        ({"share": "half"}, "share must be between 0 and 1, got 'half'"),
        ({"side": "up"}, r"side is 'up': choose from \['left', 'right'\]"),
    ],
)
def test_bounds_are_checked_in_python_and_config(values, message):
    with pytest.raises(WrongValue, match=f"^{message}$"):
        Bounded(**values)
    kind = Registry("SHAPE")
    kind.register(Bounded)
    node = node_of(kind, "Bounded")
    assert kind.build(node) == Bounded()
    ((argument, value),) = values.items()
    node.SHAPES.Bounded[argument.upper()] = value
    with pytest.raises(UserError, match=rf"^MODEL\.ATSS\.SHAPES\.Bounded\.{argument.upper()} "):
        kind.build(node)


def test_bounds_are_inherited_and_overridden():
    assert Narrow().share == 0.2
    for values in ({"share": 0.5}, {"side": "up"}, {"side": "right"}):
        with pytest.raises(ValueError):  # noqa: PT011
            Narrow(**values)
    for copied in (copy.deepcopy(Narrow(0.25)), pickle.loads(pickle.dumps(Narrow(0.25)))):
        assert copied == Narrow(0.25)


@pytest.mark.parametrize("part", [modeling.CRITERION, modeling.POSTPROCESSOR])
def test_defaults_in_python_are_those_of_the_keys(part):
    node = make_cfg(config="ATSS_R_50_FPN_1x.yaml").MODEL.ATSS
    shared = {x: lookup_key(node, key) for x, key in part.keys.items()}
    # The default None of the box terms is GIoU; an injected argument has no default.
    assert shared.items() - part.defaults.items() <= {("box_terms", "giou"), ("level_weight", "")}


def test_wrong_value_can_be_pickled():
    error = pickle.loads(pickle.dumps(WrongValue("top_k", "must be >= 1, got 0")))
    assert (str(error), error.argument) == ("top_k must be >= 1, got 0", "top_k")


def test_notebook_shows_a_message_without_a_traceback():
    """By IPython's hook."""
    error = WrongValue("MODEL.ATSS.K", "must be >= 1, got 0")
    assert error._render_traceback_() == ["WrongValue: MODEL.ATSS.K must be >= 1, got 0"]
