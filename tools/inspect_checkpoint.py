#!/usr/bin/env python3
"""Say what is in a checkpoint, look for NaN, or compare two: Megatron's torch_dist folders and Hugging Face folders."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import atomic
from checkpoints.contents import anatomy
from checkpoints.contents.statistics import difference, figures
from checkpoints.formats import open_any
from checkpoints.tensors import Checkpoint, CheckpointError
from command_line import Parser, exit_code
from preprocessing.sources import shown
from progress import in_words, progress

ABOUT = """\
Say what is in a checkpoint: format, architecture, layout, parameters by kind, bytes. Look for NaN and Inf, or compare
two checkpoints tensor by tensor. Tensors are read piece by piece: it needs little memory, and no GPU.
"""
EPILOG = """\
examples:
  # what it is; headers alone are read
  inspect_checkpoint.py run/stdlib/checkpoints

  # norm, mean, standard deviation and largest element of every tensor, and NaN or Inf in any
  inspect_checkpoint.py run/stdlib/checkpoints --norms --scan

  # what training changed between two iterations
  inspect_checkpoint.py checkpoints/iter_0000100 checkpoints/iter_0000200 --json change.json

words:
  active     parameters that one token meets in training, those of prediction layers too: all but those of routed
             experts that it does not visit (where there are zero experts: if all experts are chosen alike)
  relative   norm of the difference of two tensors over the norm of the first one

exit codes: 0 done; 1 --scan found NaN or Inf, or two checkpoints differ, or failed; 2 bad request or checkpoint; 130 /
143 stopped by SIGINT / SIGTERM
"""
MOST_ROWS = 20
"""Tensors that differ, as printed; --json has them all."""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("inspect_checkpoint.py", description=ABOUT, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="a checkpoint, or one iteration of it")
    add("other", type=Path, nargs="?", metavar="DIR2", help="another one of the same format, to compare with")
    add("--norms", action="store_true", help="print norm, mean, standard deviation and largest element of each tensor")
    add("--scan", action="store_true", help="look for NaN and Inf; exit code 1 if there are any")
    add("--json", type=Path, metavar="FILE", help="write everything into this file too, in the place of what it held")
    return parser


def measure(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Figures of every tensor, by its name."""
    infos = checkpoint.infos
    with progress("read", sum(info.nbytes for info in infos.values())) as advance:
        return {
            name: {"shape": list(info.shape), "dtype": info.dtype_name, **figures(checkpoint, name, advance)}
            for name, info in infos.items()
        }


def compare(one: Checkpoint, other: Checkpoint) -> dict[str, Any]:
    """How two checkpoints differ, tensor by tensor; plain types."""
    both = {name: (info, other.infos[name]) for name, info in one.infos.items() if name in other.infos}
    alike = [name for name, (before, after) in both.items() if before.shape == after.shape]
    with progress("compare", sum(one.infos[name].nbytes for name in alike)) as advance:
        differences = {name: difference(one, other, name, advance) for name in alike}
    changed = {name: found for name, found in differences.items() if found["changed"]}
    return {
        "only_in_first": [name for name in one.infos if name not in both],
        "only_in_second": [name for name in other.infos if name not in both],
        "other_shape": {
            name: [list(info.shape) for info in infos] for name, infos in both.items() if name not in differences
        },
        "other_dtype": {
            name: [info.dtype_name for info in infos]
            for name, infos in both.items()
            if infos[0].dtype != infos[1].dtype
        },
        "equal": len(differences) - len(changed),
        "changed": dict(sorted(changed.items(), key=lambda item: -item[1]["relative"])),
    }


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit code. Raises CheckpointError."""
    if args.json is not None:
        check_json(args.json, args.folder, *([] if args.other is None else [args.other]))
    checkpoint = open_any(args.folder)
    other = None if args.other is None else open_any(args.other)
    if other is not None and type(other) is not type(checkpoint):
        raise CheckpointError(
            f"two checkpoints of one format can be compared: {args.folder} and {args.other} are of two; convert one "
            "with tools/convert_checkpoint.py, whose --verify compares what they compute"
        )
    result = anatomy.describe(checkpoint)
    print_description(result)
    code = 0
    if args.norms or args.scan:
        result["figures"] = measure(checkpoint)
        code |= print_figures(result["figures"], norms=args.norms, scan=args.scan)
    if other is not None:
        result["comparison"] = {**compare(checkpoint, other), "with": str(args.other)}
        code |= print_comparison(result["comparison"])
    if args.json is not None:
        atomic.write_text(args.json, json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")
    return code


def check_json(path: Path, *sources: Path) -> None:
    """Raise CheckpointError where ``path`` cannot be written, before anything is read from ``sources`` for it."""
    if reason := atomic.obstacle_of_file(path, *sources):
        raise CheckpointError(f"--json {path} cannot be written: {reason}; name another file")


def _plain(value: Any) -> Any:
    """``value`` with words for what JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# --- printing ----------------------------------------------------------------------------------------------------


def print_description(result: Mapping[str, Any]) -> None:
    """Print what ``anatomy.describe`` found; words of the checkpoint such that no terminal obeys them."""
    iteration = f", iteration {result['iteration']}" if "iteration" in result else ""
    print(f"{shown(result['folder'])}: {result['format']}{iteration}")
    print(f"  {result['tensors']} tensors, {in_words(result['bytes'])}, {_pairs(result['dtypes'])}")
    print(f"  {result['files']['count']} files, {in_words(result['files']['bytes'])}")
    if "layout" in result:
        print(f"  saved with: {_pairs(result['layout']) or 'unknown layout'}")
        print(f"  optimizer state: {'yes' if result['optimizer'] else 'no'}")
    print("architecture:")
    for name, value in result["architecture"].items():
        text = shown(" ".join(map(str, value)) if isinstance(value, list) else str(value))
        print(f"  {shown(name):36} {text if len(text) < 100 else text[:97] + '...'}")
    counts = result["parameters"]
    print("parameters:")
    for name, count in counts["by_kind"].items():
        print(f"  {name:36} {count:>20,} {count / counts['total']:>7.1%}")
    print(f"  {'total':36} {counts['total']:>20,}")
    if counts["active"]:
        print(f"  {'active for a token':36} {counts['active']:>20,} {counts['active'] / counts['total']:>7.1%}")


def _pairs(values: Mapping[str, Any]) -> str:
    return shown(", ".join(f"{name} {value}" for name, value in values.items()))


def print_figures(found: Mapping[str, Mapping[str, Any]], *, norms: bool, scan: bool) -> int:
    """Print figures of tensors; returns 1 where a scan found anything."""
    if norms:
        print(f"{'norm':>12} {'mean':>12} {'std':>12} {'largest':>12}  tensor")
        for name, entry in found.items():
            numbers = " ".join(f"{entry[key]:12.5g}" for key in ("norm", "mean", "std", "max_abs"))
            print(f"{numbers}  {name} {entry['shape']}")
    if not scan:
        return 0
    bad = {name: entry for name, entry in found.items() if entry["num_nan"] or entry["num_inf"]}
    print(f"scan: {len(bad)} of {len(found)} tensors have NaN or Inf")
    for name, entry in bad.items():
        print(f"  {name}: {entry['num_nan']} NaN, {entry['num_inf']} Inf of {math.prod(entry['shape'])}")
    return int(bool(bad))


def print_comparison(found: Mapping[str, Any]) -> int:
    """Print how two checkpoints differ; returns 1 if they do."""
    names = {"only in the first": found["only_in_first"], "only in the second": found["only_in_second"]}
    for what in ("shape", "dtype"):
        pairs = found[f"other_{what}"]
        names[f"of another {what}"] = [f"{name} {one} {other}" for name, (one, other) in pairs.items()]
    changed = [
        f"{entry['max_abs']:12.5g} {entry['relative']:12.5g} {entry['changed']:>12,}  {name}"
        for name, entry in found["changed"].items()
    ]
    print(f"compared with {shown(found['with'])}: {found['equal']} tensors are equal, {len(changed)} are not")
    for words, lines in names.items():
        _print_some(f"{words}: {len(lines)}", lines)
    _print_some(f"{'largest':>12} {'relative':>12} {'elements':>12}  tensor, those that changed most first", changed)
    return int(any((*names.values(), changed)))


def _print_some(head: str, lines: Sequence[str]) -> None:
    if lines:
        print("\n  ".join([head, *lines[:MOST_ROWS]]))
    if len(lines) > MOST_ROWS:
        print(f"  ... and {len(lines) - MOST_ROWS} more; --json FILE has them all")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    args = make_parser().parse_args(argv)
    return exit_code("inspect_checkpoint.py", lambda: run(args))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what reads us may end first: head, less
    sys.exit(main())
