"""What a user can set: one frozen dataclass, from which the command line is generated.

The docstring below a field is the help text of its flag. Standard library only, so that refusals cost nothing.
Positions, taps, slots and groups are the words of the ScMoE paper (arXiv 2404.05019), as docs/architecture.md has them.
"""

from dataclasses import dataclass, fields
from enum import StrEnum

from megatron_scmoe.contracts import Plan
from megatron_scmoe.overlap.plan import even_plan


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


class Router(StrEnum):
    """How experts are chosen and weighed."""

    CORE = "core"
    LONGCAT = "longcat"


class LatentScaling(StrEnum):
    """What multi-latent attention does to its latents behind their norms."""

    NONE = "none"
    LONGCAT = "longcat"


class Overlap(StrEnum):
    """When the halves of the all-to-all run."""

    OFF = "off"
    FIXED = "fixed"
    ADAPTIVE = "adaptive"


class Codec(StrEnum):
    """What travels in the place of tokens."""

    NONE = "none"
    LSH = "lsh"


class HashKind(StrEnum):
    """What one hash function answers with (LSH-MoE, arXiv 2411.08446, section 3.2)."""

    CROSS_POLYTOPE = "cross-polytope"
    SPHERICAL = "spherical"


class Refinement(StrEnum):
    """What is done to the clusters that hashing found."""

    NONE = "none"
    LLOYD = "lloyd"


class Compensation(StrEnum):
    """What is added to an expert's output for the residual that did not travel (LSH-MoE, section 3.3)."""

    PAPER = "paper"
    NONE = "none"
    LOWRANK = "lowrank"


class Evaluation(StrEnum):
    """What travels in evaluation where centroids do in training."""

    TOKENS = "tokens"
    CENTROIDS = "centroids"


class Resume(StrEnum):
    """Which checkpoints a run may continue from."""

    SAME = "same"
    CHANGED = "changed"


# Dense residual ops that lie behind the tap, the shared expert included, for each position. They lie in the last two
# blocks of a group whatever its size: pos1 [attention, SE], pos2 [MLP, attention, SE], pos3 [attention, MLP,
# attention, SE].
WINDOW_OPS = {Position.POS1: 2, Position.POS2: 3, Position.POS3: 4}

MOE_EVERY_CHOICES = (1, 2, 3, 4)
MAX_HASHES = 64

# Fields that decide what the parameters mean. A checkpoint of other values loads without an error, since the names and
# shapes are the same, and is wrong: so they are compared on resume.
ARCHITECTURE_FIELDS = (
    *("shortcut", "shortcut_position", "shortcut_combine", "moe_every", "moe_share_groups"),
    *("router", "zero_experts", "latent_scaling"),
    *("a2a_codec", "lsh_compensation", "lsh_rank"),
)

# Fields with which a checkpoint was trained, and goes on.
CODEC_FIELDS = (
    *("a2a_codec", "lsh_kind", "lsh_hashes", "lsh_width", "lsh_refinement"),
    *("lsh_compensation", "lsh_rank", "lsh_target_rate", "lsh_seed"),
)
ALL_CODEC_FIELDS = (*CODEC_FIELDS, "lsh_evaluation")

# Fields that mean something for the stock model too.
STOCK_FIELDS = (
    *("shortcut", "shortcut_resume", "overlap", "overlap_chunks", "overlap_interval", "overlap_report"),
    *ALL_CODEC_FIELDS,
)


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
    """Place behind the tap where the experts run, counted from 1: slot k lies before the k-th dense op behind the tap,
    the last slot behind the shared expert (pos1 has slots 1 to 3, pos2 1 to 4, pos3 1 to 5; dgmoe one less each). With
    several chunks a slot for each, such as 1,3, or one for all. One value for all groups, or one for each group.
    Default: spread evenly over the window."""

    overlap_interval: int = 1000
    """Steps after which --overlap adaptive measures again, which takes 3 steps for each number of chunks that it tries;
    they hide nothing. 0: only once."""

    overlap_report: str = ""
    """Folder for a report of every step's communication: milliseconds, exposed milliseconds, hidden share, bytes and
    load of every group, as JSON lines, one file for each rank; the log, TensorBoard and W&B get the sum (W&B not
    of the last step, before which its run ends). Read the timeline with tools/trace.py."""

    a2a_codec: Codec = Codec.NONE
    """What the all-to-all carries. none: tokens. lsh: tokens of one expert that hash alike travel as one row, their
    mean, in forward and backward (LSH-MoE, arXiv 2411.08446); --lsh-compensation says what becomes of a token's
    difference from it (nothing, by default). How many rows are left is an outcome, which the log says; TensorBoard and
    W&B get rate, largest cluster and residual of each group (W&B not of the last step). With --shortcut none it works
    in the stock MoE layers."""

    lsh_kind: HashKind = HashKind.CROSS_POLYTOPE
    """Hash functions of --a2a-codec lsh. cross-polytope: the nearest of the 2 x --lsh-width directions of a random
    frame; spherical: the side of a random plane."""

    lsh_hashes: int = 6
    """Hash functions that must agree for tokens to travel together: more of them send more rows and change less.
    With about 1024 tokens for each expert on each rank, 6 functions and a width of 2 sent 0.28 of the rows of a small
    model after 200 steps and 0.46 after 1000: more as it learns (docs/results/codec.md), which --lsh-target-rate
    prevents. spherical needs about twice as many."""

    lsh_width: int = 2
    """Coordinates of a cross-polytope hash function: more of them send more rows and change less. With more tokens for
    each expert on each rank 4 may be better, as more of them are alike; no training has tried it."""

    lsh_refinement: Refinement = Refinement.NONE
    """What becomes of the clusters that hashing found. none: they stay; lloyd: each token then joins the nearest mean
    of its expert, as in one step of k-means (not in the paper): means are nearer to their tokens for the same rows
    sent. Takes rows x clusters of the busiest expert x 4 bytes."""

    lsh_compensation: Compensation = Compensation.NONE
    """What a token gets beside the expert's output for the mean. none: nothing, which lost less than paper in our own
    study (docs/results/codec.md). paper: its difference from the mean, as LSH-MoE does. lowrank: that through a learned
    linear map of rank --lsh-rank, one for each expert, which every rank holds for all experts and which starts as zero
    (not in the paper)."""

    lsh_rank: int = 8
    """Rank of the maps of --lsh-compensation lowrank, a multiple of 8. They have 2 x rank x hidden size parameters for
    each expert."""

    lsh_target_rate: float = 0.0
    """Part of the rows that is to travel, such as 0.2. How many of the --lsh-hashes functions count is then moved after
    every step, by what all ranks sent; give twice the functions that you think are needed. 0: all of them count."""

    lsh_evaluation: Evaluation = Evaluation.TOKENS
    """What travels in evaluation. tokens: as in the model that will be used, so that a loss depends on earlier tokens
    alone (unless experts have a capacity); takes about the time of --a2a-codec none. centroids: as in training; a mean
    is of later tokens, too."""

    lsh_seed: int = 1234
    """Seed of the hash functions, which are drawn once and never trained. Give the same one to continue a run."""

    shortcut_resume: Resume = Resume.SAME
    """Checkpoints to continue from. same: refuse one that was trained with other values of --shortcut,
    --shortcut-position, --shortcut-combine, --moe-every, --moe-share-groups, --router, --zero-experts,
    --latent-scaling, --a2a-codec, --lsh-compensation or --lsh-rank. changed: load it all the same, optimizer
    included (with Transformer Engine where --dist-ckpt-optim-fully-reshardable saved it), and say so: this is how a
    stock shared-expert checkpoint becomes ScMoE, or the other way round."""

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

    def plan(self, group_index: int) -> Plan:
        """The plan that group ``group_index`` starts with: the one set, else chunks spread evenly over the window."""
        if self.overlap is Overlap.OFF:
            return Plan(slots=(1,), blocking=True)
        if self.overlap is Overlap.ADAPTIVE:
            return even_plan(self.num_slots(group_index), chunks=1)
        if not self.expert_slot:
            return even_plan(self.num_slots(group_index), self.overlap_chunks)
        slots = _slots(_one_or_each(self.expert_slot, group_index))
        return Plan(slots * self.overlap_chunks if len(slots) == 1 else slots)

    @property
    def compresses(self) -> bool:
        """Whether the all-to-all carries something else than tokens."""
        return self.a2a_codec is not Codec.NONE

    @property
    def replaces_stock_moe(self) -> bool:
        """Whether the MoE layers of the stock model are ours: their tokens travel in chunks, or compressed."""
        return not self.enabled and (self.overlap_chunks > 1 or self.compresses)

    @property
    def watches_steps(self) -> bool:
        """Whether anything has to be done between two steps."""
        return self.overlap is Overlap.ADAPTIVE or bool(self.overlap_report) or self.compresses

    def validate(self, num_layers: int) -> None:
        """Raise ConfigError where these settings cannot describe a model of ``num_layers`` blocks."""
        self._validate_codec()
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
        self._validate_overlap()
        if self.shortcut is Shortcut.DGMOE and self.shortcut_combine is not Combine.CG1:
            raise ConfigError(
                f"dgmoe has no shared expert to weigh: --shortcut is dgmoe and --shortcut-combine is "
                f"{self.shortcut_combine}; drop --shortcut-combine"
            )
        self._validate_router()
        num_groups = num_layers // self.moe_every
        self._validate_sharing(num_groups)
        _check_length("--shortcut-position", self.shortcut_position, num_groups)
        _check_length("--expert-slot", self.expert_slot, num_groups)
        for group_index in range(num_groups):
            self._validate_group(group_index)

    def _validate_overlap(self) -> None:
        if self.overlap is not Overlap.FIXED and self.expert_slot:
            raise ConfigError(
                f"a slot is set or found: --overlap is {self.overlap} and --expert-slot is {_shown(self.expert_slot)}; "
                "use --overlap fixed or drop --expert-slot"
            )
        if self.overlap_chunks < 1 or (self.overlap is Overlap.OFF and self.overlap_chunks > 1):
            raise ConfigError(
                f"chunks are for an overlap, and there is one at least: --overlap is {self.overlap} and "
                f"--overlap-chunks is {self.overlap_chunks}; use --overlap fixed, or 1"
            )
        if self.overlap_interval < 0:
            raise ConfigError(
                f"steps are counted from 0: --overlap-interval is {self.overlap_interval}; use 0 to measure once"
            )

    def _default(self, name: str) -> object:
        return next(field.default for field in fields(self) if field.name == name)

    def _validate_codec(self) -> None:
        if not self.compresses:
            for name in ALL_CODEC_FIELDS:
                value = getattr(self, name)
                if value != self._default(name):
                    flag = "--" + name.replace("_", "-")
                    raise ConfigError(
                        f"{flag} belongs to the codec lsh: it is set to {value} and --a2a-codec is none; "
                        f"add --a2a-codec lsh or drop {flag}"
                    )
        if not 1 <= self.lsh_hashes <= MAX_HASHES:
            raise ConfigError(
                f"1 to {MAX_HASHES} functions can be had: --lsh-hashes is {self.lsh_hashes}; use 6 for cross-polytope, "
                "12 for spherical"
            )
        if self.lsh_rank < 8 or self.lsh_rank % 8:
            raise ConfigError(
                f"grouped matrix products want multiples of 8: --lsh-rank is {self.lsh_rank}; use 8 or 16"
            )
        if self.lsh_rank != self._default("lsh_rank") and self.lsh_compensation is not Compensation.LOWRANK:
            raise ConfigError(
                f"the rank is that of learned maps: --lsh-rank is {self.lsh_rank} and --lsh-compensation is "
                f"{self.lsh_compensation}; add --lsh-compensation lowrank or drop --lsh-rank"
            )
        if not 0 <= self.lsh_target_rate < 1:
            raise ConfigError(
                f"a rate is a part of all rows: --lsh-target-rate is {self.lsh_target_rate}; use a number such as 0.2, "
                "or 0 for none"
            )
        if self.lsh_width < 1:
            raise ConfigError(f"a function keeps a coordinate at least: --lsh-width is {self.lsh_width}; use 2 or 4")
        if self.lsh_kind is HashKind.SPHERICAL and self.lsh_width != self._default("lsh_width"):
            raise ConfigError(
                f"a plane has two sides and no width: --lsh-kind is spherical and --lsh-width is {self.lsh_width}; "
                "drop --lsh-width"
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
        self._validate_overlap()
        if self.watches_steps and not self.replaces_stock_moe:
            raise ConfigError(
                f"the stock MoE layer has nothing to choose and reports nothing: --shortcut is none, --overlap is "
                f"{self.overlap} and --overlap-report is {self.overlap_report or 'not set'}; add --overlap-chunks 2, "
                "--a2a-codec lsh or --shortcut scmoe"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in STOCK_FIELDS:
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
        if not self.expert_slot:
            return
        num_slots = self.num_slots(group_index)
        value = _one_or_each(self.expert_slot, group_index)
        slots = _slots(value)
        if any(not 1 <= slot <= num_slots for slot in slots):
            raise ConfigError(
                f"{position} of {self.shortcut} has the slots 1 to {num_slots}: --expert-slot of group {group_index} "
                f"is {value}; use a value from 1 to {num_slots}"
            )
        if len(slots) not in (1, self.overlap_chunks) or list(slots) != sorted(slots):
            raise ConfigError(
                f"chunks travel in order, each with one slot: --overlap-chunks is {self.overlap_chunks} and "
                f"--expert-slot of group {group_index} is {value}; give one slot, or {self.overlap_chunks} that never "
                "decrease"
            )


def _slots(value: str) -> tuple[int, ...]:
    parts = str(value).split(",")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"a slot is a number, or one for each chunk: --expert-slot is {value}; use 2, or 1,3")
    return tuple(int(part) for part in parts)


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
