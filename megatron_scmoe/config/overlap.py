"""When the halves of the all-to-all run, and where the experts do."""

from dataclasses import dataclass
from enum import StrEnum

from megatron_scmoe.config.rules import ConfigError, one_or_each, shown


class Overlap(StrEnum):
    """When the halves of the all-to-all run."""

    OFF = "off"
    FIXED = "fixed"
    ADAPTIVE = "adaptive"


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """How the communication is hidden, and what is reported of it."""

    overlap: Overlap = Overlap.FIXED
    """off: every all-to-all is waited for at once (the sequential reference; same numbers, bit for bit). fixed: it
    flies while the dense ops run, and the experts run at --expert-slot. adaptive: the times of all ops are measured in
    the first steps, and the experts run where that makes the step fastest; measured again every --overlap-interval
    steps."""

    overlap_chunks: int = 1
    """Chunks that the tokens of a layer travel in, after routing and capacity. fixed: that many, each with an expert
    slot of its own. adaptive: at most that many; 1, 2, 4, ... are tried. More than one changes rounding, and nothing
    else. With --shortcut none it pipelines the stock MoE layers."""

    expert_slot: tuple[str, ...] = ()
    """Place behind the tap where the experts run, counted from 1: slot k lies before the k-th op behind the tap, the
    last slot where the output lands: behind the shared expert (pos1 has slots 1 to 3, pos2 1 to 4, pos3 1 to 5; dgmoe
    one less each), or with --shortcut-landing K behind K ops of the next group (K + 1 slots more). With several chunks
    a slot for each, such as 1,3, or one for all. One value for all groups, or one for each group. Default: spread
    evenly over the window, as the tokens of dgmoe's second gate are in any case."""

    a2a_weights_apart_above: float = 8.0
    """MiB of tokens in one all-to-all (those of a chunk on one rank, as often as they may travel) above which their
    gate weights travel as a collective of their own. Below, weights lie beside their tokens, in rows that are filled up
    to 16 bytes: one collective less, but two more passes over all rows at either end. 0: always; inf: never. The
    numbers are the same, bit for bit."""

    overlap_interval: int = 1000
    """Steps after which --overlap adaptive measures again, which takes 3 steps for each number of chunks that it tries;
    they hide nothing; and then 3 to 24 steps for each plan that it tries. 0: only once."""

    overlap_report: str = ""
    """Folder for a report of every step's communication: milliseconds, exposed milliseconds, hidden share, bytes and
    load of every group, and on a GPU for how long at most it had nothing enqueued, as JSON lines, one file for each
    rank; the log, TensorBoard and W&B get the sum (W&B not of the last step, before which its run ends). Read the
    timeline with tools/trace.py."""

    def slots(self, group_index: int) -> tuple[int, ...]:
        """Slots set for group ``group_index``: none, one for all chunks, or one for each of them."""
        if not self.expert_slot:
            return ()
        value = one_or_each(self.expert_slot, group_index)
        parts = str(value).split(",")
        if not all(part.isdecimal() for part in parts):
            raise ConfigError(f"a slot is a number, or one for each chunk: --expert-slot is {value}; use 2, or 1,3")
        return tuple(int(part) for part in parts)

    def validate_overlap(self) -> None:
        """Raise ConfigError where these settings contradict one another."""
        if self.overlap is not Overlap.FIXED and self.expert_slot:
            raise ConfigError(
                f"a slot is set or found: --overlap is {self.overlap} and --expert-slot is {shown(self.expert_slot)}; "
                "use --overlap fixed or drop --expert-slot"
            )
        if self.overlap_chunks < 1 or (self.overlap is Overlap.OFF and self.overlap_chunks > 1):
            raise ConfigError(
                f"chunks are for an overlap, and there is one at least: --overlap is {self.overlap} and "
                f"--overlap-chunks is {self.overlap_chunks}; use --overlap fixed, or 1"
            )
        if not self.a2a_weights_apart_above >= 0:
            raise ConfigError(
                f"a size is counted from 0: --a2a-weights-apart-above is {self.a2a_weights_apart_above:g}; give MiB, 0 "
                "for always, or inf for never"
            )
        if self.overlap_interval < 0:
            raise ConfigError(
                f"steps are counted from 0: --overlap-interval is {self.overlap_interval}; use 0 to measure once"
            )
