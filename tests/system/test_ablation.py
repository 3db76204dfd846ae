"""tools/ablation.py in its own processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY

from atss.analysis.comparison import read_results

PLAN = {
    "data": {"digits": {"train": 16, "test": 8}},
    "recipe": ["ablation"],
    "keys": TINY
    | {"SOLVER.MAX_ITER": 60, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.CHECKPOINT_PERIOD": 10}
    | {"MODEL.ATSS.SCORE_THRESH_TEST": 0.0},
    "rows": {"ATSS": "tables/atss_box"},
}


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_killed_run_equals_an_uninterrupted_one(tmp_path, whole_group):
    """Killed alone, the command's training saves a checkpoint and ends."""
    pytest.importorskip("sklearn")
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps(PLAN, default=list))
    command = [sys.executable, str(ROOT / "tools/ablation.py"), str(plan)]
    outputs = [[f"--output={tmp_path}/{x}", f"--results={tmp_path}/{x}.csv"] for x in "ab"]
    subprocess.run([*command, *outputs[0]], check=True)
    process = subprocess.Popen([*command, *outputs[1]], start_new_session=True)
    training = tmp_path / "b/ATSS/seed1/training"
    while not list(training.glob("model_000*.pth")):
        assert process.poll() is None
        time.sleep(0.01)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    for _ in range(100):  # until the training has ended
        done = subprocess.run([*command, *outputs[1]], check=False, capture_output=True, text=True)
        if "is in use by" not in done.stdout:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_results([tmp_path / f"{x}.csv"])["ATSS"][1] for x in "ab")
    assert one["AP"] > 0
    same = ("AP", "AP50", "AP75", "APs", "APm", "positives", "iterations")
    assert [one[key] for key in same] == [two[key] for key in same]
