"""Dry runs of a few parts of a model, which tell what ranks of its many layouts hold."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

from command_line import UserError

from megatron_scmoe.config import Position
from planning import settings
from planning.dry import DryRun, dry_run
from planning.settings import PATTERN
from planning.units import Units

GROUPED = "--moe-grouped-gemm"
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""What Megatron insists on with tensor or context parallelism, up to Hopper."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Dry runs of micro-batches of one sequence, on stages of a unit each: ``stages_of_probe`` says which.

    Attributes:
        flags: without those that are chosen.
        units: of the model.
        context: context-parallel ranks.
        ep: expert-parallel ranks, 2 at least where there are experts: only then Core tells them from the rest.
    """

    flags: Sequence[str]
    units: Units
    context: int
    ep: int

    @classmethod
    def of(cls, flags: Sequence[str], units: Units) -> Probe:
        """Of the model of ``flags``."""
        experts = settings.whole_of(flags, "--num-experts", "1")
        return cls(
            flags=settings.not_chosen(flags),
            units=units,
            context=settings.whole_of(flags, "--context-parallel-size", "1"),
            ep=next((size for size in range(2, experts + 1) if experts % size == 0), 1),
        )

    def __call__(self, tp: int, etp: int, module: str = "") -> DryRun:
        """With so many tensor and expert-tensor parallel ranks; ``module`` is computed again.

        Raises:
            UserError: where the entry script refuses it.
        """
        stages = stages_of_probe(self.units.segments)
        ranks = lcm(tp * self.context, self.ep * etp)
        words = ["--pipeline-model-parallel-size", len(stages), "--micro-batch-size", 1]
        words += ["--global-batch-size", ranks // (tp * self.context), "--tensor-model-parallel-size", tp]
        words += ["--expert-model-parallel-size", self.ep]
        if tp > 1:
            words += ["--sequence-parallel", "--expert-tensor-parallel-size", etp]
        if module:
            words += ["--recompute-granularity", "selective", "--recompute-modules", module]
        flags = list(self.flags)
        if self.units.segments[0]:
            words += [PATTERN, "|".join(stages) + self.units.behind]
        else:
            flags = settings.without(flags, ["--num-layers"])
            words += ["--num-layers", self.units.size * len(stages)]
        if self.units.freq:
            flags = settings.without(flags, ["--moe-layer-freq"])
            words += ["--moe-layer-freq", str([*self.units.freq] * len(stages))]
        elif self._one_layer and settings.value_of(flags, "--shortcut", "none") != "none":
            words += ["--shortcut-position", Position.POS1]
        return dry_run([*flags, *map(str, words)], len(stages) * ranks, ENVIRONMENT)

    @property
    def _one_layer(self) -> bool:
        """Whether some group has one op alone before its MoE, which has but one position."""
        return self.units.size == 1 or bool(self.units.segments[0])


def stages_of_probe(segments: Sequence[str]) -> list[str]:
    """The first unit, one of each kind, and the last one: so the first and last have a like without what is outside."""
    return [segments[0], *dict.fromkeys(segments), segments[-1]]


def modules_of(args: Namespace, segments: Sequence[str]) -> list[str]:
    """What a model has that Core may compute again by itself (--recompute-modules)."""
    symbols = set("".join(segments))
    has = {
        "core_attn": not symbols or bool(symbols & set("*+")),
        "mlp": not symbols or "-" in symbols,
        "mla_up_proj": bool(args.multi_latent_attention),
        "shared_experts": bool(args.num_experts and args.moe_shared_expert_intermediate_size),
        "moe_act": bool(args.num_experts),
        "layernorm": True,
        "moe": bool(args.num_experts),
    }
    return [name for name, is_there in has.items() if is_there]


def accepted(probe: Probe, modules: Sequence[str]) -> tuple[Mapping[str, DryRun], Mapping[str, str]]:
    """Dry runs that compute each of ``modules`` again, and why there are none of the others."""
    found, refused = {}, {}
    for module in modules:
        if module == "moe_act" and GROUPED in probe.flags:
            refused[module] = f"it needs {GROUPED}, without which dry runs build experts: nobody knows what it frees"
            continue
        try:
            found[module] = probe(1, 1, module)
        except UserError as error:
            refused[module] = str(error)
    return found, refused
