"""Cases of tests/golden/error_analysis.json: ground truth, detections and figures of references."""

import json

from conftest import GOLDEN

CASES = json.loads((GOLDEN / "error_analysis.json").read_text())["cases"]
