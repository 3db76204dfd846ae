"""Names of older versions, which work until 0.4.0 with a DeprecationWarning.

Classes warn of their old attributes themselves, with :func:`warn`.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SELECT = "the method select, as docs/own_assigner.md shows, with atss.assigners"
# Old name -> new name; after a blank what to write instead, if that is not the new name.
NAMES = {
    "atss.analysis.pictures.draw": "atss.analysis.pictures.draw_detections",
    "atss.assigners.cuts.Cheapest": (
        f"atss.assigners.legacy.Cheapest {_SELECT}.matching.select_cheapest"
    ),
    "atss.assigners.cuts.DynamicK": f"atss.assigners.legacy.DynamicK {_SELECT}.sim_ota.dynamic_k",
    "atss.assigners.matching.class_cost": "atss.assigners.pairs.class_cost",
    "atss.assigners.matching.overlap": (
        "atss.assigners.legacy.overlap a method that returns pairs.overlap"
    ),
    "atss.assigners.pairs.INSIDE_MARGIN": "atss.assigners.locations.INSIDE_MARGIN",
    "atss.assigners.pairs.all_anchors": "atss.assigners.locations.all_anchors",
    "atss.assigners.pairs.nearest_locations": "atss.assigners.locations.nearest_locations",
    "atss.assigners.pairs.resolve": (
        "atss.assigners.legacy.resolve atss.assigners.conflicts.assign_best"
    ),
    "atss.assigners.scene.Pairs": "atss.assigners.lists.ListPairs",
    "atss.assigners.scene.Scene": "atss.assigners.lists.Lists",
    "atss.assigners.scene.Segments": "atss.assigners.segments.Segments",
    "atss.assigners.scene.alignment": "atss.assigners.pairs.alignment",
    "atss.config.checks.naming": "atss.config.checks.rename_errors",
    "atss.data.check.page": "atss.labels.check.format_report",
    "atss.data.columns.Listed": "atss.data.records.Listed",
    "atss.data.columns.Records": "atss.data.records.Records",
    "atss.data.columns.Registered": "atss.data.records.Registered",
    "atss.data.formats.read": "atss.labels.formats.read_labels",
    "atss.data.images.naming": "atss.data.images.blame_file",
    "atss.data.images.problems": "atss.labels.headers.problems",
    "atss.data.images.read": "atss.data.images.read_image",
    "atss.data.images.read_header": "atss.labels.headers.read_header",
    "atss.data.images.verify": "atss.labels.headers.verify",
    "atss.data.samplers.page": "atss.data.samplers.format_report",
    "atss.data.splits.page": "atss.labels.splits.format_report",
    "atss.engine.best.Standing": "atss.engine.best.BestRecord",
    "atss.engine.exchange.Exchange": "atss.engine.all_gather.ScalarAllGather",
    "atss.engine.outlook.Outlook": "atss.engine.estimate.TrainingEstimate",
    "atss.losses.CLS_LOSSES": "atss.modeling.registry.CLS_LOSSES",
    "atss.modeling.DistributionFocal": "atss.modeling.terms.DistributionFocalLoss",
    "atss.modeling.GIoU": "atss.modeling.terms.GIoULoss",
    "atss.modeling.IoU": "atss.modeling.terms.IoULoss",
    "atss.modeling.NWD": "atss.modeling.terms.NWDLoss",
    "atss.modeling.SmoothL1": "atss.modeling.terms.SmoothL1Loss",
    "atss.modeling.head.Together": "atss.modeling.head.FusedConvs",
    "atss.modeling.head.through": "atss.modeling.head.run_tower",
    "atss.modeling.terms.DistributionFocal": "atss.modeling.terms.DistributionFocalLoss",
    "atss.modeling.terms.GIoU": "atss.modeling.terms.GIoULoss",
    "atss.modeling.terms.IoU": "atss.modeling.terms.IoULoss",
    "atss.modeling.terms.NWD": "atss.modeling.terms.NWDLoss",
    "atss.modeling.terms.SmoothL1": "atss.modeling.terms.SmoothL1Loss",
    "atss.parts.Parts": "atss.registry.Registry",
    "atss.parts.WrongValue": "atss.errors.WrongValue",
    "atss.parts.one_of": "atss.errors.check_choice",
    "atss.parts.within": "atss.errors.check_range",
    "atss.weights.read": "atss.weights.load_weights",
}
# Old module -> new module, which has the names that are not in NAMES.
MODULES = {
    "atss.assigners.cuts": "atss.assigners.legacy",
    "atss.assigners.scene": "atss.assigners.lists",
    "atss.config.read": "atss.config.files",
    "atss.data.check": "atss.labels.check",
    "atss.data.choice": "atss.labels.classes",
    "atss.data.coco_json": "atss.labels.coco",
    "atss.data.copies": "atss.labels.copies",
    "atss.data.digits": "atss.analysis.digits",
    "atss.data.findings": "atss.labels.findings",
    "atss.data.folders": "atss.labels.folders",
    "atss.data.formats": "atss.labels.formats",
    "atss.data.lvis": "atss.labels.lvis",
    "atss.data.splits": "atss.labels.splits",
    "atss.data.voc": "atss.labels.voc",
    "atss.data.yolo": "atss.labels.yolo",
    "atss.engine.exchange": "atss.engine.all_gather",
    "atss.engine.outlook": "atss.engine.estimate",
    "atss.parts": "atss.registry",
}


def renamed_names(module: str) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module that names have left."""

    def find(name: str) -> Any:
        old = f"{module}.{name}"
        if old not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target, _, instead = NAMES[old].partition(" ")
        warn(old, instead or target)
        place, _, new = target.rpartition(".")
        return getattr(importlib.import_module(place), new)

    return find


def warn(name: str, instead: str) -> None:
    """Warn about a name. The warning shows the line that calls the caller."""
    message = f"{name} is deprecated and goes with version 0.4.0: use {instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class OldModules(MetaPathFinder, Loader):
    """Imports the modules of MODULES. Their names are looked up in NAMES, then in the new module,
    each with a warning."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MODULES[module.__name__]

        def find(name: str) -> Any:
            if f"{old}.{name}" in NAMES:
                return renamed_names(old)(name)
            value = getattr(importlib.import_module(new), name)
            if not name.startswith("__"):  # those are the import system's questions
                warn(f"{old}.{name}", f"{new}.{name}")
            return value

        module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.append(OldModules())
