"""Which tensor the routed experts read, and what a group is made of.

Positions, taps, slots and groups are the words of the ScMoE paper (arXiv 2404.05019), as docs/architecture.md has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_scmoe.config.groups import Group, groups_of_blocks, groups_of_pattern
from megatron_scmoe.config.rules import ConfigError, check_length, one_or_each
from megatron_scmoe.contracts import RoutedCall, SpanShape


class Shortcut(StrEnum):
    """The architecture of every group."""

    NONE = "none"
    SCMOE = "scmoe"
    DGMOE = "dgmoe"


class Position(StrEnum):
    """The tensor that the routed experts of a group read (ScMoE, section 3.1)."""

    POS1 = "pos1"
    POS2 = "pos2"
    POS3 = "pos3"
    FARSKIP = "farskip"


class Combine(StrEnum):
    """How the outputs of shared and routed experts are added (ScMoE, section 4: coefficient gates)."""

    ADD = "add"
    CG1 = "cg1"
    CG2 = "cg2"


class Norms(StrEnum):
    """Norms that a group has beside those of the stock model."""

    NONE = "none"
    UPSTREAM = "upstream"


class Router(StrEnum):
    """How experts are chosen and weighed."""

    CORE = "core"
    LONGCAT = "longcat"


class LatentScaling(StrEnum):
    """What multi-latent attention does to its latents behind their norms."""

    NONE = "none"
    LONGCAT = "longcat"


# Dense residual ops that lie behind the tap, the shared expert included, for each position. They lie in the last two
# blocks of a group whatever its size: pos1 [attention, SE], pos2 [MLP, attention, SE], pos3 [attention, MLP,
# attention, SE], farskip [SE].
WINDOW_OPS = {Position.POS1: 2, Position.POS2: 3, Position.POS3: 4, Position.FARSKIP: 1}

MOE_EVERY_CHOICES = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """The architecture of every group."""

    shortcut: Shortcut = Shortcut.NONE
    """Architecture of the MoE groups. 'none' is the stock Megatron model, bit for bit; 'scmoe' lets the routed experts
    read an earlier tensor than the dense part of the layer does, so that their all-to-all runs while attention, MLP and
    shared expert compute (arXiv 2404.05019); 'dgmoe' has no shared expert and two top-1 gates, one of which reads that
    earlier tensor and the other the current one (--moe-router-topk 2 stands for one expert of each)."""

    shortcut_position: tuple[Position, ...] = (Position.POS2,)
    """Tensor that the routed experts read. pos1: output of the preceding block; pos2: between attention and MLP of the
    preceding block; pos3: input of the preceding block; farskip: input of the block itself, which its shared expert
    reads, too (FarSkip-Collective, arXiv 2511.11505): with --moe-every 1, and --shortcut-landing 1 in spans. One value
    for all groups, or one for each group. With --moe-every 1 only pos1 and farskip exist."""

    shortcut_combine: Combine = Combine.CG1
    """How shared and routed experts are added. add: sum; cg1: a sigmoid gate on the shared expert (Megatron's
    --moe-shared-expert-gate, set for you); cg2: a softmax over two learned coefficients."""

    shortcut_norms: Norms = Norms.NONE
    """Norms beside those of the stock model. upstream: the two of Megatron's ShortcutMoE (NVIDIA/Megatron-LM 6959, on
    its main branch), for h + post(combine(shared(norm(h)), routed(pre(x)))): what the routed experts read has a norm of
    its own, and so has the sum of routed and shared output before it is added. scmoe only."""

    moe_every: int = 2
    """Blocks in a group; the last one of each group carries the MoE. Replaces --moe-layer-freq, which is derived from
    it. 1 puts an MoE in every block."""

    shortcut_span: int = 1
    """Neighbouring groups that run as one list of ops, in which routed outputs may land late (--shortcut-landing). No
    pipeline stage, and no unit of full recompute, may cut a span."""

    shortcut_landing: int = 0
    """Where the routed output of every group of a span but its last one is added. 0: at the end of its own group, as in
    the papers; K: behind the K-th op of the next group, so that its combine has that many ops more to hide behind. What
    later ops read is complete."""

    moe_share_groups: int = 1
    """Neighbouring groups that one MoE serves: the others use the router, the experts and the shared expert of the
    first, which appear once in checkpoints, optimizer and gradient reduction. dgmoe with 2 is the paper's
    DGMoE-Share."""

    router: Router = Router.CORE
    """How experts are chosen. core: by Megatron's router. longcat: as LongCat-Flash does (arXiv 2509.01322, section
    2.1): by the softmax over all experts plus a bias for each, which takes no part in the weights; they are the softmax
    times --moe-router-topk-scaling-factor and do not sum to one. The bias moves by --moe-router-bias-update-rate
    towards balance, as Megatron's does. scmoe only."""

    zero_experts: int = 0
    """Experts behind the --num-experts real ones that give a token back as it is (LongCat-Flash, section 2.1). They
    count among what --router longcat chooses from, have no parameters, and their tokens never travel."""

    latent_scaling: LatentScaling = LatentScaling.NONE
    """What --multi-latent-attention does to its latents. longcat: the norms of the latents of queries and of keys and
    values have an epsilon of 1e-6, whatever --norm-epsilon is, and their outputs are multiplied by
    sqrt(hidden size / rank of the latent) (LongCat-Flash, section 2.2)."""

    @property
    def enabled(self) -> bool:
        """Whether the model has any shortcut at all."""
        return self.shortcut is not Shortcut.NONE

    def borrows_moe(self, group_index: int) -> bool:
        """Whether group ``group_index`` uses the MoE of the group before it."""
        return group_index % self.moe_share_groups > 0

    def tap(self, group_index: int, num_ops: int) -> int:
        """Index among the ops of group ``group_index``, of ``num_ops`` before its MoE, at which its experts read."""
        return num_ops + 1 - WINDOW_OPS[self.position(group_index)]

    def span_shape(self, first_group: int, sizes: Sequence[int]) -> SpanShape:
        """The span that begins with group ``first_group``.

        Args:
            first_group: over the whole model.
            sizes: residual ops before the MoE of each of its groups.
        """
        has_shared_expert = self.shortcut is Shortcut.SCMOE
        calls: list[RoutedCall] = []
        first = 0
        for part, num_ops in enumerate(sizes):
            end = first + num_ops + has_shared_expert
            late = self.shortcut_landing > 0 and part < len(sizes) - 1
            landing = end + 1 + self.shortcut_landing if late else end
            calls.append(RoutedCall(first + self.tap(first_group + part, num_ops), landing, late, part))
            if not has_shared_expert:  # dgmoe's second gate reads what a shared expert would
                calls.append(RoutedCall(end, landing, late, part))
            first = end + 1
        return SpanShape(first, tuple(calls))

    def position(self, group_index: int) -> Position:
        """Position of group ``group_index`` (counted from 0 over the whole model)."""
        return one_or_each(self.shortcut_position, group_index)

    def groups(self, num_layers: int, pattern: str = "") -> tuple[Group, ...]:
        """The groups of a model of ``num_layers`` blocks; those of ``--hybrid-layer-pattern`` where that is set.

        Raises:
            ConfigError: where they cannot be cut.
        """
        if pattern:
            if self.moe_every != ArchitectureConfig.moe_every:
                raise ConfigError(
                    f"--hybrid-layer-pattern says where an MoE is: it is {pattern} and --moe-every is "
                    f"{self.moe_every}; drop --moe-every"
                )
            groups = groups_of_pattern(pattern)
            if not groups:
                raise ConfigError(f"a shortcut needs an MoE: --hybrid-layer-pattern is {pattern}; put an E into it")
            return groups
        if self.moe_every not in MOE_EVERY_CHOICES:
            raise ConfigError(
                f"a group has 1 to 4 blocks: --moe-every is {self.moe_every}; set it to one of {MOE_EVERY_CHOICES}"
            )
        if num_layers % self.moe_every:
            raise ConfigError(
                f"groups must be whole: --num-layers {num_layers} is not a multiple of --moe-every {self.moe_every}; "
                f"use {num_layers // self.moe_every * self.moe_every or self.moe_every} layers or another --moe-every"
            )
        return groups_of_blocks(num_layers, self.moe_every)

    def validate_architecture(self, groups: Sequence[Group]) -> None:
        """Raise ConfigError where ``groups`` cannot be like this."""
        if self.shortcut is Shortcut.DGMOE and self.shortcut_combine is not Combine.CG1:
            raise ConfigError(
                f"dgmoe has no shared expert to weigh: --shortcut is dgmoe and --shortcut-combine is "
                f"{self.shortcut_combine}; drop --shortcut-combine"
            )
        self._validate_router()
        self._validate_norms()
        self._validate_sharing(len(groups))
        check_length("--shortcut-position", self.shortcut_position, len(groups))
        self._validate_span(groups)
        for index, group in enumerate(groups):
            self._validate_position(index, group)

    def _validate_position(self, index: int, group: Group) -> None:
        position = self.position(index)
        if position is Position.FARSKIP:
            self._validate_farskip(index, group)
        elif self.tap(index, group.num_ops) < 0:
            raise ConfigError(
                f"{position} reads what the group's op {WINDOW_OPS[position] - 1} before its MoE reads: "
                f"--shortcut-position of group {index} is {position} and the group has {_counted(group.num_ops, 'op')} "
                f"before its MoE; use {_positions_of(group.num_ops) or 'a group with an op'}, or a longer group "
                "(--moe-every, or the pattern of a hybrid model)"
            )

    def _validate_norms(self) -> None:
        if self.shortcut_norms is Norms.NONE:
            return
        if self.shortcut is Shortcut.DGMOE:
            raise ConfigError(
                f"upstream's norms are those of an MoE with a shared expert: --shortcut-norms is {self.shortcut_norms} "
                f"and --shortcut is {self.shortcut}; use --shortcut scmoe or drop --shortcut-norms"
            )
        if self.shortcut_landing:
            raise ConfigError(
                f"upstream's second norm reads the sum of shared and routed output, which a late landing adds at two "
                f"places: --shortcut-norms is {self.shortcut_norms} and --shortcut-landing is {self.shortcut_landing}; "
                "use --shortcut-landing 0 or drop --shortcut-norms"
            )

    def _validate_router(self) -> None:
        if self.router is Router.LONGCAT and self.shortcut is Shortcut.DGMOE:
            raise ConfigError(
                f"dgmoe's two gates choose by scores alone: --router is {self.router} and --shortcut is "
                f"{self.shortcut}; use --router core or --shortcut scmoe"
            )
        if self.zero_experts < 0:
            raise ConfigError(f"experts are counted from 0: --zero-experts is {self.zero_experts}; use 0 for none")
        if self.zero_experts and self.router is not Router.LONGCAT:
            raise ConfigError(
                f"zero experts are chosen by LongCat-Flash's router: --zero-experts is {self.zero_experts} and "
                f"--router is {self.router}; add --router longcat"
            )

    def _validate_sharing(self, num_groups: int) -> None:
        if self.moe_share_groups < 1 or num_groups % self.moe_share_groups:
            raise ConfigError(
                f"an MoE serves the same number of groups everywhere: --moe-share-groups is {self.moe_share_groups} "
                f"and there are {num_groups} groups; use a divisor of {num_groups}"
            )

    def _validate_span(self, groups: Sequence[Group]) -> None:
        span, landing = self.shortcut_span, self.shortcut_landing
        if span < 1 or len(groups) % span:
            raise ConfigError(
                f"spans are whole: --shortcut-span is {span} and there are {len(groups)} groups; "
                f"use a divisor of {len(groups)}"
            )
        if landing and span == 1:
            raise ConfigError(
                f"a routed output lands late within a span: --shortcut-landing is {landing} and "
                "--shortcut-span is 1; use --shortcut-span 2, or 0 to land at the end of the group"
            )
        last = min(group.num_ops for index, group in enumerate(groups) if index % span or span == 1)
        if not 0 <= landing <= last:
            raise ConfigError(
                f"a routed output lands behind one of the next group's {last} residual ops, or with 0 at its own "
                f"group's end: --shortcut-landing is {landing}; use 0 to {last}"
            )

    def _validate_farskip(self, index: int, group: Group) -> None:
        if self.shortcut is Shortcut.DGMOE or group.num_ops > 1:
            raise ConfigError(
                f"farskip is an MoE with a shared expert behind every attention: --shortcut-position of group {index} "
                f"is farskip, --shortcut is {self.shortcut} and the group has {_counted(group.num_ops, 'op')} before "
                "its MoE; use --shortcut scmoe and --moe-every 1, or another position"
            )
        if self.shortcut_span > 1 and self.shortcut_landing != 1:
            raise ConfigError(
                f"farskip's routed outputs land behind the next attention: --shortcut-position of group {index} "
                f"is farskip and --shortcut-landing is {self.shortcut_landing}; use --shortcut-landing 1"
            )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _positions_of(num_ops: int) -> str:
    """Positions that a group of so many ops before its MoE has."""
    fit = [p for p, window in WINDOW_OPS.items() if window - 1 <= num_ops and p is not Position.FARSKIP]
    return " or ".join(f"--shortcut-position {position}" for position in fit)
