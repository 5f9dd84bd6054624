"""What is compared: every arm is a model, how its tokens are routed, and a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_scmoe.config import Codec, Evaluation, Position, ScMoEConfig, Shortcut, Unique

BASELINE = "top-2"
"""The arm that speed-ups are relative to: Megatron's own layer, with two experts for each token."""

CARRIES: dict[str, dict[str, Any]] = {
    "tokens": {},
    "lsh": {
        **{"a2a_codec": Codec.LSH, "lsh_hashes": 12, "lsh_target_rate": 0.2},
        "lsh_evaluation": Evaluation.CENTROIDS,  # forward alone is timed as what it is in training
    },
    "unique": {"a2a_unique": Unique.RANK},
    "bf16": {"a2a_codec": Codec.BF16},
    "fp8": {"a2a_codec": Codec.FP8},
    "unique fp8": {"a2a_unique": Unique.RANK, "a2a_codec": Codec.FP8},
}
"""What the all-to-all carries, by name: fields of ``ScMoEConfig``."""
EXACT_OR_ROUNDED = ("unique", "bf16", "fp8", "unique fp8")
"""Of these, what carries every token."""


@dataclass(frozen=True, slots=True)
class Model:
    """One architecture; arms of the same architecture share its parameters.

    Attributes:
        shortcut: none, scmoe or dgmoe.
        position: of the shortcut.
        topk: experts of each token, as Megatron counts them.
        shared_expert: whether there is one beside the routed experts.
        moe_every: blocks in a group.
        pipelined: for shortcut none, our layer in the place of Megatron's.
        carries: what travels, key of ``CARRIES``.
        span: groups that run together; in a span of several, routed outputs land one op into the next group.
    """

    shortcut: str = "none"
    position: str = "pos2"
    topk: int = 1
    shared_expert: bool = False
    moe_every: int = 2
    pipelined: bool = False
    carries: str = "tokens"
    span: int = 1


MODELS = {
    BASELINE: Model(topk=2),
    "top-1": Model(topk=1),
    "shared-expert": Model(topk=1, shared_expert=True),
    "top-2 pipelined": Model(topk=2, pipelined=True),
    "top-1 pipelined": Model(topk=1, pipelined=True),
    "shared-expert pipelined": Model(topk=1, shared_expert=True, pipelined=True),
    "pos1": Model("scmoe", "pos1", 1, True),
    "pos2": Model("scmoe", "pos2", 1, True),
    "pos3": Model("scmoe", "pos3", 1, True),
    "pos2 top-2": Model("scmoe", "pos2", 2, True),
    "dgmoe": Model("dgmoe", "pos2", 2, False),
    "every-block pos1": Model("scmoe", "pos1", 1, True, moe_every=1),
    "pos2 span 2": Model("scmoe", "pos2", 1, True, span=2),
    "pos2 top-2 span 2": Model("scmoe", "pos2", 2, True, span=2),
    "dgmoe span 2": Model("dgmoe", "pos2", 2, False, span=2),
    "every-block pos1 span 2": Model("scmoe", "pos1", 1, True, moe_every=1, span=2),
    "top-2 lsh": Model(topk=2, pipelined=True, carries="lsh"),
    "pos2 lsh": Model("scmoe", "pos2", 1, True, carries="lsh"),
    "pos2 top-2 lsh": Model("scmoe", "pos2", 2, True, carries="lsh"),
    **{f"top-2 {name}": Model(topk=2, pipelined=True, carries=name) for name in EXACT_OR_ROUNDED},
    **{f"pos2 top-2 {name}": Model("scmoe", "pos2", 2, True, carries=name) for name in EXACT_OR_ROUNDED},
}

STOCK = (BASELINE, "top-1", "shared-expert")


def cost_model(model: str) -> str:
    """The model whose ops are measured for arms of ``model``: Megatron's own layers make no marks, ours in their place
    computes the same.
    """
    return f"{model} pipelined" if model in STOCK else model


COST_MODEL = cost_model(BASELINE)
"""The model whose sequential run says what share of the baseline's MoE time is the all-to-all."""

CHUNKS = (1, 2, 4)
"""Numbers of chunks that are tried where a plan may have several."""
SHORTCUTS = tuple(name for name, model in MODELS.items() if model.shortcut != "none")
EVERY_SLOT = ("pos1", "pos2", "pos3", "pos2 top-2")
"""Models for which each fixed slot is an arm."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing that is timed.

    Attributes:
        name: unique; what people read.
        model: key of ``MODELS``.
        mode: ``stock``, ``off``, ``slot K``, ``chunks N``, ``adaptive`` or ``adaptive chunks``.
        routing: ``balanced`` (Megatron's force-balancing) or ``real`` (the router's own choice).
        recorded: whether marks are recorded while it is timed: what measuring itself costs.
    """

    name: str
    model: str
    mode: str
    routing: str = "balanced"
    recorded: bool = False

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """Numbers of chunks among which its plan is chosen."""
        if self.mode == "adaptive chunks":
            return CHUNKS
        word, _, number = self.mode.partition(" ")
        return (int(number),) if word == "chunks" else (1,)

    @property
    def adaptive(self) -> bool:
        """Whether its plan is found by measuring."""
        return self.mode.startswith("adaptive")


def num_slots(model: Model) -> int:
    """Places behind the tap where its experts may run."""
    scmoe = ScMoEConfig(
        shortcut=Shortcut(model.shortcut), shortcut_position=(Position(model.position),), moe_every=model.moe_every
    )
    (call,) = scmoe.span_shape(0, [2 * model.moe_every - 1]).calls
    return call.num_slots


def all_arms() -> list[Arm]:
    """Every arm, the baseline first."""
    arms = [Arm(name, name, "stock") for name in STOCK]
    arms += [
        Arm(f"{name} {chunks} chunks", f"{name} pipelined", f"chunks {chunks}") for name in STOCK for chunks in (2, 4)
    ]
    arms += [Arm(f"{name} off", name, "off") for name in ("top-2 lsh", *(f"top-2 {one}" for one in EXACT_OR_ROUNDED))]
    for name in SHORTCUTS:
        arms.append(Arm(f"{name} off", name, "off"))
        if name in EVERY_SLOT:
            slots = range(1, num_slots(MODELS[name]) + 1)
            arms += [Arm(f"{name} slot {slot}", name, f"slot {slot}") for slot in slots]
        arms.append(Arm(f"{name} adaptive", name, "adaptive"))
        arms.append(Arm(f"{name} adaptive chunks", name, "adaptive chunks"))
    arms.append(Arm("pos2 adaptive (recorded)", "pos2", "adaptive", recorded=True))
    arms += [
        Arm(f"{BASELINE} (real routing)", BASELINE, "stock", "real"),
        Arm("pos2 adaptive (real routing)", "pos2", "adaptive", "real"),
    ]
    return arms


def chosen_arms(words: list[str]) -> list[Arm]:
    """The arms whose name or model is among ``words``, and the baseline.

    Raises:
        ValueError: for a word that names nothing.
    """
    arms = all_arms()
    for word in words:
        if not any(word in (arm.name, arm.model) for arm in arms):
            raise ValueError(word)
    return [arm for arm in arms if not words or arm.name == BASELINE or {arm.name, arm.model} & set(words)]
