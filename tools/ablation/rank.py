"""One rank of the ablation: sets up Megatron's groups, goes through the shares, lets rank 0 write."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Before any import of Megatron, which decides at import time what it finds.
    from megatron_scmoe.cpu import backend as cpu_backend

    cpu_backend.install()

from megatron.core import parallel_state
from slow_network.control import Control

from ablation.arms import MODELS, Arm
from ablation.bench import Bench, Sizes
from ablation.link import UNLIMITED, Link, find_rate
from ablation.measure import ArmResult, measure
from ablation.output import meta_of, write_results


class Progress:
    """Says on rank 0 what is going on and how long it will take."""

    def __init__(self, rank: int, total: int) -> None:
        self._rank = rank
        self._total = total
        self._done = 0
        self._began_s = time.perf_counter()
        self._said_s = 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        if self._rank == 0:
            print(text, flush=True)

    def step(self) -> None:
        """One of ``total`` equal steps is done."""
        self._done += 1
        now_s = time.perf_counter()
        if now_s - self._said_s > 10.0:
            self._said_s = now_s
            left_s = (now_s - self._began_s) / self._done * (self._total - self._done)
            self.say(f"  {self._done} of {self._total} rounds, about {timedelta(seconds=round(left_s))} left")


def run_rank(args: argparse.Namespace, arms: list[Arm]) -> int:
    """What each rank does; rank 0 writes the results."""
    torch.set_num_threads(args.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks, expert_tensor_parallel_size=1)
    sizes = Sizes(
        hidden=args.hidden,
        ffn=4 * args.hidden,
        heads=args.hidden // 64,
        experts=args.experts,
        layers=args.layers,
        tokens=args.tokens,
    )
    bench = Bench(arms, sizes, args.seed)
    link = Link(Control.from_environment())
    shares: list[float | None] = [*args.comm_share] if link.adjustable else []
    if args.unlimited or not link.adjustable:
        shares.append(None)
    models = len({arm.model for arm in arms})
    progress = Progress(dist.get_rank(), len(shares) * (models + args.repetitions + 1))
    meta = meta_of(args, sizes, ranks)
    if any(MODELS[arm.model].sent_rate < 1 for arm in arms):
        progress.say("finding how many hash functions send a part of the rows")
        bench.find_rates()
    points, missed = [], 0
    for share in shares:
        try:
            if share is None:
                if link.adjustable:
                    link.set_rate(UNLIMITED)
                rate, measured = UNLIMITED if link.adjustable else "as it is", bench.share()
            else:
                rate, measured = find_rate(bench, link, share, progress.say)
        except ValueError as error:
            progress.say(f"ablate_overlap.py: {error}")
            missed += 1
            continue
        progress.say(f"share {measured:.3f} at {rate}: timing {len(arms)} arms")
        step_share = bench.step_share()
        results = [ArmResult(arm) for arm in arms]
        for _ in measure(bench, link, results, repetitions=args.repetitions, say=progress.say):
            progress.step()
        arm_results = [asdict(one) for one in results]
        point = {"wanted_share": share, "share": measured, "step_share": step_share, "rate": rate, "arms": arm_results}
        points.append(point)
        if dist.get_rank() == 0:
            write_results(args, meta, points)
    dist.barrier()
    dist.destroy_process_group()
    return 1 if missed else 0
