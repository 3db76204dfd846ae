#!/usr/bin/env python3
"""Writes a data set of any format that can be read as a json in COCO's, joins several, and makes
splits where there are none.

    tools/convert_dataset.py aquarium/data.yaml:train --output aquarium.json
    tools/convert_dataset.py VOC2007:trainval VOC2012:trainval --output voc.json
    tools/convert_dataset.py labels.json:images --output labels.json --split train=0.8 val=0.2
    tools/convert_dataset.py film:. --output film.json --split train=0.7 val=0.3 --group '(.*)_'

Images stay where they are. Splits (film_train.json, film_val.json) have about their share of
images, of crowded images and of the objects of every class; images that --group finds to belong
together, copies of one image, and photographs of one scene are in one split.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from atss.data.datasets import split_source
from atss.errors import check_writable
from atss.labels.classes import refuse_unknown
from atss.labels.coco import category_names, find_in_json, with_areas
from atss.labels.copies import by_key, find_copies, join_groups
from atss.labels.findings import DROPPED, ERROR, WARNING
from atss.labels.formats import Labels, Reading, add_arguments, read_labels, reading_of
from atss.labels.splits import divide, format_report, group_by_name, join, parse_shares, part

EXAMPLES = 3


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="ANNOTATIONS:IMAGES",
        help="annotations.json:image_dir, data.yaml:split or folder:split",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument(
        "--split", nargs="+", default=[], metavar="NAME=SHARE", help="several files in place of one"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what decides between equals")
    parser.add_argument(
        "--group",
        metavar="PATTERN",
        help="a regular expression: images of whose names it finds the same stay together",
    )
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    progress = partial(tqdm, disable=None, leave=False)  # on a terminal only
    try:
        shares = parse_shares(args.split) if args.split else {}
        if args.group and not shares:
            raise ValueError("--group keeps images together in one split: it needs --split")
        if args.output.suffix.lower() != ".json":
            raise ValueError(f"--output must end in .json, not {args.output.name!r}")
        targets = [_target(args.output, name) for name in shares] or [args.output]
        for target in targets:
            if target.exists():
                raise ValueError(f"{target} exists already")
            check_writable("--output", target)
        content, folder = join(_read_all(args.sources, reading_of(args)))
        for finding in find_in_json(content)[0]:
            if finding.level == ERROR:  # such as one image in two sources, with objects of each
                raise ValueError(f"joined, they have {finding.sentence()}")
        content["annotations"] = with_areas(content["annotations"])
        split_of = [0] * len(content["images"])
        if shares:
            split_of = _divide(content, folder, shares, args.seed, args.group, progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for i, target in enumerate(targets):
        with open(target, "w") as file:
            json.dump(part(content, [x == i for x in split_of]), file)
        name = target.stem.replace("=", "_")  # --register ends a name at the first one
        print("--register", shlex.quote(f"{name}={target}:{folder}"))
    return 0


def _divide(
    content: dict,
    folder: str,
    shares: dict[str, float],
    seed: int,
    pattern: str | None,
    progress: Callable[..., Iterable],
) -> list[int]:
    """The split of each image; prints what each has.

    Raises:
        ValueError: where a split would be empty, or the pattern is none.
    """
    files = [image["file_name"] for image in content["images"]]
    named = group_by_name(files, pattern) if pattern else []
    alone = [file for file, name in zip(files, named, strict=False) if name is None]
    if len(alone) == len(files):
        raise ValueError(f"--group {pattern!r} finds nothing in names such as {files[0]}")
    if alone:
        print(
            f"--group {pattern!r} finds nothing in {len(alone)} names, such as {alone[0]}: each is "
            "by itself",
            file=sys.stderr,
        )
    equal, copies, scenes = find_copies([os.path.join(folder, f) for f in files], progress)
    _say_groups("copies of one image", copies, files)
    known = set(map(tuple, copies))
    _say_groups("photographs of one scene", [x for x in scenes if tuple(x) not in known], files)
    for kind, groups in (("copies among them stay", scenes), ("equal files stay", copies)):
        for group in [x for x in groups if len(x) > max(shares.values()) * len(files)]:
            print(
                f"{len(group)} of {len(files)} images look alike, more than a split has: {kind} "
                "together, and what --group finds",
                file=sys.stderr,
            )
            groups.remove(group)
    groups = join_groups(len(files), equal, copies, scenes, by_key(named))
    split_of = divide(content, groups, list(shares.values()), seed).tolist()
    for i, name in enumerate(shares):
        if i not in split_of:
            raise ValueError(
                f"the split {name!r} would have no image: there are {len(files)}, which make "
                f"{len(groups)} that can be parted"
            )
    print(format_report(content, split_of, shares))
    return split_of


def _target(output: Path, split: str) -> Path:
    return output.with_name(f"{output.stem}_{split}{output.suffix}")


def _read_all(sources: list[str], reading: Reading) -> list[Labels]:
    """
    Raises:
        ValueError: with a sentence that names the source that cannot be read, or is wrong.
    """
    places = list(map(split_source, sources))
    sets = [read_labels(*place, reading) for place in places]
    found = set().union(*(labels.found for labels in sets))
    there = list(dict.fromkeys(name for labels in sets for name in labels.names))
    refuse_unknown(reading.classes, found, there)
    for labels, (annotations, _) in zip(sets, places, strict=True):
        for finding in [*labels.findings, *find_in_json(labels.content)[0]]:
            if finding.level == ERROR:
                raise ValueError(f"{annotations} has {finding.sentence()}")
            if finding.level in (DROPPED, WARNING):
                print(f"{annotations} has {finding.sentence()}", file=sys.stderr)
    names = [category_names(labels.content) for labels in sets]
    for (annotations, _), own in zip(places, names, strict=True):
        missing = list(dict.fromkeys(x for others in names for x in others if x not in own))
        if missing:
            print(
                f"{annotations} has no class {', '.join(map(repr, missing[:EXAMPLES]))}: what its "
                f"images show of {len(missing)} such will be learnt as background",
                file=sys.stderr,
            )
    return sets


def _say_groups(what: str, groups: list[list[int]], files: list[str]) -> None:
    for group in groups[:EXAMPLES]:
        print(f"{what}: {', '.join(files[i] for i in group)}", file=sys.stderr)
    if len(groups) > EXAMPLES:
        print(f"{what}: {len(groups) - EXAMPLES} groups more", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
