"""Plans that a checkpoint keeps: under what they were measured, and whether this run may go on with them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_scmoe.config import ARCHITECTURE_FIELDS, CODEC_FIELDS, Overlap, ScMoEConfig
from megatron_scmoe.layers.pipelined import PipelinedMoELayer
from megatron_scmoe.layers.span import GroupSpan
from megatron_scmoe.mcore import stages
from megatron_scmoe.mcore.nodes import this_node
from megatron_scmoe.overlap.adaptive import Tuner, chunk_counts
from megatron_scmoe.overlap.kept import Plans, from_saved_form
from megatron_scmoe.training import queues
from megatron_scmoe.training.agreement import digests, gathered

type Planned = GroupSpan | PipelinedMoELayer
"""What has a plan of its own."""


class KeptPlans:
    """The plans of a checkpoint, as this rank read them.

    Args:
        args: Megatron's namespace; ``overlap_plans`` in it is what the checkpoint kept.
        scmoe: the settings.

    Attributes:
        conditions: of this run; ``agree`` finds them.
    """

    def __init__(self, args: Namespace, scmoe: ScMoEConfig) -> None:
        self._args, self._scmoe = args, scmoe
        self._entries: dict[str, dict[str, Any]] = getattr(args, "overlap_plans", {})
        self._plans = from_saved_form(self._entries)
        self.conditions: dict[str, Any] = {}

    def agree(self, stage: dist.ProcessGroup) -> None:
        """Find this run's conditions, and drop the plans where ranks have others; every rank of the stage calls it."""
        self.conditions = conditions(self._args, stage)
        self.keep_what_all_have(stage)

    def keep_what_all_have(self, stage: dist.ProcessGroup) -> None:
        """Ranks that read plans of different checkpoints, as a network folder's caches may make them, keep none.

        They would hang in the first all-to-all of another size.
        """
        if len(set(digests(self._entries, stage))) > 1:
            self._entries, self._plans = {}, {}
            if stages.is_stage_root():
                print(" > overlap: ranks found plans of different checkpoints: measuring anew", flush=True)

    def of(self, group: Planned) -> Plans | None:
        """The plans of ``group``, where this run could have found them too and ops take as long as they did."""
        plans = self._plans.get(group.group_index)
        if plans is None or self._scmoe.overlap is not Overlap.ADAPTIVE or self._changed(group):
            return None
        both = (plans.training, plans.forward)
        fits = all(plan.chunks <= max(self._counts) and group.shape.has(plan) for plan in both)
        return plans if fits else None

    @property
    def _counts(self) -> tuple[int, ...]:
        """Numbers of chunks to choose from: one alone where CUDA has one queue.

        There a collective that waits for another one holds up whatever is launched behind both.
        """
        return (1,) if queues.launches_in_one() else chunk_counts(self._scmoe.overlap_chunks)

    def _changed(self, group: Planned) -> str:
        """Which condition is not the one under which its plans in the checkpoint were measured; empty if none."""
        then = self._entries.get(str(group.group_index), {}).get("conditions", {})
        changes = (
            f"{name} {then.get(name, 'unknown')}, now {now}"
            for name, now in self.conditions.items()
            if then.get(name) != now
        )
        return next(changes, "")

    def tuner(self, groups: Mapping[int, Planned], iteration: int) -> Tuner:
        """A tuner of ``groups``, which goes on from these plans where they hold for all of them.

        Args:
            groups: of this stage, by their index over the whole model.
            iteration: steps that are done.
        """
        known = all(self.of(group) for group in groups.values())
        if self._entries and not known and stages.is_stage_root():
            changes = [self._changed(group) for index, group in groups.items() if index in self._plans]
            changed = next(filter(None, changes), "")
            why = f"were measured with {changed}" if changed else "do not fit --overlap-chunks or the groups"
            why = why if self._plans else "were saved by an older version"
            print(f" > overlap: the checkpoint's plans {why}: measuring anew")
        if max(self._counts) < chunk_counts(self._scmoe.overlap_chunks)[-1] and stages.is_stage_root():
            print(
                " > overlap: CUDA_DEVICE_MAX_CONNECTIONS is 1, so that chunks would hold one another up: "
                f"--overlap-chunks is {self._scmoe.overlap_chunks}, and 1 is tried",
                flush=True,
            )
        kept = [self._entries[str(index)] for index in groups] if known else []
        if kept and kept[0]["iteration"] >= iteration:  # --finetune counts from 0 again
            for one in self._entries.values():
                one["iteration"] = iteration - 1
        return Tuner(
            {index: group.shape for index, group in groups.items()},
            {index: Plans(group.plan, group.forward_plan) for index, group in groups.items()},
            fixed={index: group.first_plan for index, group in groups.items()},
            counts=self._counts,
            interval=self._scmoe.overlap_interval,
            settled_for=iteration - 1 - kept[0]["iteration"] if kept else None,
            hidden_share=min((one["hidden_share"] for one in kept), default=None),
        )


def conditions(args: Namespace, stage: dist.ProcessGroup) -> dict[str, Any]:
    """What decides how long an op takes, and with it which plan is best; every rank of the stage calls it.

    Its answer is the same on all of them: a rank that kept its plans while another measures would hang.
    """
    names = (
        *ARCHITECTURE_FIELDS,
        *CODEC_FIELDS,
        *("a2a_weights_apart_above", "a2a_unique"),
        *("moe_router_topk", "moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity"),
        *("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
        *("context_parallel_size", "micro_batch_size", "seq_length", "transformer_impl", "bf16", "fp16"),
        *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
        *("moe_permute_fusion", "moe_router_fusion", "moe_grouped_gemm", "sequence_parallel"),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    devices, nodes = zip(*gathered((device, this_node()), stage), strict=True)
    found = {name: getattr(args, name) for name in names}
    found |= {"device": ", ".join(sorted(set(devices))), "ranks on nodes": sorted(Counter(nodes).values())}
    return json.loads(json.dumps(found))  # as a checkpoint gives them back: no tuples
