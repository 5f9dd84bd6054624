"""What the all-to-all carries: tokens, once for an expert or once for a rank, rounded, or centroids (LSH-MoE)."""

from dataclasses import dataclass, fields
from enum import StrEnum

from megatron_scmoe.config.rules import ConfigError, flag_of, shown
from megatron_scmoe.contracts import TransferName


class Codec(StrEnum):
    """What travels in the place of tokens."""

    NONE = "none"
    FP8 = "fp8"
    BF16 = "bf16"
    LSH = "lsh"


class Unique(StrEnum):
    """Where a token travels once, whatever number of experts it has there."""

    NONE = "none"
    RANK = "rank"


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


MAX_HASHES = 64
MAX_SEED = 1 << 32


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """What the all-to-all carries."""

    a2a_codec: Codec = Codec.NONE
    """What the all-to-all carries. none: tokens. fp8: rows in e4m3 with a scale for each 128 values, in the transfers
    of --fp8-transfers. bf16: rows in bf16, in all transfers of an fp32 model. lsh: tokens of one expert that hash alike
    travel as one row, their mean, in forward and backward (LSH-MoE, arXiv 2411.08446); --lsh-compensation says what
    becomes of a token's difference from it (nothing, by default). How many rows are left is an outcome, which the log
    says; TensorBoard and W&B get rate, largest cluster and residual of each group (W&B not of the last step). With
    --shortcut none codecs work in the stock MoE layers."""

    fp8_transfers: tuple[TransferName, ...] = (TransferName.DISPATCH_FORWARD, TransferName.COMBINE_BACKWARD)
    """Transfers of --a2a-codec fp8 in which rows are rounded: tokens to their experts (dispatch-forward), what experts
    made of them (combine-forward), and the gradients of either, which fly the other way (dispatch-backward,
    combine-backward). The default are the two towards the experts, as in DeepSeek-V3 (arXiv 2412.19437); the two
    towards home are summed, with what others send, into what the model goes on with."""

    a2a_unique: Unique = Unique.NONE
    """Where a token travels once. none: a row for each of its experts. rank: a row for each rank that has experts of
    it, with their gate weights; the rank sends back one weighted sum. The same numbers up to the order of sums. For
    --moe-router-topk above 1; docs/codec.md says how many rows that saves. With --shortcut none it works in the stock
    MoE layers."""

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

    @property
    def compresses(self) -> bool:
        """Whether rows, or fewer of them, do not travel as they are."""
        return self.a2a_codec is not Codec.NONE

    @property
    def sends_centroids(self) -> bool:
        """Whether one row stands for several tokens."""
        return self.a2a_codec is Codec.LSH

    @property
    def rounds(self) -> bool:
        """Whether rows travel in fewer bits."""
        return self.compresses and not self.sends_centroids

    @property
    def sends_once(self) -> bool:
        """Whether a token travels once to all of its experts that are in one place."""
        return self.a2a_unique is not Unique.NONE

    def validate_codec(self) -> None:
        """Raise ConfigError where these settings contradict one another."""
        for field in fields(CodecConfig):
            value, codec = getattr(self, field.name), field.name.partition("_")[0]
            if codec in list(Codec) and codec != self.a2a_codec and value != field.default:
                flag = flag_of(field.name)
                raise ConfigError(
                    f"{flag} belongs to the codec {codec}: it is set to {shown(value)} and --a2a-codec is "
                    f"{self.a2a_codec}; add --a2a-codec {codec} or drop {flag}"
                )
        if not self.fp8_transfers or len(set(self.fp8_transfers)) < len(self.fp8_transfers):
            raise ConfigError(
                "a transfer is rounded or not, and one at least is: --fp8-transfers is "
                f"{shown(self.fp8_transfers) or 'empty'}; name each once, or use --a2a-codec none"
            )
        if self.sends_centroids and self.sends_once:
            raise ConfigError(
                "a centroid is of tokens of one expert, and for it alone: --a2a-codec is "
                f"{self.a2a_codec} and --a2a-unique is {self.a2a_unique}; drop one of them"
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
        if self.lsh_rank != CodecConfig.lsh_rank and self.lsh_compensation is not Compensation.LOWRANK:
            raise ConfigError(
                f"the rank is that of learned maps: --lsh-rank is {self.lsh_rank} and --lsh-compensation is "
                f"{self.lsh_compensation}; add --lsh-compensation lowrank or drop --lsh-rank"
            )
        if not 0 <= self.lsh_target_rate < 1:
            raise ConfigError(
                f"a rate is a part of all rows: --lsh-target-rate is {self.lsh_target_rate}; use a number such as 0.2, "
                "or 0 for none"
            )
        if not 0 <= self.lsh_seed < MAX_SEED:
            raise ConfigError(f"a seed is a number from 0: --lsh-seed is {self.lsh_seed}; use one below {MAX_SEED}")
        if self.lsh_width < 1:
            raise ConfigError(f"a function keeps a coordinate at least: --lsh-width is {self.lsh_width}; use 2 or 4")
        if self.lsh_kind is HashKind.SPHERICAL and self.lsh_width != CodecConfig.lsh_width:
            raise ConfigError(
                f"a plane has two sides and no width: --lsh-kind is spherical and --lsh-width is {self.lsh_width}; "
                "drop --lsh-width"
            )
