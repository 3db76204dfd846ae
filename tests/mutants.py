"""Mutation testing: small changes to the package, each of which should turn a test red.

    python tests/mutants.py             # continues where the last run stopped
    python tests/mutants.py --report    # only the figures and survivors so far

Everything is imported and collected once. A mutant is a process forked from there, in which the
code object of the changed function replaces the original one; the tests that reach the changed
statement run in it, the quickest first, until one fails. Processes that tests start by
tests/processes.py are forked from it and have the mutant, too. Not mutated: constants of modules
and classes, defaults of arguments, decorators. Not detected: mutants of code that runs only at
import or in a new interpreter.

tests/survivors.txt lists the survivors, with a reason for each. Results are in output/mutants/; a
function that has changed since is tested again.
"""

import argparse
import ast
import builtins
import ctypes
import gc
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from types import FunctionType

import numpy as np
import processes
import pytest
from mutations import Marks, Mutant, mutants_of, plant

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "projects" / "ATSS" / "atss"
OUTPUT = ROOT / "output" / "mutants"
JUDGED = OUTPUT / "judged.jsonl"
# First all mutants of WHOLE, then a sample of the others, then all of LATER.
WHOLE = ["engine/all_gather.py", "modeling/criterion.py", "data/samplers.py"]
LATER = ["losses.py", "modeling/terms.py", "checkpoints/checkpointer.py"]
SAMPLE = "a sample of the others"
# Exit codes that pytest does not use.
SURVIVED, NOT_PLANTED = 77, 78
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl
TERMINAL = os.dup(1)


class Reached:
    """Measures the statements and seconds of each test, with those of its fixtures.

    Args:
        hits: (statements,) in memory that forked processes share.
    """

    def __init__(self, hits: np.ndarray):
        self.hits = hits
        self.fixtures: dict[object, tuple[np.ndarray, float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before, start = self.hits.copy(), time.monotonic()
        self.hits[:] = 0
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef] = self.hits.copy(), time.monotonic() - start
            np.maximum(self.hits, before, out=self.hits)

    def run(self, session: pytest.Session, items: list[pytest.Item], file: Path) -> int:
        for item, following in zip(items, [*items[1:], None], strict=True):
            self.hits[:] = 0
            failed, start = session.testsfailed, time.monotonic()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds = time.monotonic() - start
            for x in chain.from_iterable(item._fixtureinfo.name2fixturedefs.values()):
                hits, setup = self.fixtures.get(x, (self.hits, 0.0))
                np.maximum(self.hits, hits, out=self.hits)
                seconds = max(seconds, setup)
            row = {"test": item.nodeid, "failed": session.testsfailed > failed}
            row |= {"seconds": round(seconds, 3), "lines": self.hits.nonzero()[0].tolist()}
            append(file, row)
        return 0


class Mutants:
    """A plugin of pytest, which replaces the loop over tests by one over mutants."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        # Tests by whether they pass without a mutant; how many mutants each has killed.
        self.sound: dict[str, bool] = {}
        self.kills = Counter[str]()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session, self.items = session, {x.nodeid: x for x in session.items}
        self.functions: dict[str, list[FunctionType]] = defaultdict(list)
        for x in gc.get_objects():
            if type(x) is FunctionType:
                self.functions[x.__code__.co_filename].append(x)
        gc.collect()
        gc.freeze()
        self.measure()
        judged, why = judgements(), reasons()

        def left() -> Iterator[Mutant]:
            for _, mutant in chosen(self.options):
                row = judged.get((mutant.key, mutant.digest))
                explained = why.get(mutant.key, "").startswith("equivalent")
                again = self.options.again and row and row["result"] != "killed" and not explained
                if row is None or again:
                    yield mutant

        self.share(left, self.judge)
        return True

    def share(self, things: Callable[[], Iterable], work: Callable) -> None:
        """Divide work among processes."""

        def part(k: int) -> int:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            for i, x in enumerate(things()):
                if i % self.options.jobs == k:
                    work(x)
            return 0

        for pid in [self.fork(partial(part, k)) for k in range(self.options.jobs)]:
            os.waitpid(pid, 0)

    def fork(self, work: Callable[[], int]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                code = work()
            except BaseException:
                say(traceback.format_exc())
            finally:
                os._exit(code)
        return pid

    def run(self, work: Callable[[pytest.Session], int]) -> int:
        """Run tests in a process of their own.

        Returns:
            its exit code; negative for the signal that ended it.
        """

        def begin() -> int:
            os.setsid()
            # Its default action ends the process; nohup and a shell's & ignore the others.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            folder.mkdir(parents=True)
            config = self.session.config
            config._tmp_path_factory._basetemp = folder
            config.pluginmanager.unregister(name="terminalreporter")
            return work(self.session)

        folder = OUTPUT / "tmp" / str(time.monotonic_ns())
        pid = self.fork(begin)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            # A test that was cut off may have left processes, which are children of this one now.
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
            while left := children.read_text().split():
                for x in map(int, left):
                    os.kill(x, signal.SIGKILL)
                    os.waitpid(x, 0)
            shutil.rmtree(folder, ignore_errors=True)

    def measure(self) -> None:
        """Find the tests that reach each statement; once for each state of the package."""
        lines: dict[tuple[Path, int], int] = {}
        marked = {path: Marks(path, lines).visit(parse(path)) for path in modules()}
        state = "".join(ast.dump(x) for x in marked.values())
        file = OUTPUT / f"reached-{sha(state)[:12]}.jsonl"
        builtins.__reached__ = shared = mmap.mmap(-1, len(lines))
        known = {x["test"] for x in rows(file)}
        files = defaultdict(list)
        for item in self.session.items:
            if item.nodeid not in known:
                files[item.path].append(item)

        def run(session: pytest.Session, items: list[pytest.Item]) -> int:
            for path, tree in marked.items():
                plant(path, tree, self.functions[str(path)])
            reached = Reached(np.frombuffer(shared, np.uint8))
            session.config.pluginmanager.register(reached)
            return reached.run(session, items, file)

        def measure_file(path: Path) -> None:
            shared[:] = bytes(len(shared))
            start = time.monotonic()
            code = self.run(partial(run, items=files[path]))
            seconds = time.monotonic() - start
            say(f"{path.name}: {len(files[path])} tests, {seconds:.0f} s, exit code {code}")

        # One after another: they share the memory.
        for path in files:
            measure_file(path)
        self.seconds: dict[str, float] = {}
        self.tests: dict[tuple[Path, int], list[str]] = defaultdict(list)
        names = {n: x for x, n in lines.items()}
        for row in rows(file):
            if row["test"] not in self.items:
                continue
            if row["failed"]:
                say(f"fails with marks, left out: {row['test']}")
                continue
            self.seconds[row["test"]] = row["seconds"]
            for n in row["lines"]:
                self.tests[names[n]].append(row["test"])

    def judge(self, mutant: Mutant) -> None:
        """Run the tests that reach a mutant: first those that have killed others, then those of the
        file named after the module, then the quickest."""
        own = f"{PurePath(mutant.key.split('.py')[0]).parent / 'test_'}{mutant.path.name}::"
        reaching = sorted(
            self.tests[mutant.path, mutant.line],
            key=lambda x: (
                -self.kills[x],
                own not in x,
                round(math.log2(self.seconds[x] + 0.1)),
                x,
            ),
        )
        reaching = [x for x in reaching if self.sound.get(x, True)]
        total = np.cumsum([self.seconds[x] for x in reaching])
        tests = reaching[: max(1, int((total <= self.options.seconds).sum()))]
        progress = OUTPUT / f"progress-{os.getpid()}.txt"
        progress.write_text("")

        def try_tests(session: pytest.Session, tests: list[str], planted: bool = True) -> int:
            functions = self.functions[str(mutant.path)]
            if planted and not plant(mutant.path, mutant.tree, functions):
                return NOT_PLANTED
            # Fixtures of the last test are not torn down: the process ends.
            for test, following in zip(tests, [*tests[1:], tests[-1]], strict=True):
                progress.write_text(test)
                signal.alarm(int(30 + 5 * self.seconds[test]))
                item, nextitem = self.items[test], self.items[following]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=nextitem)
                if session.testsfailed:
                    return 1
            return SURVIVED

        # Tests that start processes run in one without threads of other tests: a lock that a thread
        # holds stays locked in forked processes.
        groups = defaultdict(list)
        for x in tests:
            starts = {"FORKED", "Script"} & vars(self.items[x].module).keys()
            groups[self.items[x].path if starts else None].append(x)
        start, code = time.monotonic(), SURVIVED
        for group in groups.values():
            code = self.run(partial(try_tests, tests=group))
            if code != SURVIVED:
                break
        row = {"mutant": mutant.key, "digest": mutant.digest, "line": mutant.line}
        if code == NOT_PLANTED:
            row["result"] = "not planted"
        elif code == SURVIVED:
            row["result"] = "survived" if tests else "unreached"
        else:
            killer = progress.read_text()
            alone = partial(try_tests, tests=[killer])
            if code == -signal.SIGALRM and self.run(alone) == SURVIVED:
                self.sound[killer] = False
            elif killer not in self.sound:
                self.sound[killer] = self.run(partial(alone, planted=False)) == SURVIVED
            if not self.sound[killer]:
                say(f"fails without a mutant, left out: {killer}")
                return self.judge(mutant)
            self.kills[killer] += 1
            row |= {"result": "killed", "by": killer, "code": code}
        row |= {"tests": len(tests), "left": len(reaching) - len(tests)}
        row["seconds"] = round(time.monotonic() - start, 1)
        append(JUDGED, row)
        say(f"{row['result']} in {row['seconds']} s of {len(tests)} tests: {mutant.key}")


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)


def say(line: str) -> None:
    os.write(TERMINAL, f"{time.strftime('%H:%M:%S')} {line}\n".encode())


def append(file: Path, row: dict) -> None:
    with file.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def rows(file: Path) -> list[dict]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(x) for x in lines]


def judgements() -> dict[tuple[str, str], dict]:
    return {(x["mutant"], x["digest"]): x for x in rows(JUDGED)}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Mutant]]:
    """Yield mutants with the group in which they are counted. Drawn are those with the smallest
    digests, so that a change to the code alters few of them."""

    def of(name: str) -> Iterator[Mutant]:
        return mutants_of(PACKAGE / name, name)

    for name in options.whole or WHOLE:
        yield from ((name, x) for x in of(name))
    others = [str(x.relative_to(PACKAGE)) for x in modules()]
    others = [x for x in others if x not in WHOLE] if options.draw else []
    keys = sorted(
        (x.key for name in others for x in of(name)), key=lambda x: sha(f"{options.seed} {x}")
    )
    drawn = {*keys[: options.draw]}
    for name in others:
        yield from ((SAMPLE, x) for x in of(name) if x.key in drawn)
    for name in () if options.whole else LATER:
        yield from ((name, x) for x in of(name) if x.key not in drawn)


def reasons() -> dict[str, str]:
    """Return {mutant: reason} of the list: a mutant in a line, its reason indented below."""
    found, key = {}, ""
    for line in (ROOT / "tests" / "survivors.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            found[key] = f"{found[key]} {line.strip()}".strip()
        elif line and not line.startswith("#"):
            key, found[line] = line, ""
    return found


def report(options: argparse.Namespace) -> int:
    """Print figures, and survivors without a reason.

    Returns:
        number of those.
    """
    judged, why, counts, unexplained = judgements(), reasons(), defaultdict(Counter), 0
    for group, mutant in chosen(options):
        row = judged.get((mutant.key, mutant.digest), {"result": "not yet"})
        result = row["result"]
        reason = why.pop(mutant.key, "") if result != "killed" else ""
        if result not in ("killed", "not yet"):
            if reason.startswith("equivalent"):
                result = "equivalent"
            elif not reason:
                unexplained += 1
                print(f"{mutant.key}\n    {result}, line {mutant.line}, {row['left']} tests left")
        counts[group][result] += 1
    kinds = ("killed", "survived", "unreached", "equivalent", "not planted", "not yet")
    print(f"{'':26}" + "".join(f"{x:>12}" for x in ("mutants", *kinds)))
    for name, count in counts.items():
        print(f"{name:26}{count.total():12}" + "".join(f"{count[x]:12}" for x in kinds))
    if not options.whole:
        names = [str(x.relative_to(PACKAGE)) for x in modules()]
        mutants = {x.key for name in names for x in mutants_of(PACKAGE / name, name)}
        for key in why:
            print(f"listed, but no {'survivor' if key in mutants else 'mutant'}: {key}")
    return unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("whole", nargs="*", help="modules instead of the default ones")
    parser.add_argument("--draw", type=int, default=300, help="number of mutants of other modules")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--seconds", type=float, default=30, help="limit for the tests of a mutant")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--again", action="store_true", help="test unexplained survivors again")
    parser.add_argument("--report", action="store_true", help="print the figures so far")
    options = parser.parse_args()
    if not options.report:
        shutil.rmtree(OUTPUT / "tmp", ignore_errors=True)
        OUTPUT.mkdir(parents=True, exist_ok=True)
        # Examples that fail for a mutant are not those of the suite.
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(OUTPUT / "tmp" / "hypothesis")
        processes.FORKED = multiprocessing.get_context("fork")
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
        pytest.main(
            [*arguments, *os.environ.get("MT", str(ROOT / "tests")).split()], [Mutants(options)]
        )
    return 1 if report(options) else 0


if __name__ == "__main__":
    sys.exit(main())
