"""One rank of the ablation: sets up Megatron's groups, goes through the shares, lets rank 0 write."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Before any import of Megatron, which decides at import time what it finds.
    from megatron_scmoe.cpu import backend as cpu_backend

    cpu_backend.install()

import provenance
from megatron.core import parallel_state
from progress import Advance, progress
from slow_network.control import Control

from ablation.analysis import FORMAT
from ablation.arms import MODELS, Arm
from ablation.bench import Bench, Sizes
from ablation.link import UNLIMITED, Link, find_rate
from ablation.measure import ArmResult, measure, measured_alike
from ablation.render import write_results


def run_rank(args: argparse.Namespace, arms: list[Arm]) -> int:
    """What each rank does; rank 0 writes the results."""
    sizes = _set_up(args)
    bench = Bench(arms, sizes, args.seed)
    link = Link(Control.from_environment())
    meta = _origin(args, sizes)
    if any(MODELS[arm.model].carries == "lsh" for arm in arms):
        _say("finding how many hash functions send a part of the rows")
        bench.find_rates()
    shares: list[float | None] = [*args.comm_share] if link.adjustable else []
    if args.unlimited or not link.adjustable:
        shares.append(None)
    points: list[dict[str, Any]] = []
    for number, share in enumerate(shares, start=1):
        try:
            rate, measured = _set_share(bench, link, share)
        except ValueError as error:
            _say(f"ablate_overlap.py: {error}")
            continue
        _say(f"share {measured:.3f} at {rate}: timing {len(arms)} arms")
        step_share = bench.step_share()
        results = [ArmResult(arm) for arm in arms]
        rounds = len(measured_alike(results)) + args.repetitions + 1
        with _progress(f"link {number} of {len(shares)}", rounds) as advance:
            for _ in measure(bench, link, results, repetitions=args.repetitions):
                advance(1)
        arm_results = [asdict(one) for one in results]
        point = {"wanted_share": share, "share": measured, "step_share": step_share, "rate": rate, "arms": arm_results}
        points.append(point)
        if dist.get_rank() == 0:
            meta["hardware"]["load"] = os.getloadavg()[0]
            write_results(args.output, {"format": FORMAT, "meta": meta, "points": points})
    dist.barrier()
    dist.destroy_process_group()
    return 1 if len(points) < len(shares) else 0


def _set_up(args: argparse.Namespace) -> Sizes:
    """All ranks become one expert-parallel group; returns the sizes of its models."""
    torch.set_num_threads(args.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks, expert_tensor_parallel_size=1)
    named = {name: getattr(args, name) for name in ("hidden", "experts", "layers", "tokens")}
    return Sizes(**named, ffn=4 * args.hidden, heads=args.hidden // 64)


def _origin(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """Where results come from, asked when the job begins: the repository may change while it runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    named = {name: getattr(args, name) for name in ("seed", "threads", "burst", "repetitions")}
    return {**provenance.provenance(device), **named, "ranks": dist.get_world_size(), "sizes": asdict(sizes)}


def _set_share(bench: Bench, link: Link, share: float | None) -> tuple[str, float]:
    """Give the links the rate of a share, or none where it is None; returns that rate and the share that it makes.

    Raises:
        ValueError: where no rate makes it.
    """
    if share is not None:
        return find_rate(bench, link, share, _say)
    if link.adjustable:
        link.set_rate(UNLIMITED)
    return UNLIMITED if link.adjustable else "as it is", bench.share()


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def _progress(label: str, rounds: int) -> AbstractContextManager[Advance]:
    """What shows on rank 0 how many rounds are done."""
    return nullcontext(lambda _: None) if dist.get_rank() else progress(label, rounds, in_bytes=False)
