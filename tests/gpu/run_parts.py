#!/usr/bin/env python3
"""What a GPU has to show, in parts: `make test-gpu`.

    python tests/gpu/run_parts.py                                  every part, most valuable first, within 400 s
    python tests/gpu/run_parts.py --only late_wire,kernels --limit-s 120

Each part is a process group of its own with a time limit, so that one that hangs costs its limit and nothing else, and
prints one JSON line. Then comes a table of what is proven and what is not. On a machine with CUDA the results are
written to docs/results/gpu.json, from which `make docs` makes docs/gpu.md and a paragraph of README.md.

Without CUDA this is a dry run: parts that have a stand-in for the GPU run on it, the others do not, and nothing is
written. It shows that the parts work, and nothing about GPUs.

Needed: torch, the package, a megatron-core wheel. Exit code: 0 if every part that could run has passed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "docs" / "results" / "gpu.json"
BUDGET_S = 400.0
DRY_SLOWER = 3.0  # a CPU with other work beside it
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
TOO_LATE = "the limit of all parts was over"
TAIL_CHARS = 3000


@dataclass(frozen=True)
class Part:
    """One process of its own.

    Attributes:
        name: of the module in parts/.
        limit_s: after which it is killed with all that it started.
        proves: what is known when it has passed on a GPU.
        dry: whether it has something to run without CUDA.
    """

    name: str
    limit_s: float
    proves: str
    dry: bool = False


# In the order of their worth, so that a run that is cut short has shown what matters most. Seconds on one H200, by
# arithmetic (none of it has been timed on one): a process that imports torch and Megatron and makes a CUDA context
# takes ~12 s, and each limit is 1.4 to 2.5 times the sum.
#   late_wire   30 = 12 + 392 exchanges of 20 ms, one behind the other: 8 + 52 small steps of the host, 0.2 each: 10
#   sanitizer   21 = 12 + 16 small steps of ~4000 operations, each with a stack trace of 0.1 ms: 5 + the models: 3
#   work_nccl   18 = 8 (no Megatron) + communicators: 5 + 7 round trips, each behind 16 copies of 1 GiB: 5
#   kernels     25 = 12 + the reference, a Python loop over tokens on the CPU: 8 + our steps: 3 + codec: 2
#   pretrain    65 = two trainings of two ranks that start at once: 2 x 20 + 9 iterations: 5 + torch.compile: 20
#   overlap     58 = 12 + 18 plans and transfers x (15 steps of 30 ms: 0.5 + a trace: 0.75): 22 + 4 models and costs: 6
#               and with one queue of CUDA 12 + 4 x 1.25 + 1
#   host_syncs  16 = 12 + 11 small models and 22 steps: 4
# Together ~235 s; the limits add up to 400. On one GPU Transformer Engine's part gets what is left of them. On several,
# all limits count: of nccl_ranks that of up to 11 trainings, each 25 = 20 to start + 5, and torch.compile's first: 20.
PARTS = (
    Part(
        "late_wire",
        60,
        "no wait is missing, forward or backward: with an all-to-all that arrives 20 ms late, and nobody but the "
        "exchange to keep its input alive, losses and gradients are those of a prompt one, bit for bit",
        dry=True,
    ),
    Part(
        "sanitizer",
        45,
        "the same by order instead of numbers: no two streams access a tensor without an event between them",
        dry=True,
    ),
    Part(
        "work_nccl",
        45,
        "one exchange over torch's own WorkNCCL: its payload lives long enough under a full allocator, its future and "
        "its events mark its end, a high-priority communicator works (one rank)",
    ),
    Part(
        "kernels",
        50,
        "CUDA's kernels compute what the reference computes on the CPU: groups, gates, codec",
        dry=True,
    ),
    Part(
        "pretrain",
        90,
        "the whole trainer with CUDA tensors on two gloo ranks that share the GPU: batches, DDP, optimizer, checkpoint "
        "of a CPU run, torch.compile; losses are those of the CPU",
        dry=True,
    ),
    Part(
        "overlap",
        84,
        "how much of an all-to-all torch's profiler sees beside computation and what a step takes, per plan, for one "
        "queue of CUDA and 32, and with transfers that hold multiprocessors at either priority; what encode, decode, "
        "launches and the host take; that plans run in their order and the report of hidden time agrees",
        dry=True,
    ),
    Part(
        "host_syncs",
        26,
        "in forward the host waits for the counts of rows alone, with padded capacity and in backward for nothing",
    ),
)
EXTRA_PARTS = (
    Part(
        "nccl_ranks",
        600,
        "several GPUs: losses and gradient norms on real NCCL ranks with overlap on and off, with "
        "--overlap-grad-reduce, EP 2, and layouts that fit",
    ),
    Part("transformer_engine", 120, "Transformer Engine's spec computes what the local spec computes"),
)
NEVER = (
    "NCCL between nodes; bandwidth of InfiniBand; more GPUs than there were",
    "what NCCL's own kernels take from matrix products: in `overlap` another kernel holds as many multiprocessors",
    "FP8 and FP4, context parallelism by Transformer Engine's ring, FSDP, CUDA graphs: refused or untried",
)


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for, print a line for each and a table, and keep the results of a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in (*PARTS, *EXTRA_PARTS)]
    parser.add_argument("--only", metavar="NAME,...", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--limit-s", type=seconds, default=None, help=f"of all parts together; {BUDGET_S:g} on one GPU")
    parser.add_argument("--results", metavar="FILE", type=Path, default=RESULTS, help="where a GPU's results go")
    parser.add_argument("--commit", default=None, help="of these sources, where there is no git to ask")
    args = parser.parse_args(argv)
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    parts = [part for part in (*PARTS, *EXTRA_PARTS) if part.name in chosen]
    limit_s = args.limit_s or default_limit_s(parts)
    if not torch.cuda.is_available():
        print("no CUDA here: a DRY RUN of the parts, on the CPU with stand-ins. It shows nothing about GPUs.")
    results = run_all(parts, limit_s)
    print(table(results))
    if torch.cuda.is_available():
        keep(results, args.results, args.commit or commit_of_sources())
        print(f"written to {args.results}; `make docs` puts docs/results/gpu.json into docs/gpu.md and README.md")
    could_run = [result for result in results if result["status"] != NOT_RUN or result["reason"] == TOO_LATE]
    return int(not could_run or any(result["status"] != PASSED for result in could_run))


def seconds(text: str) -> float:
    """A time above 0, as the type of an option: 0 would read as no limit, and no comparison holds for nan."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return float(text)


def default_limit_s(parts: list[Part]) -> float:
    """Of all parts together: the budget of one GPU, and the parts' own limits where there is another machine."""
    if torch.cuda.device_count() == 1:
        return BUDGET_S
    return sum(part_limit_s(part) for part in parts)


def part_limit_s(part: Part) -> float:
    """Of one part on this machine."""
    return part.limit_s if torch.cuda.is_available() else DRY_SLOWER * part.limit_s


def run_all(parts: list[Part], limit_s: float) -> list[dict]:
    """A result for each part, printed when it is there."""
    end = time.monotonic() + limit_s
    results = []
    for part in parts:
        left_s = end - time.monotonic()
        if reason := cannot_run(part):
            result = {"part": part.name, "status": NOT_RUN, "reason": reason}
        elif left_s < 5:
            result = {"part": part.name, "status": NOT_RUN, "reason": TOO_LATE}
        else:
            result = run_part(part, min(part_limit_s(part), left_s))
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def cannot_run(part: Part) -> str:
    """Why a part has nothing to run on this machine; empty where it has."""
    if not torch.cuda.is_available():
        return "" if part.dry else "no CUDA"
    if part.name == "nccl_ranks" and torch.cuda.device_count() < 2:
        return "one GPU: NCCL takes no two ranks on a device"
    if part.name == "transformer_engine":
        try:
            importlib.metadata.version("transformer-engine")
        except importlib.metadata.PackageNotFoundError:
            return "Transformer Engine is not installed"
    return ""


def run_part(part: Part, limit_s: float) -> dict:
    """Run one part in a process group of its own; whatever it leaves behind is killed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        wrote, log = Path(folder, "result.json"), Path(folder, "log")
        path = [str(ROOT), str(HERE), str(HERE.parent / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("w") as output:
            # -P: the folder of a script would come first on the path, and our names before those of packages.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"parts.{part.name}", str(wrote)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_group(process)
        return judged(part, code, wrote, log, limit_s) | {"seconds": round(time.monotonic() - began, 1)}


def kill_group(process: subprocess.Popen) -> None:
    """End a part with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def judged(part: Part, code: int | None, wrote: Path, log: Path, limit_s: float) -> dict:
    """What a part wrote, and whether it is a pass: it ended by itself, with checks, mutants included, that all hold."""
    found = json.loads(wrote.read_text()) if wrote.exists() else {}
    on = "GPU" if torch.cuda.is_available() else "CPU, with stand-ins: a dry run"
    result = {"part": part.name, "status": FAILED, "on": on, **found}
    ended = code == 0 and found.get("ended", False)
    if ended and found["checks"] and set(found["checks"].values()) == {PASSED}:
        result["status"] = PASSED
    elif ended and not found["checks"] and found["not_run"]:
        result |= {"status": NOT_RUN, "reason": "; ".join(found["not_run"].values())}
    elif code is None:
        result["reason"] = f"took more than {limit_s:g} s"
    elif not ended:
        result["reason"] = f"ended with code {code}"
    else:
        bad = [name for name, outcome in found["checks"].items() if outcome != PASSED]
        result["reason"] = f"failed: {', '.join(bad)}" if bad else "has checked nothing"
    if result["status"] == FAILED:
        result["log"] = log.read_text(errors="replace")[-TAIL_CHARS:]
    return result


def table(results: list[dict]) -> str:
    """What is proven and what is not, a line each."""
    proves = {part.name: part.proves for part in (*PARTS, *EXTRA_PARTS)}
    on = "on this GPU" if torch.cuda.is_available() else "DRY RUN on the CPU: proves nothing about GPUs"
    lines = ["", f"what each part proves ({on})"]
    for result in results:
        reason = f" ({result['reason']})" if "reason" in result else ""
        status = result["status"] if torch.cuda.is_available() or "on" not in result else f"dry run {result['status']}"
        lines.append(f"  {status:14} {result['part']}: {proves[result['part']]}{reason}")
        lines += [f"                 not run: {name}: {why}" for name, why in result.get("not_run", {}).items()]
    return "\n".join([*lines, "what no part proves", *(f"  {line}" for line in NEVER), ""])


def commit_of_sources() -> str:
    """By git, with a word where files have changed since; "unknown" where git cannot say."""
    answers = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", ".", ":!docs"]):
        try:
            answers.append(subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
    commit, changed = answers
    return commit.strip() + (", with changes" if changed.strip() else "")


def keep(results: list[dict], path: Path, commit: str) -> None:
    """Write down what ran where; a part that was not asked for keeps what is known of it, if the commit is the same."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same = before.get("commit") == commit and commit.isalnum() and commit != "unknown"
    known = {result["part"]: result for result in before["parts"]} if same else {}
    known |= {result["part"]: {k: v for k, v in result.items() if k != "log"} for result in results}
    order = [part.name for part in (*PARTS, *EXTRA_PARTS)]
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "NCCL": ".".join(map(str, nccl_version()))}
    for package in ("megatron-core", "transformer-engine", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    document = {
        "device": torch.cuda.get_device_name(0),
        "devices": torch.cuda.device_count(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "parts": sorted(known.values(), key=lambda result: order.index(result["part"])),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def nccl_version() -> tuple[int, ...]:
    """Of the NCCL that torch has."""
    from torch.cuda import nccl

    return nccl.version()


if __name__ == "__main__":
    sys.exit(main())
