"""What a training step computes: ops of pipeline stages, and how they are laid out on GPUs. Standard library only.

Sizes are those of the whole model; the layout says how they are cut. Ops are Megatron's submodules, each with the norm
before it and the residual behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_scmoe.config.overlap import Overlap
from megatron_scmoe.contracts import Plan, SpanShape, TransferName
from planning.training import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Self-attention; multi-latent where ``kv_latent`` is set.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values; as many as of queries with latents.
        head_dim: of queries and keys, without ``rope_dim``.
        value_dim: of values; 0: ``head_dim``.
        q_latent: rank of the queries' latent; 0: none.
        kv_latent: rank of the latent of keys and values; 0: none.
        rope_dim: what latent attention adds to ``head_dim`` for positions.
        window: positions that a query sees; 0: all before it.
        shared_kv: whether values are the keys.
        out_latent: rank of the latent in which each of ``out_groups`` groups of heads is put out; 0: none.
        gated: whether the output is multiplied with a gate of its own.
        fused: whether scores stay on the chip; else they go to memory and back, those behind the token, too.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int = 0
    q_latent: int = 0
    kv_latent: int = 0
    rope_dim: int = 0
    window: int = 0
    shared_kv: bool = False
    out_latent: int = 0
    out_groups: int = 1
    gated: bool = False
    fused: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba:
    """A Mamba-2 mixer.

    Attributes:
        heads: of the state-space model.
        head_dim: of each.
        state: of each channel.
        groups: of heads that share B and C.
        kernel: of the convolution.
    """

    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A dense MLP or a shared expert.

    Attributes:
        width: of the middle.
        gated: whether a third matrix makes a gate (SwiGLU).
        owners: places of the model that share its parameters, and count a part each (--moe-share-groups).
    """

    width: int
    gated: bool = True
    owners: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Router, routed experts, and the shared expert where it is not an op of its own (as it is in a :class:`Span`).

    Attributes:
        experts: routed ones, of all ranks.
        top_k: experts that compute a token; a mean, where some of the choice are zero experts, which cost nothing.
        width: of the middle of each expert.
        gated: whether a third matrix makes a gate.
        latent: width in which tokens travel and experts read (--moe-latent-size); 0: the hidden size.
        shared: the shared expert.
        sent: part of the rows that travel and are computed (less than 1 with a codec).
        carried: part of a row's bytes that travels; 0 where a bound leaves out all that flies.
        rounded: transfers in which values have 8 bits (--fp8-transfers with --a2a-codec fp8).
        once: part of the rows that travels where a rank gets a token once (--a2a-unique); None: a row for each expert.
        beside: bytes of gate weights, and of which experts they are, that a row takes along.
        beside_back: bytes of the weights' gradients that come back with a row's.
        limited: part of the experts' groups of which a token has any (--moe-router-group-topk over all of them).
        bias: whether experts have biases (--add-bias-linear).
        owners: as of an MLP; both calls of a group of dgmoe are such places, too.
    """

    experts: int
    top_k: float
    width: int
    gated: bool = True
    latent: int = 0
    shared: Mlp | None = None
    sent: float = 1.0
    carried: float = 1.0
    rounded: frozenset[TransferName] = frozenset()
    once: float | None = None
    beside: float = 0.0
    beside_back: float = 0.0
    limited: float = 1.0
    bias: bool = False
    owners: int = 1


@dataclass(frozen=True, slots=True)
class Embedding:
    """The table of the vocabulary, looked up."""


@dataclass(frozen=True, slots=True)
class Output:
    """Final norm, output layer and cross entropy.

    Attributes:
        own: whether it has a table of its own; what predicts further tokens reads the model's.
    """

    own: bool = True


@dataclass(frozen=True, slots=True)
class GroupEnd:
    """The end of a span's group, which adds what is pending."""


DenseOp = Attention | Mamba | Mlp | GroupEnd


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Ops beside which calls of experts run: groups with a shortcut, or the stock layer in chunks.

    Attributes:
        ops: one for each op of ``shape``; shared experts are MLPs.
        calls: one for each call of ``shape``, without shared experts.
        shape: as the project's configuration gives it (``ArchitectureConfig.span_shape``).
        overlap, chunks: off, at a fixed place, or where the solver puts it; numbers of chunks to choose from.
        plan: the fixed place; None: experts spread evenly over their windows, in the first number of chunks.
    """

    ops: tuple[DenseOp, ...]
    calls: tuple[Moe, ...]
    shape: SpanShape
    overlap: Overlap = Overlap.ADAPTIVE
    chunks: tuple[int, ...] = (1,)
    plan: Plan | None = None


Single = Embedding | DenseOp | Moe | Output
Op = Single | Span
Stage = tuple[Op, ...]
"""What one pipeline stage computes of a micro-batch, its virtual stages together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many GPUs share what (Megatron's sizes of parallel groups).

    Attributes:
        gpus: all of them.
        tp: tensor parallel.
        pp: pipeline stages.
        vp: virtual stages of each.
        cp: context parallel.
        ep: expert parallel.
        etp: tensor parallel within experts.

    Raises:
        ValueError: for sizes that do not divide the GPUs.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for name, size in (
            ("tp x cp x pp", self.tp * self.cp * self.pp),
            ("ep x etp x pp", self.ep * self.etp * self.pp),
        ):
            if size < 1 or self.gpus % size:
                raise ValueError(f"{name} is {size}, which does not divide {self.gpus} GPUs")

    @property
    def dp(self) -> int:
        """Data parallel ranks of what is no expert."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Data parallel ranks of experts."""
        return self.gpus // (self.ep * self.etp * self.pp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One training step.

    Attributes:
        stages: of the pipeline, ``layout.pp`` of them.
        hidden: width of the residual stream.
        vocabulary: padded size.
        tied: whether embedding and output layer share their table.
        seq_length: tokens of a sequence.
        micro_batch: sequences of a micro-batch of one data parallel rank.
        global_batch: sequences of a step.
        layout: on the GPUs.
        training: how it runs.

    Raises:
        ValueError: for stages that are not the layout's, or a batch that is not whole micro-batches.
    """

    stages: tuple[Stage, ...]
    hidden: int
    vocabulary: int
    seq_length: int
    micro_batch: int
    global_batch: int
    layout: Layout
    training: Training = field(default_factory=Training)
    tied: bool = False

    def __post_init__(self) -> None:
        if len(self.stages) != self.layout.pp:
            raise ValueError(f"{len(self.stages)} stages for {self.layout.pp} pipeline ranks")
        if self.global_batch % (self.micro_batch * self.layout.dp):
            raise ValueError(
                f"a global batch of {self.global_batch} is not whole micro-batches of {self.micro_batch} on "
                f"{self.layout.dp} data parallel ranks"
            )

    @property
    def micro_batches(self) -> int:
        """Of one data parallel rank in a step."""
        return self.global_batch // (self.micro_batch * self.layout.dp)
