"""What a user can set: one frozen dataclass, from which the command line is generated.

The docstring below a field is the help text of its flag. Standard library only, so that refusals cost nothing.
Positions, taps, slots and groups are the words of the ScMoE paper (arXiv 2404.05019), as docs/architecture.md has them.
"""

from dataclasses import dataclass, fields
from enum import StrEnum


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the rule, the values, the fix."""


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


class Combine(StrEnum):
    """How the outputs of shared and routed experts are added (ScMoE, section 4: coefficient gates)."""

    ADD = "add"
    CG1 = "cg1"
    CG2 = "cg2"


class Overlap(StrEnum):
    """When the halves of the all-to-all run."""

    OFF = "off"
    FIXED = "fixed"


class Resume(StrEnum):
    """Which checkpoints a run may continue from."""

    SAME = "same"
    CHANGED = "changed"


# Dense residual ops that lie behind the tap, the shared expert included, for each position. They lie in the last two
# blocks of a group whatever its size: pos1 [attention, SE], pos2 [MLP, attention, SE], pos3 [attention, MLP,
# attention, SE].
WINDOW_OPS = {Position.POS1: 2, Position.POS2: 3, Position.POS3: 4}

MOE_EVERY_CHOICES = (1, 2, 3, 4)

# Fields that decide what the parameters mean. A checkpoint of other values loads without an error, since the names and
# shapes are the same, and is wrong: so they are compared on resume.
ARCHITECTURE_FIELDS = ("shortcut", "shortcut_position", "shortcut_combine", "moe_every", "moe_share_groups")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScMoEConfig:
    """Shortcut-connected mixture of experts: which architecture, and how its communication is hidden."""

    shortcut: Shortcut = Shortcut.NONE
    """Architecture of the MoE groups. 'none' is the stock Megatron model, bit for bit; 'scmoe' lets the routed experts
    read an earlier tensor than the dense part of the layer does, so that their all-to-all runs while attention, MLP and
    shared expert compute (arXiv 2404.05019); 'dgmoe' has no shared expert and two top-1 gates, one of which reads that
    earlier tensor and the other the current one (--moe-router-topk 2 stands for one expert of each)."""

    shortcut_position: tuple[Position, ...] = (Position.POS2,)
    """Tensor that the routed experts read. pos1: output of the preceding block; pos2: between attention and MLP of the
    preceding block; pos3: input of the preceding block. One value for all groups, or one for each group. With
    --moe-every 1 only pos1 exists."""

    shortcut_combine: Combine = Combine.CG1
    """How shared and routed experts are added. add: sum; cg1: a sigmoid gate on the shared expert (Megatron's
    --moe-shared-expert-gate, set for you); cg2: a softmax over two learned coefficients."""

    moe_every: int = 2
    """Blocks in a group; the last one of each group carries the MoE. Replaces --moe-layer-freq, which is derived from
    it. 1 puts an MoE in every block."""

    moe_share_groups: int = 1
    """Neighbouring groups that one MoE serves. 2 is DGMoE-Share: the second group of each pair uses the router and the
    experts of the first, which appear once in checkpoints, optimizer and gradient reduction. dgmoe only."""

    overlap: Overlap = Overlap.FIXED
    """off: every all-to-all is waited for at once (the sequential reference; same numbers, bit for bit). fixed: it
    flies while the dense ops run, and the experts run at --expert-slot."""

    expert_slot: tuple[int, ...] = ()
    """Place behind the tap where the experts run, counted from 1: slot k lies before the k-th dense op behind the tap,
    the last slot behind the shared expert (pos1 has slots 1 to 3, pos2 1 to 4, pos3 1 to 5; dgmoe one less each). One
    value for all groups, or one for each group. Default: the middle of the window."""

    shortcut_resume: Resume = Resume.SAME
    """Checkpoints to continue from. same: refuse one that was trained with other values of --shortcut,
    --shortcut-position, --shortcut-combine or --moe-every. changed: load it all the same, optimizer included, and say
    so: this is how a stock shared-expert checkpoint becomes ScMoE, or the other way round."""

    @property
    def enabled(self) -> bool:
        """Whether the model has any shortcut at all."""
        return self.shortcut is not Shortcut.NONE

    def borrows_moe(self, group_index: int) -> bool:
        """Whether group ``group_index`` uses the MoE of the group before it."""
        return group_index % self.moe_share_groups > 0

    @property
    def num_dense_ops(self) -> int:
        """Ops in a group's dense stream. dgmoe has no shared expert, which is the last one of scmoe."""
        return 2 * self.moe_every - (self.shortcut is Shortcut.DGMOE)

    def tap(self, group_index: int) -> int:
        """Index in the dense stream of group ``group_index`` at which its routed experts read."""
        return 2 * self.moe_every - WINDOW_OPS[self.position(group_index)]

    def num_slots(self, group_index: int) -> int:
        """Places behind the tap of group ``group_index`` where the experts may run."""
        return self.num_dense_ops - self.tap(group_index) + 1

    def position(self, group_index: int) -> Position:
        """Position of group ``group_index`` (counted from 0 over the whole model)."""
        return _one_or_each(self.shortcut_position, group_index)

    def slot(self, group_index: int) -> int:
        """Expert slot of group ``group_index``: the one set, else the middle of its window."""
        if self.expert_slot:
            return _one_or_each(self.expert_slot, group_index)
        return (self.num_slots(group_index) + 1) // 2

    def validate(self, num_layers: int) -> None:
        """Raise ConfigError where these settings cannot describe a model of ``num_layers`` blocks."""
        if not self.enabled:
            self._validate_stock()
            return
        if self.moe_every not in MOE_EVERY_CHOICES:
            raise ConfigError(
                f"a group has 1 to 4 blocks: --moe-every is {self.moe_every}; set it to one of {MOE_EVERY_CHOICES}"
            )
        if num_layers % self.moe_every:
            raise ConfigError(
                f"groups must be whole: --num-layers {num_layers} is not a multiple of --moe-every {self.moe_every}; "
                f"use {num_layers // self.moe_every * self.moe_every or self.moe_every} layers or another --moe-every"
            )
        if self.overlap is Overlap.OFF and self.expert_slot:
            raise ConfigError(
                f"a slot needs an overlap: --overlap is off and --expert-slot is {_shown(self.expert_slot)}; "
                "use --overlap fixed or drop --expert-slot"
            )
        if self.shortcut is Shortcut.DGMOE and self.shortcut_combine is not Combine.CG1:
            raise ConfigError(
                f"dgmoe has no shared expert to weigh: --shortcut is dgmoe and --shortcut-combine is "
                f"{self.shortcut_combine}; drop --shortcut-combine"
            )
        num_groups = num_layers // self.moe_every
        self._validate_sharing(num_groups)
        _check_length("--shortcut-position", self.shortcut_position, num_groups)
        _check_length("--expert-slot", self.expert_slot, num_groups)
        for group_index in range(num_groups):
            self._validate_group(group_index)

    def _validate_sharing(self, num_groups: int) -> None:
        if self.moe_share_groups not in (1, 2):
            raise ConfigError(
                f"an MoE serves one group or two: --moe-share-groups is {self.moe_share_groups} of {num_groups}; "
                "use 1 or 2"
            )
        if self.moe_share_groups == 1:
            return
        if self.shortcut is not Shortcut.DGMOE:
            raise ConfigError(
                f"sharing is part of dgmoe: --moe-share-groups is 2 and --shortcut is {self.shortcut}; "
                "use --shortcut dgmoe or drop --moe-share-groups"
            )
        if num_groups % 2:
            raise ConfigError(
                f"groups share in pairs: --moe-share-groups is 2 and there are {num_groups} groups; "
                "use an even number of groups"
            )

    def _validate_stock(self) -> None:
        """Without a shortcut the other flags of this group have no meaning: refuse rather than ignore them."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in ("shortcut", "shortcut_resume"):
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(
                    f"{flag} needs a shortcut: it is set to {_shown(value)} and --shortcut is none; "
                    f"add --shortcut scmoe or drop {flag}"
                )

    def _validate_group(self, group_index: int) -> None:
        position = self.position(group_index)
        if self.moe_every == 1 and position is not Position.POS1:
            raise ConfigError(
                f"{position} reads a preceding block of the same group: --moe-every is 1 and --shortcut-position of "
                f"group {group_index} is {position}; use --shortcut-position pos1 or --moe-every 2"
            )
        num_slots = self.num_slots(group_index)
        if not 1 <= self.slot(group_index) <= num_slots:
            raise ConfigError(
                f"{position} of {self.shortcut} has the slots 1 to {num_slots}: --expert-slot of group {group_index} "
                f"is {self.slot(group_index)}; use a value from 1 to {num_slots}"
            )


def _one_or_each[T](values: tuple[T, ...], group_index: int) -> T:
    return values[0] if len(values) == 1 else values[group_index]


def _check_length(flag: str, values: tuple[object, ...], num_groups: int) -> None:
    if len(values) > 1 and len(values) != num_groups:
        raise ConfigError(
            f"{flag} takes one value or one for each group: {len(values)} values and {num_groups} groups; "
            f"give 1 or {num_groups} values"
        )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
