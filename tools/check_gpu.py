#!/usr/bin/env python3
"""`make test-gpu`: shows on this machine's GPU what no CPU can show, in some minutes.

    tools/check_gpu.py --json output/gpu.json
    tools/check_gpu.py --device cpu --small      # tries the checks themselves

Prints a line for each check as it ends, and a table at the end; the exit code is 1 where one
failed, or where there is no GPU.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.timing import table
from gpu import cost, numbers
from gpu.setting import ROOT, Finding, Setting

from atss.engine.writers import strict
from atss.errors import check_writable


def suite(setting: Setting) -> Finding:
    """The tests that need a GPU."""
    command = setting.command("-m", "pytest", "-q", "-n", 4, "-m", "gpu", "tests")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (setting.folder / "suite.log").write_text(done.stdout + done.stderr)
    said = done.stdout.strip().splitlines()[-1:] or [f"nothing: {setting.folder}/suite.log"]
    return Finding(done.returncode == 0, said[0].strip("= "))


# What runs on a GPU alone says why not on a CPU.
ON_GPUS: dict[Callable[[Setting], Finding], str] = {
    suite: "its tests need a GPU",
    cost.waits: "nothing waits for a CPU",
    numbers.compiled: "tests/config/test_compile.py does it",
    cost.memory: "tools/benchmark.py model --memory measures it",
}
CHECKS: dict[str, Callable[[Setting], Finding]] = {
    "suite": suite,
    "precisions": numbers.precisions,
    "trainings": numbers.trainings,
    "processes": numbers.processes,
    "waits": cost.waits,
    "steps": cost.steps,
    "iterations": cost.iterations,
    "memory": cost.memory,
    "compiled": numbers.compiled,
}


def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="thin networks, small images")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS], metavar="CHECK")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def check(setting: Setting, names: list[str]) -> dict[str, Finding]:
    """Runs checks one after another. A bug in one is its failure, and the others run."""
    found = {}
    for name in names:
        run, began = CHECKS[name], time.monotonic()
        if not setting.on_gpu and run in ON_GPUS:
            finding = Finding(None, f"not run: {ON_GPUS[run]}")
        else:
            try:
                finding = run(setting)
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                finding = Finding(False, f"{type(error).__name__}: {first}")
        finding.figures["seconds"] = round(time.monotonic() - began, 1)
        found[name] = finding
        print(f"{name}: {_verdict(finding)} {finding.said} ({finding.figures['seconds']} s)")
        sys.stdout.flush()
    return found


def _verdict(finding: Finding) -> str:
    return {True: "passed", False: "FAILED", None: ""}[finding.passed]


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU here; --device cpu --small tries the checks themselves")
    if args.json:
        try:
            check_writable("--json", args.json)
        except OSError as error:
            sys.exit(f"error: {error}")
    machine = {"python": platform.python_version(), "torch": torch.__version__}
    if args.device == "cuda":
        count = torch.cuda.device_count()
        machine |= {"gpu": torch.cuda.get_device_name(), "gpus": count, "cuda": torch.version.cuda}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    warnings.filterwarnings("ignore")
    folder = Path(tempfile.mkdtemp(prefix="atss_gpu_"))
    found = check(Setting(args.device, args.small, folder), args.only)
    rows = [[n, _verdict(x), x.said, f"{x.figures['seconds']:.0f} s"] for n, x in found.items()]
    print("\n" + table(["check", "", "", "took"], rows))
    if args.json:
        figures = {name: vars(x) for name, x in found.items()}
        text = json.dumps(strict({"machine": machine, "checks": figures}), indent=1)
        args.json.write_text(text, encoding="utf-8")
    failed = [name for name, x in found.items() if x.passed is False]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what they wrote is in {folder}")


if __name__ == "__main__":
    main()
