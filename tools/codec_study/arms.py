"""What is compared: a model, what its all-to-all carries, and the command line that trains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_scmoe.contracts import TransferName

NUM_EXPERTS = 4
NUM_LAYERS = 4
SEQ_LENGTH = 256
SIZES = {"layers": NUM_LAYERS, "hidden": 128, "heads": 4, "ffn": 344, "experts": NUM_EXPERTS, "sequence": SEQ_LENGTH}

LOG_EVERY = 10
"""Steps of which one figure of the training loss, the rate and the residual is kept: their mean."""


@dataclass(frozen=True, slots=True)
class Model:
    """One architecture.

    Attributes:
        topk: experts of each token.
        flags: that differ from model to model.
    """

    topk: int
    flags: str

    @property
    def tokens_per_expert(self) -> int:
        """Mean tokens that one sequence gives an expert."""
        return self.topk * SEQ_LENGTH // NUM_EXPERTS


# The shared expert has the gate that ScMoE's cg1 sets, so that these two differ in what the routed experts read alone.
_SHARED = f"--moe-shared-expert-intermediate-size {SIZES['ffn']}"
_EVERY_SECOND = f"--moe-layer-freq [0,1]*{NUM_LAYERS // 2}"
# Core wants the softmax before the choice where there is one expert: after it every gate weight would be 1.
_ONE_EXPERT = "--moe-router-pre-softmax"
MODELS = {
    "top-2": Model(2, _EVERY_SECOND),
    "shared-expert": Model(1, f"{_EVERY_SECOND} {_SHARED} --moe-shared-expert-gate {_ONE_EXPERT}"),
    "pos2": Model(1, f"--shortcut scmoe --shortcut-position pos2 {_SHARED} {_ONE_EXPERT}"),
}


def compensated(hashes: int) -> str:
    """Name of the arm with so many functions and the paper's compensation."""
    return f"lsh q{hashes}"


def uncompensated(hashes: int, *, refined: bool = False) -> str:
    """Name of the arm with so many functions that adds nothing for the residual."""
    return f"{compensated(hashes)}{' lloyd' if refined else ''} no compensation"


NONE, CONTROL, PAPER = "none", "control", compensated(6)
COMPRESSED_CONTROL = "control lsh q6"
REORDERED = "none 2 chunks"
"""Tokens in two chunks: the same sums in another order, so what it differs from none by is what rounding alone does."""
NONE_TWO_RANKS, UNIQUE, UNIQUE_FP8 = "none 2 ranks", "unique 2 ranks", "unique fp8 2 ranks"
"""On two ranks, which share the experts: on one there is no rank that a token travels to twice."""
SHORTER = {share: f"none {share:g}x steps" for share in (0.25, 0.5, 0.75)}
"""Without a codec, by part of the steps: what such a training would be ended at, where a codec saves time."""
UNCOMPRESSED = (NONE, *SHORTER.values(), REORDERED, CONTROL, NONE_TWO_RANKS, UNIQUE, UNIQUE_FP8)
"""What is evaluated once, as it was trained."""
_UNIQUE = ("--a2a-unique", "rank")
_FP8 = ("--a2a-codec", "fp8")
_LLOYD = ("--lsh-refinement", "lloyd")
COMPARED_HASHES = (4, 6)
"""Of the arms that are there with the paper's compensation and without, and those with refined clusters and without."""
BF16, FP8, FP8_ALL = "bf16", "fp8", "fp8 four transfers"
ROUNDING = (BF16, FP8, FP8_ALL)
"""Every row travels, in fewer bits."""
PACKAGE = "package"
"""The cargo of an arm that trains what the package's flags say and replaces nothing."""
HELD_RATE = 0.2
HELD = f"lsh q12 at {HELD_RATE:g}"
HELD_UNCOMPENSATED = f"{HELD} no compensation"
"""The arms with a target rate, and the rate."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What the all-to-all of a model carries.

    All arms of a model are our layers with one chunk and the same flags but for ``flags``; arms without a codec replace
    the cargo alone (``train.py``). Megatron's own layer in the place of ``none`` would differ in rounding too.

    Attributes:
        name: unique; what people read.
        cargo: key of ``train.CARGOES``.
        flags: of the codec.
        share: of the study's steps that it trains, with the whole schedule of learning rates in them.
        ranks: that share the experts and the sequences of a step.
        topk: experts that a token has at least, in the models for which the arm is one.
    """

    name: str
    cargo: str
    flags: tuple[str, ...] = ()
    share: float = 1.0
    ranks: int = 1
    topk: int = 1

    @property
    def compresses(self) -> bool:
        """Whether rows stand for tokens, or are not as tokens are: these are evaluated without that, too."""
        return self.cargo.startswith("codec")

    @property
    def is_of_lsh(self) -> bool:
        """Whether its codec is LSH-MoE, or would be, had train.py not put tokens in the place of what that carries."""
        return not {"--a2a-codec", "--a2a-unique"}.intersection(self.flags)

    def fits(self, model: str) -> bool:
        """Whether there is such a training of a model."""
        return self.topk <= MODELS[model].topk


def all_arms() -> list[Arm]:
    """Every arm that this version of the package can train, those without compression first.

    The compressed control is E(c) + x: the path that compensation adds, for the token and not for its residual alone.
    """
    arms = [Arm(NONE, "tokens"), *(Arm(name, "tokens", share=share) for share, name in SHORTER.items())]
    arms.append(Arm(REORDERED, "tokens", ("--overlap-chunks", "2")))
    arms.append(Arm(CONTROL, "tokens-plus-input"))
    arms.append(Arm(NONE_TWO_RANKS, "tokens", ranks=2, topk=2))  # what is compared with it is so
    for name, flags in ((UNIQUE, _UNIQUE), (UNIQUE_FP8, (*_UNIQUE, *_FP8))):
        arms.append(Arm(name, PACKAGE, flags, ranks=2, topk=2))
    arms += [Arm(BF16, "codec", ("--a2a-codec", "bf16")), Arm(FP8, "codec", _FP8)]
    arms.append(Arm(FP8_ALL, "codec", (*_FP8, "--fp8-transfers", *TransferName)))
    arms += [_lsh(compensated(hashes), hashes) for hashes in (2, 4, 6, 8, 10)]
    arms += [_lsh(uncompensated(hashes), hashes, compensation="none") for hashes in COMPARED_HASHES]
    arms.append(_lsh("lsh q6 lowrank", 6, compensation="lowrank"))
    arms.append(replace(_lsh(COMPRESSED_CONTROL, 6, compensation="none"), cargo="codec-plus-input"))
    arms.append(_lsh("lsh q6 lloyd", 6, *_LLOYD))
    arms += [
        _lsh(uncompensated(hashes, refined=True), hashes, *_LLOYD, compensation="none") for hashes in COMPARED_HASHES
    ]
    arms.append(_lsh("spherical q12", 12, "--lsh-kind", "spherical"))
    target = ("--lsh-target-rate", f"{HELD_RATE:g}")
    arms += [_lsh(HELD, 12, *target), _lsh(HELD_UNCOMPENSATED, 12, *target, compensation="none")]
    return arms


def _lsh(name: str, hashes: int, *flags: str, compensation: str = "paper") -> Arm:
    return Arm(name, "codec", ("--lsh-hashes", str(hashes), *flags, "--lsh-compensation", compensation))


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs of a folder share.

    Attributes:
        iterations: steps of a run.
        eval_every: steps between two evaluations.
        eval_sequences: of each evaluation.
        tokens_per_expert: that reach an expert in a step, on average; the batch follows from it.
    """

    iterations: int
    eval_every: int
    eval_sequences: int
    tokens_per_expert: int

    def batch(self, model: str) -> int:
        """Sequences of a step."""
        return self.tokens_per_expert // MODELS[model].tokens_per_expert

    def tokens(self, model: str) -> int:
        """Tokens of a step."""
        return self.batch(model) * SEQ_LENGTH

    def of(self, arm: Arm) -> Settings:
        """Those of an arm: one that trains fewer steps evaluates as often, on the same text.

        Raises:
            ValueError: where its part of the steps between two evaluations is no whole number.
        """
        if arm.share * self.eval_every % 1:
            raise ValueError(f"{self.eval_every} steps cannot be cut to {arm.share:g} of them")
        iterations, eval_every = (int(arm.share * steps) for steps in (self.iterations, self.eval_every))
        return replace(self, iterations=iterations, eval_every=eval_every)


@dataclass(frozen=True, slots=True)
class Run:
    """One training.

    Attributes:
        model: key of ``MODELS``.
        arm: what travels.
        seed: of parameters, order of the data and hash functions; the same for all arms.
    """

    model: str
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model}-{self.arm.name.replace(' ', '_')}-{self.seed}"


_FLAGS = """
--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --seq-length {sequence}
--ffn-hidden-size {ffn} --moe-ffn-hidden-size {ffn} --num-experts {experts} --max-position-embeddings {sequence}
--normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear --init-method-std 0.02
--hidden-dropout 0 --attention-dropout 0 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01
--moe-router-load-balancing-type aux_loss --lr 0.002 --min-lr 0.0002 --lr-decay-style cosine --weight-decay 0.1
--adam-beta2 0.95 --clip-grad 1.0 --split 95,5,0 --num-workers 0 --tokenizer-type SentencePieceTokenizer
--transformer-impl local --distributed-backend gloo --no-create-attention-mask-in-dataloader --no-persist-layer-norm
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion --no-bias-swiglu-fusion
--no-bias-dropout-fusion --log-timers-to-tensorboard
"""
"""Of every run."""
_LSH = ("--a2a-codec", "lsh", "--lsh-evaluation", "centroids")
"""They put our layers in the stock models, too. Evaluation is as in training; ``train.py`` adds one with tokens."""


def run_flags(run: Run, settings: Settings, folder: Path, data: Path) -> list[str]:
    """The command line of the entry script that trains ``run`` into ``folder``; it begins with the cargo.

    The settings are those of the study.
    """
    settings = settings.of(run.arm)
    batch = settings.batch(run.model)
    values: Mapping[str, Any] = {
        "moe-router-topk": MODELS[run.model].topk,
        "micro-batch-size": batch // run.arm.ranks,
        "global-batch-size": batch,
        "train-iters": settings.iterations,
        "lr-warmup-iters": settings.iterations // 50,
        "seed": run.seed,
        "data-path": data / "text_document",
        "tokenizer-model": data / "tokenizer.model",
        "data-cache-path": folder / "cache",  # its own: runs that build it side by side would read each other's halves
        "log-interval": LOG_EVERY if settings.iterations > LOG_EVERY else 1,
        "eval-interval": settings.eval_every,
        "eval-iters": settings.eval_sequences // batch,
        "tensorboard-dir": folder / "tensorboard",
        "overlap-report": folder / "report",
        "expert-model-parallel-size": run.arm.ranks,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    lsh = (*_LSH, "--lsh-seed", str(run.seed)) if run.arm.is_of_lsh else ()
    all_flags = *_FLAGS.format(**SIZES).split(), *flags, *MODELS[run.model].flags.split(), *lsh, *run.arm.flags
    return [run.arm.cargo, *all_flags]
