"""Names of older versions, which work until 0.4.0 with a DeprecationWarning."""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SELECT = "the method select, as docs/own_assigner.md shows, with atss.assigners"
# Old name -> new name. Text after a blank replaces the new name in the warning.
NAMES = {
    "atss.analysis.files.try_to_write": "atss.errors.check_writable",
    "atss.analysis.pictures.annotate": "atss_runner.annotate.annotate",
    "atss.analysis.pictures.as_records": "atss_runner.detections.as_records",
    "atss.analysis.pictures.draw": "atss_runner.detections.draw_detections",
    "atss.analysis.pictures.image_ids": "atss_runner.annotate.image_ids",
    "atss.analysis.pictures.targets": "atss_runner.annotate.targets",
    "atss.assigners.cuts.Cheapest": (
        f"atss.assigners.legacy.Cheapest {_SELECT}.matching.select_cheapest"
    ),
    "atss.assigners.cuts.DynamicK": f"atss.assigners.legacy.DynamicK {_SELECT}.sim_ota.dynamic_k",
    "atss.assigners.matching.class_cost": "atss.assigners.pairs.class_cost",
    "atss.assigners.matching.overlap": (
        "atss.assigners.legacy.overlap a method that returns pairs.similarity"
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
    "atss.data.images.provide": "atss.data.images.register_handler",
    "atss.data.images.read": "atss.data.images.read_image",
    "atss.data.samplers.page": "atss.data.samplers.format_report",
    "atss.data.splits.page": "atss.labels.splits.format_report",
    "atss.engine.agreement.OF_A_MACHINE": "atss.engine.agreement.MACHINE_KEYS",
    "atss.engine.best.Standing": "atss.engine.best.BestRecord",
    "atss.engine.evaluation.Awaited": "atss.engine.evaluation.PatientEvaluator",
    "atss.engine.exchange.Exchange": "atss.engine.all_gather.ScalarAllGather",
    "atss.engine.hooks.AllLeave": "atss.engine.hooks.GroupExit",
    "atss.engine.launch.NO_SHARED_MEMORY": "atss.engine.explain.SHARED_MEMORY_FULL",
    "atss.engine.launch.abridge_terminal": "atss.engine.terminal.abridge_terminal",
    "atss.engine.launch.check_host": "atss.engine.environment.check_host",
    "atss.engine.launch.explain": "atss.engine.explain.explain",
    "atss.engine.launch.keep_tracebacks_to_the_file": (
        "atss.engine.terminal.hide_explained_tracebacks"
    ),
    "atss.engine.launch.local_size": "atss.engine.environment.local_size",
    "atss.engine.launch.one_sentence": "atss.engine.explain.exit_with_message",
    "atss.engine.outlook.Outlook": "atss.engine.estimate.TrainingEstimate",
    "atss.engine.run.NoSuchModule": "atss.errors.UserError",
    "atss.engine.run.check_best": "atss.engine.checks.check_best",
    "atss.engine.run.check_expected": "atss.engine.checks.check_expected",
    "atss.engine.run.check_images": "atss.engine.checks.check_data",
    "atss.engine.watch.first_of": "atss.engine.signals.first_of",
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
# Old module -> new module, for names that are not in NAMES.
MODULES = {
    "atss.analysis.files": "atss.errors",
    "atss.assigners.cuts": "atss.assigners.legacy",
    "atss.assigners.scene": "atss.assigners.lists",
    "atss.config.classes": "atss.config.derive",
    "atss.config.pixels": "atss.config.derive",
    "atss.config.read": "atss.config.files",
    "atss.config.schedule": "atss.config.derive",
    "atss.config.tta": "atss.config.build",
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


def renamed_names(module: str, new_module: str = "") -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module that names have left.

    Args:
        new_module: has the names that are not in NAMES.
    """

    def find(name: str) -> Any:
        old = f"{module}.{name}"
        target, _, instead = NAMES.get(old, new_module and f"{new_module}.{name}").partition(" ")
        if not target:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = target.rpartition(".")
        value = getattr(importlib.import_module(place), new)
        if not name.startswith("__"):  # the import system asks for those
            warn(old, instead or target)
        return value

    return find


def renamed_attribute(old: str, new: str) -> property:
    """Make a property that returns another attribute with a warning. Both names begin with the
    class's."""

    def get(instance: Any) -> Any:
        warn(old, new)
        return getattr(instance, new.rpartition(".")[2])

    return property(get)


def warn(name: str, instead: str) -> None:
    """Warn at the line that uses a deprecated name: two frames above this function."""
    message = f"{name} is deprecated and goes with version 0.4.0: use {instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class OldModules(MetaPathFinder, Loader):
    """Import hook for the modules of MODULES."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        find = renamed_names(module.__name__, MODULES[module.__name__])
        module.__getattr__ = find  # type: ignore[method-assign]


sys.meta_path.append(OldModules())
