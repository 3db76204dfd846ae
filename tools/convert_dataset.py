#!/usr/bin/env python3
"""Convert data sets of any supported format into a json in COCO's format, join several, and make
splits.

    tools/convert_dataset.py aquarium/data.yaml:train --output aquarium.json
    tools/convert_dataset.py VOC2007:trainval VOC2012:trainval --output voc.json
    tools/convert_dataset.py labels.json:images --output labels.json --split train=0.8 val=0.2
    tools/convert_dataset.py film:. --output film.json --split train=0.7 val=0.3 --group '(.*)_'

The options of `atss train` and `tools/train_net.py` that read the files are printed. Image files
are not moved. Each split (film_train.json, film_val.json) has about its share of images, of crowded
images and of the objects of every class. Images of one --group, copies of one image, and
photographs of one scene stay in one split.
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
from atss.errors import UserError, check_writable
from atss.labels.classes import refuse_unknown
from atss.labels.coco import category_names, find_in_json, with_areas
from atss.labels.copies import by_key, find_copies, join_groups
from atss.labels.findings import DROPPED, ERROR, WARNING
from atss.labels.folders import VALIDATION
from atss.labels.formats import Labels, Reading, add_arguments, read_labels, reading_of
from atss.labels.splits import divide, format_report, group_by_name, join, parse_shares, part

EXAMPLES = 3


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="ANNOTATIONS:IMAGES",
        help="annotations.json:image_dir, data.yaml:split or folder:split",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="in COCO's format"
    )
    parser.add_argument(
        "--split", nargs="+", default=[], metavar="NAME=SHARE", help="write one file per split"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="decides between equally good splits"
    )
    parser.add_argument(
        "--group",
        metavar="PATTERN",
        help="regular expression: images with the same match in their names stay together",
    )
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    args = make_parser().parse_args(argv)
    progress = partial(tqdm, disable=None, leave=False)  # on a terminal only
    try:
        shares = parse_shares(args.split) if args.split else {}
        if args.group and not shares:
            raise UserError("--group keeps images together in one split: it needs --split")
        if args.output.suffix.lower() != ".json":
            raise UserError(f"--output must end in .json, got {args.output.name!r}")
        targets = [_target(args.output, name) for name in shares] or [args.output]
        for target in targets:
            if target.exists():
                raise UserError(f"{target} already exists: choose another --output")
            check_writable("--output", target)
        content, folder = join(_read_all(args.sources, reading_of(args)))
        for finding in find_in_json(content)[0]:
            if finding.level == ERROR:  # such as one image in two sources, with objects of each
                raise UserError(f"the joined data sets have {finding.sentence()}")
        content["annotations"] = with_areas(content["annotations"])
        split_of = [0] * len(content["images"])
        if shares:
            split_of = _divide(content, folder, shares, args.seed, args.group, progress)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for i, target in enumerate(targets):
        with open(target, "w") as file:
            json.dump(part(content, [x == i for x in split_of]), file)
    sources = [f"{target}:{folder}" for target in targets]
    if options := _train_options(list(shares), sources):
        print("atss train:", options)
    for target, source in zip(targets, sources, strict=True):
        name = target.stem.replace("=", "_")  # --register ends a name at the first one
        print("--register", shlex.quote(f"{name}={source}"))
    return 0


def _divide(
    content: dict,
    folder: str,
    shares: dict[str, float],
    seed: int,
    pattern: str | None,
    progress: Callable[..., Iterable],
) -> list[int]:
    """Return the index of each image's split, and print the table of splits.

    Raises:
        UserError: if a split would be empty, or the pattern is invalid or never matches.
    """
    files = [image["file_name"] for image in content["images"]]
    matches = group_by_name(files, pattern) if pattern else []
    single = [file for file, match in zip(files, matches, strict=False) if match is None]
    if len(single) == len(files):
        raise UserError(f"--group {pattern!r} does not match names such as {files[0]}")
    if single:
        print(
            f"--group {pattern!r} does not match {len(single)} names, such as {single[0]}: each "
            "is a group of one",
            file=sys.stderr,
        )
    equal, copies, scenes = find_copies([os.path.join(folder, f) for f in files], progress)
    _print_groups("copies of one image", copies, files)
    printed = set(map(tuple, copies))
    _print_groups("photographs of one scene", [x for x in scenes if tuple(x) not in printed], files)
    for kept, groups in (("copies", scenes), ("equal files", copies)):
        for group in [x for x in groups if len(x) > max(shares.values()) * len(files)]:
            print(
                f"{len(group)} of {len(files)} images look alike, more than a split has: only "
                f"{kept} and images of one --group stay together",
                file=sys.stderr,
            )
            groups.remove(group)
    groups = join_groups(len(files), equal, copies, scenes, by_key(matches))
    split_of = divide(content, groups, list(shares.values()), seed).tolist()
    for i, name in enumerate(shares):
        if i not in split_of:
            raise UserError(
                f"the split {name!r} would have no image: {len(files)} images make {len(groups)} "
                "groups that stay together"
            )
    print(format_report(content, split_of, shares))
    return split_of


def _train_options(splits: list[str], sources: list[str]) -> str:
    """Return the options of `atss train` for the splits train and val, or for a file without
    splits; "" for other names."""
    if not splits:
        return f"--train or --val {shlex.quote(sources[0])}"
    options = {"train": "--train", **dict.fromkeys(VALIDATION, "--val")}
    named = [(options.get(x), source) for x, source in zip(splits, sources, strict=True)]
    return " ".join(f"{option} {shlex.quote(source)}" for option, source in named if option)


def _target(output: Path, split: str) -> Path:
    return output.with_name(f"{output.stem}_{split}{output.suffix}")


def _read_all(sources: list[str], reading: Reading) -> list[Labels]:
    """Read all sources, and print their warnings.

    Raises:
        UserError: if a source cannot be read or has errors; the message names it.
    """
    places = list(map(split_source, sources))
    sets = [read_labels(*place, reading) for place in places]
    found = set().union(*(labels.found for labels in sets))
    names_in_data = list(dict.fromkeys(name for labels in sets for name in labels.names))
    refuse_unknown(reading.classes, found, names_in_data)
    for labels, (annotations, _) in zip(sets, places, strict=True):
        for finding in [*labels.findings, *find_in_json(labels.content)[0]]:
            if finding.level == ERROR:
                raise UserError(f"{annotations} has {finding.sentence()}")
            if finding.level in (DROPPED, WARNING):
                print(f"{annotations} has {finding.sentence()}", file=sys.stderr)
    names = [category_names(labels.content) for labels in sets]
    for (annotations, _), own_names in zip(places, names, strict=True):
        missing = list(dict.fromkeys(x for others in names for x in others if x not in own_names))
        if missing:
            more = f" and {len(missing) - EXAMPLES} more" if len(missing) > EXAMPLES else ""
            print(
                f"{annotations} has no class {', '.join(map(repr, missing[:EXAMPLES]))}{more}: "
                "objects of such classes on its images would be trained on as background",
                file=sys.stderr,
            )
    return sets


def _print_groups(title: str, groups: list[list[int]], files: list[str]) -> None:
    for group in groups[:EXAMPLES]:
        print(f"{title}: {', '.join(files[i] for i in group)}", file=sys.stderr)
    if len(groups) > EXAMPLES:
        print(f"{title}: {len(groups) - EXAMPLES} more groups", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
