"""A step of a tiny ScMoE model over the layout, whose gradient norms have to be equal.

Every data-parallel rank gets the same tokens, so that what each computes of replicated parameters has to agree before
anything is reduced: a rank that computes wrong would spoil the sum of all without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from ablation.arms import MODELS
from ablation.bench import VOCAB_SIZE, Sizes, builder
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config

from doctoring.check import Finding, ok, problem
from doctoring.job import Job, Layout
from megatron_scmoe.job.roll_call import in_words

ROUNDING = 1e-4
"""Relative difference of norms in fp32 that is no fault: on GPUs sums come in any order."""
SEED = 1234
_HEADS, _HEAD_WIDTH = 8, 16

_FIX = "its memory or arithmetic is faulty: test it (dcgmi diag -r 3, memtester), or leave that machine out"


def sizes(layout: Layout) -> Sizes:
    """Of a model that has a group of two blocks on each stage, and a part for each rank."""
    heads = max(_HEADS, layout.tensor_model_parallel_size)
    width = heads * _HEAD_WIDTH
    return Sizes(
        hidden=width,
        ffn=2 * width,
        heads=heads,
        experts=2 * layout.expert_model_parallel_size,
        layers=2 * layout.pipeline_model_parallel_size,
        tokens=32 * layout.context_parallel_size * layout.tensor_model_parallel_size,
    )


def _build(layout: Layout, of: Sizes) -> list[torch.nn.Module]:
    """This rank's part, with buffers for gradients."""
    torch.manual_seed(SEED)
    model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    split = asdict(layout) | {
        "sequence_parallel": layout.tensor_model_parallel_size > 1,
        "pipeline_dtype": torch.float32,
        "moe_router_force_load_balancing": False,
    }
    made = builder(MODELS["pos2"], of, **split)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return made.build_distributed_models(groups, DistributedDataParallelConfig())


def _batches(of: Sizes, number: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The same on all data-parallel ranks; each context-parallel one gets its part."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(number):
        ids = torch.randint(VOCAB_SIZE, (1, of.tokens + 1), generator=generator).to(device)
        batch = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        batch["position_ids"] = torch.arange(of.tokens, device=device).unsqueeze(0)
        yield get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def _loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.mean()
    return loss, {"loss": loss.detach()}


def _forward(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), _loss


def _replicated_norm(models: Iterable[torch.nn.Module]) -> float:
    """Of the gradients of parameters that every data-parallel rank has, by what this one computed."""
    parameters: list[Any] = [one for model in models for one in model.parameters() if getattr(one, "allreduce", True)]
    return float(torch.stack([one.main_grad.double().square().sum() for one in parameters]).sum().sqrt())


class Step:
    """See ``CATALOG``."""

    name, communicates = "step", True

    def look(self, job: Job) -> dict[str, Any]:
        """Gradient norms of this rank: of its own replicated parameters, and of the whole model."""
        job.join()
        of, micro_batches = sizes(job.layout), job.layout.pipeline_model_parallel_size
        models = _build(job.layout, of)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=1e-3, clip_grad=1.0), models)
        own: list[float] = []

        def finalize(chunks: list[torch.nn.Module], *args: Any, **options: Any) -> None:
            own.append(_replicated_norm(chunks))
            finalize_model_grads(chunks, *args, **options)

        get_model_config(models[0]).finalize_model_grads_func = finalize
        # Without the flags' virtual stages: this model has none, and parallel_state those of the training.
        get_forward_backward_func(pp_size=job.layout.pipeline_model_parallel_size, vp_size=None)(
            forward_step_func=_forward,
            data_iterator=_batches(of, micro_batches, job.device),
            model=models,
            num_microbatches=micro_batches,
            seq_length=of.tokens,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        replicas = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
        return {"host": job.host, "own": own[0], "norm": float(norm), "replicas": replicas}

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Norms that have to be equal."""
        return judged(seen)


def judged(seen: Sequence[dict[str, Any]]) -> list[Finding]:
    """What there is to say of all ranks' norms."""
    found = []
    broken = [rank for rank, one in enumerate(seen) if not (math.isfinite(one["own"]) and math.isfinite(one["norm"]))]
    if broken:
        return [problem(f"{in_words(broken)}: the gradient norm of a tiny step is no number", _FIX)]
    for ranks in sorted({tuple(one["replicas"]) for one in seen}):
        found += _odd_ones({rank: seen[rank]["own"] for rank in ranks}, seen)
    norms = [one["norm"] for one in seen]
    if len(groups := _alike(dict(enumerate(norms)))) > 1:
        values = "; ".join(f"{norms[ranks[0]]:.6g} on {in_words(ranks)}" for ranks in groups)
        found.append(
            problem(
                f"the norm of all gradients, summed over all ranks, is {values}",
                "a collective gives ranks other sums: set NCCL_NVLS_ENABLE=0, then NCCL_COLLNET_ENABLE=0, to find it",
            )
        )
    if not found:
        replicas = max(len(one["replicas"]) for one in seen)
        beside = (
            f"groups of {replicas} replicas agree before they are reduced" if replicas > 1 else "there are no replicas"
        )
        found.append(ok(f"gradient norm {norms[0]:.6g} on every rank; {beside}"))
    return found


def _odd_ones(norms: dict[int, float], seen: Sequence[dict[str, Any]]) -> list[Finding]:
    """Those of replicas that computed something else than most; where no most are alike, who agrees with whom."""
    groups = _alike(norms)
    if len(groups) == 1:
        return []
    usual, *others = sorted(groups, key=len, reverse=True)
    if 2 * len(usual) <= len(norms):  # nobody knows which are right
        agree = "; ".join(f"{in_words(ranks)} on {norms[ranks[0]]:.6g}" for ranks in groups)
        text = f"{in_words(sorted(norms))} computed gradient norms of the same tokens that differ: {agree}"
        return [problem(text, _FIX.replace("its", "one's", 1))]
    return [
        problem(
            f"rank {rank} on {seen[rank]['host']} computed a gradient norm of {norms[rank]:.6g}, and others "
            f"{norms[usual[0]]:.6g} of the same tokens",
            _FIX,
        )
        for rank in sorted(rank for ranks in others for rank in ranks)
    ]


def _alike(norms: dict[int, float]) -> list[list[int]]:
    """Ranks whose norms differ by rounding alone, by their first rank.

    Each is compared with the smallest of its run: by its neighbours many small differences would pass for none.
    """
    groups: list[list[int]] = []
    for rank in sorted(norms, key=lambda rank: norms[rank]):
        if groups and norms[rank] - norms[groups[-1][0]] <= ROUNDING * norms[rank]:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return sorted(sorted(ranks) for ranks in groups)
