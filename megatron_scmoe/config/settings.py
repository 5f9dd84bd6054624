"""All settings together: one frozen dataclass for each subject, from which the command line is generated.

The docstring below a field is the help text of its flag. Standard library only, so that refusals cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

from megatron_scmoe.config.architecture import ArchitectureConfig, Shortcut
from megatron_scmoe.config.codec import CodecConfig, Evaluation
from megatron_scmoe.config.job import JobConfig
from megatron_scmoe.config.overlap import Overlap, OverlapConfig
from megatron_scmoe.config.rules import ConfigError, check_length, flag_of, shown
from megatron_scmoe.contracts import Plan
from megatron_scmoe.overlap.plan import even_plan, sequential_plan


class Resume(StrEnum):
    """Which checkpoints a run may continue from."""

    SAME = "same"
    CHANGED = "changed"


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """What a run does with checkpoints of others."""

    shortcut_resume: Resume = Resume.SAME
    """Checkpoints to continue from. same: refuse one that was trained with other values of --shortcut,
    --shortcut-position, --shortcut-combine, --shortcut-norms, --moe-every, --shortcut-span, --shortcut-landing,
    --moe-share-groups, --router, --zero-experts, --latent-scaling, --a2a-codec, --lsh-compensation or --lsh-rank.
    changed: load it all the same, optimizer included (with Transformer Engine where
    --dist-ckpt-optim-fully-reshardable saved it), and say so: this is how a stock shared-expert checkpoint becomes
    ScMoE, or the other way round."""


SUBJECTS = {
    "architecture": ArchitectureConfig,
    "overlap": OverlapConfig,
    "what travels": CodecConfig,
    "checkpoints": ResumeConfig,
    "the job": JobConfig,
}
"""By what the group of its flags is called, in their order."""

ARCHITECTURE_FIELDS = (
    *(field.name for field in fields(ArchitectureConfig)),
    *("a2a_codec", "fp8_transfers", "lsh_compensation", "lsh_rank"),
)
"""Fields that decide what the parameters mean. A checkpoint of other values loads without an error, since the names and
shapes are the same, and is wrong: so they are compared on resume."""

CODEC_FIELDS = tuple(field.name for field in fields(CodecConfig) if field.name not in ("lsh_evaluation", "a2a_unique"))
"""Fields with which a checkpoint was trained, and goes on."""

_NEEDS_SHORTCUT = (*(field.name for field in fields(ArchitectureConfig) if field.name != "shortcut"), "expert_slot")


@dataclass(frozen=True, kw_only=True)
class ScMoEConfig(JobConfig, ResumeConfig, CodecConfig, OverlapConfig, ArchitectureConfig):
    """Shortcut-connected mixture of experts: which architecture, and how its communication is hidden."""

    def plan(self, first_group: int, sizes: Sequence[int]) -> Plan:
        """The plan that a span starts with; the arguments are those of ``span_shape``.

        Slots that are set, each for the first call of its group; else chunks are spread evenly over a call's window.
        """
        shape = self.span_shape(first_group, sizes)
        if self.overlap is Overlap.OFF:
            return sequential_plan(shape)
        if self.overlap is Overlap.ADAPTIVE:
            return even_plan(shape, chunks=1)
        slots = list(even_plan(shape, self.overlap_chunks).slots)
        for part in range(len(sizes)):
            if own := self.slots(first_group + part):
                slots[shape.first_call_of(part)] = own * self.overlap_chunks if len(own) == 1 else own
        return Plan(tuple(slots))

    @property
    def replaces_stock_moe(self) -> bool:
        """Whether the MoE layers of the stock model are ours: their tokens travel in chunks, compressed, or once."""
        return not self.enabled and (self.overlap_chunks > 1 or self.compresses or self.sends_once)

    @property
    def overlaps(self) -> bool:
        """Whether collectives of ours fly beside computation."""
        return (self.enabled or self.replaces_stock_moe) and self.overlap is not Overlap.OFF

    @property
    def flies_side_by_side(self) -> bool:
        """Whether one of these collectives may be launched while another one is under way.

        Those of one call in one chunk follow one another; those of chunks, of two gates and of late landings do not.
        """
        several = self.overlap_chunks > 1 or self.shortcut is Shortcut.DGMOE or self.shortcut_landing > 0
        return self.overlaps and several

    @property
    def watches_steps(self) -> bool:
        """Whether anything has to be done between two steps."""
        return self.overlap is Overlap.ADAPTIVE or bool(self.overlap_report) or self.compresses

    def validate(self, num_layers: int, pattern: str = "") -> None:
        """Raise ConfigError where these settings cannot describe a model.

        Args:
            num_layers: its blocks.
            pattern: what stands in the place of blocks in a hybrid model.
        """
        self.validate_codec()
        self.validate_overlap()
        self.validate_job()
        self._validate_weights()
        if not self.enabled:
            self._validate_stock()
            return
        if self.sends_once and self.shortcut is Shortcut.DGMOE:
            raise ConfigError(
                "each gate of dgmoe chooses one expert, so that no token goes to a rank twice: --a2a-unique is "
                f"{self.a2a_unique} and --shortcut is {self.shortcut}; drop --a2a-unique"
            )
        groups = self.groups(num_layers, pattern)
        self.validate_architecture(groups)
        check_length("--expert-slot", self.expert_slot, len(groups))
        for first in range(0, len(groups), self.shortcut_span):
            sizes = [group.num_ops for group in groups[first : first + self.shortcut_span]]
            for part in range(len(sizes)):
                self._validate_slots(first, sizes, part)

    def _validate_weights(self) -> None:
        """Where gate weights never travel beside tokens, a size above which they do not is refused."""
        above = self.a2a_weights_apart_above
        if above == ScMoEConfig.a2a_weights_apart_above:
            return
        if not (self.enabled or self.replaces_stock_moe):
            raise ConfigError(
                "the stock MoE layer sends gate weights by themselves: --shortcut is none and "
                f"--a2a-weights-apart-above is {above:g}; drop it, or add --overlap-chunks 2 or --shortcut scmoe"
            )
        if self.sends_centroids and self.lsh_evaluation is Evaluation.CENTROIDS:
            raise ConfigError(
                f"centroids travel without weights: --a2a-codec is {self.a2a_codec}, --lsh-evaluation is "
                f"{self.lsh_evaluation} and --a2a-weights-apart-above is {above:g}; drop --a2a-weights-apart-above"
            )

    def _validate_stock(self) -> None:
        """Without a shortcut the other flags of this group have no meaning: refuse rather than ignore them."""
        if self.watches_steps and not self.replaces_stock_moe:
            raise ConfigError(
                f"the stock MoE layer has nothing to choose and reports nothing: --shortcut is none, --overlap is "
                f"{self.overlap} and --overlap-report is {self.overlap_report or 'not set'}; add --overlap-chunks 2, "
                "--a2a-codec fp8, --a2a-unique rank or --shortcut scmoe"
            )
        for name in _NEEDS_SHORTCUT:
            value, flag = getattr(self, name), flag_of(name)
            if value != getattr(ScMoEConfig, name):
                raise ConfigError(
                    f"{flag} needs a shortcut: it is set to {shown(value)} and --shortcut is none; "
                    f"add --shortcut scmoe or drop {flag}"
                )

    def _validate_slots(self, first_group: int, sizes: Sequence[int], part: int) -> None:
        group_index, shape = first_group + part, self.span_shape(first_group, sizes)
        slots, num_slots = self.slots(group_index), shape.calls[shape.first_call_of(part)].num_slots
        value = ",".join(map(str, slots))
        if any(not 1 <= slot <= num_slots for slot in slots):
            raise ConfigError(
                f"{self.position(group_index)} of {self.shortcut} has the slots 1 to {num_slots} here: --expert-slot "
                f"of group {group_index} is {value}; use a value from 1 to {num_slots}"
            )
        if slots and (len(slots) not in (1, self.overlap_chunks) or list(slots) != sorted(slots)):
            raise ConfigError(
                f"chunks travel in order, each with one slot: --overlap-chunks is {self.overlap_chunks} and "
                f"--expert-slot of group {group_index} is {value}; give one slot, or {self.overlap_chunks} that never "
                "decrease"
            )
