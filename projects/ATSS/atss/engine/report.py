"""The report at the end of a training (TEST.REPORT)."""

import logging

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..data.datasets import has_objects
from .watch import current, wait_for_all


def write_report(cfg: CfgNode) -> None:
    """Write the report in the first process, for which the others wait. A failure is a warning,
    because the training has succeeded."""
    if not any(map(has_objects, cfg.DATASETS.TEST)):
        return
    if comm.is_main_process():
        logger = logging.getLogger(__name__)
        with current().busy():
            try:
                from ..analysis.report import report_run

                logger.info("The report is in %s", report_run(cfg.OUTPUT_DIR))
            except Exception as error:
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                logger.warning("TEST.REPORT: no report (%s: %s)", type(error).__name__, reason)
    wait_for_all()
