"""One checkpoint, many layouts: losses and gradient norms of the next steps agree, and the next save loads anywhere.

docs/parallelism.md is the table of what this file tries. Tests marked ``full`` run with ``make test-full`` alone.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import entry
import pytest
import ranks
import torch
import training
from cases import cases
from test_arguments import DGMOE
from training import SCMOE, STOCK_SHARED_EXPERT, with_flags, without_flag

TOLERANCE = 1e-4
# bfloat16 has 8 bits, so one rounding is up to 0.4%. Gradient norms are sums over many of them.
BF16_TOLERANCE = {"lm loss": 2e-3, "grad-norm": 3e-2}
STEPS = 3
# Megatron's rule for tensor parallelism on GPUs older than Blackwell, and on none.
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
NAMES = ("lm loss", "grad-norm")

FULL = "--recompute-granularity full --recompute-method"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
ETP1 = "--expert-tensor-parallel-size 1"
EP2 = "--expert-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PP2} --num-layers-per-virtual-pipeline-stage 2"
GATHER = "--overlap-grad-reduce --overlap-param-gather"
LAYOUTS: dict[str, tuple[int, str]] = {
    # name -> ranks, flags
    "one": (1, ""),
    "ep2": (2, EP2),
    "ep4": (4, "--expert-model-parallel-size 4"),
    "tp2 sp": (2, f"{TP2} {ETP1}"),
    "tp2 ep2": (4, f"{TP2} {EP2} {ETP1}"),
    "expert tp2": (2, f"{TP2} --expert-tensor-parallel-size 2"),
    "expert tp2 ep2": (4, f"{TP2} {EP2} --expert-tensor-parallel-size 2"),
    "pp2": (2, PP2),
    "pp2 interleaved": (2, INTERLEAVED),
    "pp2 interleaved in fours": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 4"),
    "pp2 ep2": (4, f"{PP2} {EP2}"),
    "dp2": (2, ""),
    "dp2 plain optimizer": (2, ""),
    "dp2 overlapped reduce": (2, "--overlap-grad-reduce"),
    "dp2 overlapped gather": (2, GATHER),
    "ep2 overlapped gather": (2, f"{EP2} {GATHER}"),
    "no accumulation": (1, "--micro-batch-size 8"),
    "accumulation of 8": (1, "--micro-batch-size 1"),
    "recompute full uniform": (1, f"{FULL} uniform --recompute-num-layers 1"),
    "recompute full block": (1, f"{FULL} block --recompute-num-layers 2"),
    "recompute core_attn": (1, f"{SELECTIVE} core_attn"),
    "recompute mlp": (1, f"{SELECTIVE} mlp shared_experts"),
    "ep2 recompute full": (2, f"{EP2} {FULL} uniform --recompute-num-layers 1"),
    "tp2 ep2 recompute full": (4, f"{TP2} {EP2} {ETP1} {FULL} block --recompute-num-layers 2"),
    "tp2 ep2 recompute mlp": (4, f"{TP2} {EP2} {ETP1} {SELECTIVE} core_attn mlp shared_experts"),
    "tp2 ep2 plain optimizer": (4, f"{TP2} {EP2} {ETP1}"),
    "pp2 ep2 interleaved": (4, f"{INTERLEAVED} {EP2} {GATHER}"),
    "pp2 ep2 interleaved recompute": (4, f"{INTERLEAVED} {EP2} {FULL} uniform --recompute-num-layers 1"),
    "tp2 pp2 ep2": (8, f"{TP2} {PP2} {EP2} {ETP1}"),
    "tp2 pp2 ep2 interleaved recompute": (
        8,
        f"{TP2} {INTERLEAVED} {EP2} {ETP1} {GATHER} {FULL} uniform --recompute-num-layers 1",
    ),
}

COMMON = ["--num-layers 8", "--moe-aux-loss-coeff 0", "--use-distributed-optimizer"]
COMMON += ["--dist-ckpt-optim-fully-reshardable", "--hidden-dropout 0", "--attention-dropout 0"]
COMMON += ["--override-opt-param-scheduler", "--make-vocab-size-divisible-by 8"]
ARCHITECTURES = {"scmoe": with_flags(SCMOE, *COMMON), "dgmoe": with_flags(DGMOE, *COMMON)}
STOCK = with_flags(STOCK_SHARED_EXPERT, *COMMON, "--moe-layer-freq [0,1]*4")
PATTERNS = {
    # hybrid model -> its layers, in the pieces that interleaved stages hold; groups of three to six, and rests behind
    "hybrid-mamba": ("M*-E", "-M*E", "M-E", "*ME-M"),
    "hybrid": ("*-*E", "-*E", "*-*-*E", "*-*E-"),
    "top-2-hybrid-mamba": ("M*-E", "-M*E", "M-E", "*ME-M"),
}
UNTIED = "--untie-embeddings-and-output-weights"  # tied ones end a gradient bucket, with Mamba's odd sizes in padding
MAMBA = ("--mamba-num-heads 4", "--mamba-head-dim 8", "--mamba-state-dim 8", "--mamba-num-groups 2")
LATENT = "--multi-latent-attention --qk-head-dim 8 --qk-pos-emb-head-dim 8 --v-head-dim 8 --kv-lora-rank 8"
LONGCAT = f"{LATENT} --q-lora-rank 16 --qk-layernorm --rope-type rope --latent-scaling longcat --shortcut-combine add"
LONGCAT += " --router longcat --zero-experts 2 --moe-router-topk 3 --moe-router-topk-scaling-factor 6.0"
LONGCAT += " --moe-router-load-balancing-type none --moe-router-bias-update-rate 0.01"
LATE = ("--shortcut-span 2", "--shortcut-landing 1")
LATENT_EXPERTS = with_flags(ARCHITECTURES["scmoe"], "--moe-latent-size 16", "--moe-router-topk 2", "--seed 4321")
MODELS = {
    **ARCHITECTURES,
    "dgmoe-share": with_flags(ARCHITECTURES["dgmoe"], "--moe-share-groups 2"),
    "stock": STOCK,
    "alike": with_flags(STOCK, "--moe-layer-freq 1"),
    "scmoe-span": with_flags(ARCHITECTURES["scmoe"], *LATE, "--num-layers 16"),  # 4 spans, for interleaved stages
    "dgmoe-span": with_flags(ARCHITECTURES["dgmoe"], *LATE),
    "farskip": with_flags(ARCHITECTURES["scmoe"], *LATE, "--moe-every 1", "--shortcut-position farskip"),
    "scmoe-share": with_flags(ARCHITECTURES["scmoe"], "--moe-share-groups 2"),
    # Of smaller weights, gradients of projections would be too small to be seen in the norm of all; with these, steps
    # on end make rounding larger than the tolerance.
    "latent-experts": with_flags(LATENT_EXPERTS, "--init-method-std 0.4"),
    "latent-experts that move": with_flags(LATENT_EXPERTS, "--init-method-std 0.2"),
    "longcat": with_flags(ARCHITECTURES["scmoe"], *("--" + change for change in LONGCAT[2:].split(" --"))),
    "hybrid-mamba": with_flags(without_flag(ARCHITECTURES["scmoe"], "--num-layers"), UNTIED, *MAMBA),
    "hybrid": with_flags(without_flag(ARCHITECTURES["dgmoe"], "--num-layers"), UNTIED),
}
MODELS["top-2"] = with_flags(MODELS["scmoe"], "--moe-router-topk 2")
MODELS["top-2-hybrid-mamba"] = with_flags(MODELS["hybrid-mamba"], "--moe-router-topk 2")
PREDICTING = ("--mtp-num-layers 1", "--untie-embeddings-and-output-weights")
MODELS |= {f"{name}-predicting": with_flags(MODELS[name], *PREDICTING) for name in ("scmoe", "dgmoe", "longcat")}
BALANCE_LOSSES = {
    # kind -> the name under which Core logs it
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
VARIANTS = {
    "bf16": ["--bf16"],
    **{kind: ["--moe-aux-loss-coeff 0.01", f"--moe-router-load-balancing-type {kind}"] for kind in BALANCE_LOSSES},
}

NOT_THESE = ("one", "pp2 interleaved in fours")
"""What all are compared with, and a layout for twice the blocks."""

QUICK = {
    "scmoe": {"tp2 ep2", "expert tp2 ep2", "pp2 interleaved", "accumulation of 8", "dp2 plain optimizer"}
    | {"dp2 overlapped gather", "recompute mlp"},
    "dgmoe": {"pp2 ep2", "recompute full uniform"},
    "hybrid-mamba": {"tp2 ep2"},
    "hybrid": {"pp2 interleaved"},
}
"""Layouts of ``make test``; the others are of ``make test-full``."""


def case(*values: str, quick: bool):
    return pytest.param(*values, marks=() if quick else pytest.mark.full, id="-".join(values))


class Result(NamedTuple):
    """What a rank did: tokens per expert tensor rank and per local expert; logits by iteration, from 0, and labels."""

    printed: str
    num_microbatches: int
    splits: list[list[int]]
    counts: list[list[int]]
    logits: dict[tuple[int, ...], torch.Tensor]


def train(flags: list[str]) -> Result:
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.training import get_args

    from megatron_scmoe.mcore.token_dispatcher import Counts

    os.environ.update(ONE_QUEUE)
    splits: list[list[int]] = []
    counts: list[list[int]] = []
    logits_of: dict[tuple[int, ...], torch.Tensor] = {}
    tell, compute_loss = Counts.tell, LanguageModule.compute_language_model_loss

    def recorded_tell(self, dispatcher, chunk):
        tell(self, dispatcher, chunk)
        if dispatcher.tp_size > 1:
            splits.append(dispatcher.output_splits_tp.tolist())
            counts.append(dispatcher.tokens_per_expert.tolist())

    def recorded_loss(self, labels, logits):
        whole = gather_from_tensor_model_parallel_region(logits.detach())
        for row, sample in zip(labels, whole.float().unbind(1), strict=True):
            if self.training:  # samples come again in evaluation, and in later steps
                logits_of[get_args().curr_iteration, *row.tolist()] = sample.clone()
        return compute_loss(self, labels, logits)

    Counts.tell = recorded_tell
    LanguageModule.compute_language_model_loss = recorded_loss
    printed = training.train(flags)
    return Result(printed, 0 if "exit code" in printed else get_num_microbatches(), splits, counts, logits_of)


def run(num_ranks: int, flags: list[str]) -> list[Result]:
    results = ranks.run(train, num_ranks, flags, timeout_s=180)
    assert "exit code" not in results[0].printed, results[0].printed[-3000:]
    return results


def changes(flags: str) -> list[str]:
    return ["--" + change for change in flags.removeprefix("--").split(" --")] if flags else []


def flags_of(model: str, layout: str, *more: str) -> list[str]:
    flags = MODELS[model]
    if "plain optimizer" in layout:
        flags = without_flag(flags, "--use-distributed-optimizer")
    flags = with_flags(flags, *changes(LAYOUTS[layout][1]), *more)
    return in_pattern(flags, PATTERNS[model]) if model in PATTERNS else flags


def in_pattern(flags: list[str], pieces: Sequence[str]) -> list[str]:
    """What ``flags`` say of blocks, said of a hybrid model's layers: where stages are cut, and what is recomputed."""
    num_stages = 2 if "--pipeline-model-parallel-size" in flags else 1
    if (interleaved := "--num-layers-per-virtual-pipeline-stage") in flags:
        flags, num_stages = without_flag(flags, interleaved), len(pieces)
    if "block" in flags:
        flags = with_flags(flags, f"--recompute-num-layers {len(pieces[0])}")
    stages = ["".join(stage) for stage in itertools.batched(pieces, len(pieces) // num_stages)]
    return with_flags(flags, f"--hybrid-layer-pattern {'|'.join(stages)}")


class Continued(NamedTuple):
    """Steps after a checkpoint: the scalars, and what each rank did."""

    scalars: dict[str, dict[int, float]]
    results: list[Result]


def continued(log: Path, model: str, layout: str, *more: str, names: tuple[str, ...] = NAMES) -> Continued:
    flags = flags_of(model, layout, f"--tensorboard-dir {log}", *more)
    results = run(LAYOUTS[layout][0], flags)
    return Continued(training.scalars(log, *names), results)


def assert_agree(found: dict[str, dict[int, float]], expected: dict[str, dict[int, float]], tolerance=None) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert sorted(found[name]) == sorted(values)
        for step, value in values.items():
            rel = tolerance[name] if tolerance else TOLERANCE
            assert found[name][step] == pytest.approx(value, rel=rel), (name, step)


# --- losses and gradient norms -------------------------------------------------------------------------------------


class Start(NamedTuple):
    """A checkpoint of one step on one rank, and what one rank makes of it."""

    model: str
    folder: Path
    more: list[str]  # weights only: decision 11
    names: tuple[str, ...]
    expected: dict[str, dict[int, float]]

    def continued(self, layout: str, *more: str) -> Continued:
        log = self.folder / layout.replace(" ", "-")
        return continued(log, self.model, layout, *self.more, *more, names=self.names)


@pytest.fixture(scope="module")
def start_of(tmp_path_factory):
    return starts(tmp_path_factory)


def starts(places: pytest.TempPathFactory, names: tuple[str, ...] = NAMES) -> Callable[[str], Start]:
    """Function of a model and names of ``VARIANTS``, in one string, which starts each once.

    As a parameter of a fixture it would be made anew for most tests, since pytest sorts those of one module by the
    index of the parameter.
    """
    made: dict[str, Start] = {}

    def make(name: str) -> Start:
        if name not in made:
            made[name] = started(places.mktemp(name.replace(" ", "-")), *name.split(), names=names)
        return made[name]

    return make


def started(folder: Path, model: str, *variants: str, names: tuple[str, ...] = NAMES) -> Start:
    flags = [flag for name in variants for flag in VARIANTS[name]]
    names += tuple(BALANCE_LOSSES[name] for name in variants if name in BALANCE_LOSSES)
    run(1, flags_of(model, "one", "--train-iters 1", f"--save {folder}/start", "--save-interval 1", *flags))
    more = [f"--load {folder}/start", "--no-load-optim", f"--train-iters {1 + STEPS}", *flags]
    return Start(model, folder, more, names, continued(folder / "one", model, "one", *more, names=names).scalars)


@pytest.mark.parametrize(
    ("model", "layout"),
    [case(a, layout, quick=layout in QUICK[a]) for a in QUICK for layout in LAYOUTS if layout not in NOT_THESE],
)
def test_layout_agrees_with_one_rank(start_of, model, layout):
    start = start_of(model)
    found = start.continued(layout)
    assert sorted(found.scalars["lm loss"]) == [2, 3, 4]
    assert_agree(found.scalars, start.expected)
    assert {result.num_microbatches for result in found.results} == {num_microbatches(layout)}
    splits = [row for result in found.results for row in result.splits]
    counts = [row for result in found.results for row in result.counts]
    if layout == "expert tp2":  # every expert on both ranks, each with a part of it: other counts for every expert
        assert any(len(set(row)) > 1 for row in counts)
    if layout == "expert tp2 ep2":  # the tensor-parallel ranks of one expert bring other numbers of tokens
        assert any(len(set(row)) > 1 for row in splits)


def num_microbatches(layout: str) -> int:
    """Gradient accumulation: micro-batches of each data-parallel rank."""
    num_ranks, flags = LAYOUTS[layout]
    size = next((int(change.split()[1]) for change in changes(flags) if "--micro-batch-size" in change), 2)
    model_parallel = 2 ** (("--tensor-model" in flags) + ("--pipeline-model" in flags))
    return 8 // (size * num_ranks // model_parallel)


def test_most_layouts_accumulate_gradients():
    numbers = {layout: num_microbatches(layout) for layout in LAYOUTS}
    assert numbers["one"] == 4 and numbers["no accumulation"] == 1 and numbers["accumulation of 8"] == 8
    assert [layout for layout, number in numbers.items() if number == 1] == ["ep4", "no accumulation"]


@pytest.mark.parametrize("model", QUICK)
def test_another_step_would_be_noticed(start_of, model):
    """Negative control: consecutive steps differ by far more than the tolerance."""
    start = start_of(model)
    for name in NAMES:
        assert start.expected[name][3] != pytest.approx(start.expected[name][2], rel=10 * TOLERANCE)


BF16_LAYOUTS = ("ep2", "tp2 ep2", "pp2 interleaved", "dp2 overlapped gather", "ep2 recompute full")


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        case(f"{a} bf16", layout, quick=a == "scmoe" and layout == "tp2 ep2")
        for a in ARCHITECTURES
        for layout in BF16_LAYOUTS
    ]
    + [case("hybrid-mamba bf16", layout, quick=False) for layout in ("tp2 ep2", "pp2 interleaved")],
)
def test_bf16_layout_agrees_with_one_rank(start_of, model, layout):
    start = start_of(model)
    assert_agree(start.continued(layout).scalars, start.expected, BF16_TOLERANCE)


LONGCAT_LAYOUTS = ("ep2", "tp2 sp", "tp2 ep2", "pp2", "dp2 overlapped gather", "recompute full uniform", "tp2 pp2 ep2")
QUICK_LONGCAT = {"tp2 ep2"}


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=() if one in QUICK_LONGCAT else pytest.mark.full) for one in LONGCAT_LAYOUTS]
)
def test_longcat_agrees_with_one_rank(start_of, layout):
    """Latent attention under tensor parallelism, zero experts, and biases that move with all ranks' tokens."""
    start = start_of("longcat")
    assert_agree(start.continued(layout).scalars, start.expected)


UNIQUE_LAYOUTS = (
    "ep2",
    "tp2 ep2",
    "expert tp2",
    "expert tp2 ep2",
    "pp2 interleaved",
    "pp2 ep2",
    "dp2 overlapped gather",
)
UNIQUE_LAYOUTS += ("ep2 recompute full", "tp2 pp2 ep2")
UNIQUE = [("top-2", layout) for layout in UNIQUE_LAYOUTS]
UNIQUE += itertools.product(("longcat", "top-2-hybrid-mamba"), ("tp2 ep2", "expert tp2 ep2"))


@pytest.mark.parametrize(("model", "layout"), cases(UNIQUE, [("top-2", "expert tp2 ep2")]))
def test_unique_tokens_agree_with_one_rank(start_of, model, layout):
    """Where tokens travel as often as they have experts."""
    start = start_of(model)
    log = start.folder / f"unique-{layout.replace(' ', '-')}"
    found = continued(log, model, layout, *start.more, "--a2a-unique rank", names=start.names)
    assert_agree(found.scalars, start.expected)


FP8 = "--a2a-codec fp8 --fp8-transfers dispatch-forward combine-forward dispatch-backward combine-backward"
FP8_LAYOUTS = ("tp2 ep2", "expert tp2 ep2", "pp2 ep2", "ep2 recompute full", "tp2 pp2 ep2")
FP8_RUNS = [("top-2", layout) for layout in FP8_LAYOUTS]
FP8_RUNS += itertools.product(("longcat", "top-2-hybrid-mamba"), ("tp2 ep2",))
FP8_TOLERANCE = {"lm loss": 1e-3, "grad-norm": 2e-2}  # a sum in another order may round to another code


@pytest.mark.parametrize(("model", "layout"), cases(FP8_RUNS, [("top-2", "expert tp2 ep2")]))
def test_fp8_agrees_with_one_rank(start_of, model, layout):
    """Which sends nothing, and rounds all the same: nearer to it than to rows that travel as they are."""
    start = start_of(model)
    more = (*start.more, "--shortcut-resume changed", FP8)
    one = continued(start.folder / f"fp8-one-{layout.replace(' ', '-')}", model, "one", *more, names=start.names)
    log = start.folder / f"fp8-{layout.replace(' ', '-')}"
    found = continued(log, model, layout, *more, names=start.names)
    assert_agree(found.scalars, one.scalars, FP8_TOLERANCE)
    norms = found.scalars["grad-norm"]
    of_one, of_none = (
        sum(abs(norms[step] / norm - 1) for step, norm in expected["grad-norm"].items())
        for expected in (one.scalars, start.expected)
    )
    assert of_one < of_none


def train_with_cores_attention(flags: list[str]) -> Result:
    """``train`` with Core's own latent attention in the local spec."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from megatron_scmoe.models import submodules

    submodules.LatentSelfAttention = MLASelfAttention
    return train(flags)


def rotary_gradients(start: Start, layout: str, function, name: str) -> list[torch.Tensor]:
    """Of the rows that make the key's rotary part, in every block: what a step of plain descent takes from them."""
    folder = start.folder / name
    flags = flags_of("longcat", layout, *start.more, "--train-iters 2", f"--save {folder}", "--save-interval 2")
    flags = with_flags(flags, "--no-save-optim", "--optimizer sgd", "--lr 1", "--clip-grad 0")
    flags = without_flag(without_flag(flags, "--use-distributed-optimizer"), "--dist-ckpt-optim-fully-reshardable")
    results = ranks.run(function, LAYOUTS[layout][0], flags, timeout_s=180)
    assert "exit code" not in results[0].printed, results[0].printed[-3000:]
    before, after = (
        ranks.run(training.checkpoint_tensors, 1, path, step)[0]
        for path, step in ((start.folder / "start", 1), (folder, 2))
    )
    names = [key for key in after if key.endswith("linear_kv_down_proj.weight")]
    assert len(names) == 8
    return [(before[key] - after[key])[8:] for key in names]  # behind the rows of the latent


@pytest.mark.full
def test_cores_latent_attention_loses_gradients_under_tensor_parallelism(start_of):
    """Why there is a class of ours; Core's is the negative control."""
    start = start_of("longcat")
    expected = rotary_gradients(start, "one", train, "sgd-one")
    ours = rotary_gradients(start, "tp2 sp", train, "sgd-ours")
    cores = rotary_gradients(start, "tp2 sp", train_with_cores_attention, "sgd-cores")
    for one, two, other in zip(expected, ours, cores, strict=True):
        assert one.abs().max() > 1e-5
        assert (two - one).norm() < 1e-5 * one.norm()
        assert (other - one).norm() > 5e-4 * one.norm()  # up to 0.14, where attention is not even


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recompute_of_latent_projections(tmp_path, architecture):
    """Bit for bit what it is without recompute."""
    plain, found = (
        continued(tmp_path / name, architecture, "one", *changes(LATENT), *flags, f"--train-iters {STEPS}").scalars
        for name, flags in (("plain", []), ("recomputed", changes(f"{SELECTIVE} mla_up_proj")))
    )
    assert found == plain and len(plain["lm loss"]) == STEPS


SHARE_LAYOUTS = ("ep2", "tp2 sp", "tp2 ep2", "pp2", "pp2 ep2", "dp2", "dp2 overlapped gather", "tp2 pp2 ep2")
SHARE_LAYOUTS += ("recompute full uniform", "recompute full block", "ep2 recompute full")
QUICK_SHARE = {"ep2", "pp2"}


@pytest.mark.parametrize(
    ("model", "layout"),
    [case("dgmoe-share", layout, quick=layout in QUICK_SHARE) for layout in SHARE_LAYOUTS],
)
def test_shared_moe_agrees_with_one_rank(start_of, model, layout):
    """One MoE for two groups: its gradients come from both, and are reduced once."""
    start = start_of(model)
    assert_agree(start.continued(layout).scalars, start.expected)


SPAN_LAYOUTS = ("ep2", "tp2 sp", "tp2 ep2", "pp2", "dp2", "dp2 overlapped gather", "recompute full uniform")
SPANS = {
    "scmoe-span": (*SPAN_LAYOUTS, "pp2 interleaved in fours", "tp2 pp2 ep2"),
    "dgmoe-span": SPAN_LAYOUTS,
    "farskip": SPAN_LAYOUTS,
    "scmoe-share": SPAN_LAYOUTS,
}
QUICK_SPANS = {("dgmoe-span", "pp2"), ("farskip", "tp2 sp"), ("scmoe-share", "ep2")}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        case(model, layout, quick=(model, layout) in QUICK_SPANS)
        for model, layouts in SPANS.items()
        for layout in layouts
    ],
)
def test_span_agrees_with_one_rank(start_of, model, layout):
    """Outputs that land in the next group, and an MoE that serves two; no stage cuts either."""
    start = start_of(model)
    assert_agree(start.continued(layout).scalars, start.expected)


LATENT_EXPERTS_LAYOUTS = ("ep2", "tp2 sp", "tp2 ep2", "expert tp2 ep2", "pp2", "dp2 overlapped gather")
LATENT_EXPERTS_LAYOUTS += ("recompute full uniform", "tp2 pp2 ep2")


@pytest.mark.parametrize("layout", cases(LATENT_EXPERTS_LAYOUTS, {"tp2 ep2"}))
def test_latent_projections_agree_with_one_rank(start_of, layout):
    """Every tensor-parallel rank has them whole, and a part of the tokens, over which their gradients are summed."""
    start = start_of("latent-experts")
    assert_agree(start.continued(layout).scalars, start.expected)


def train_with_unmarked_projections(flags: list[str]) -> Result:
    """``train`` where Core is not told that each tensor-parallel rank saw other tokens."""
    from megatron_scmoe.cpu.duplicated_linear import DuplicatedLinear

    original = DuplicatedLinear.__init__

    def unmarked(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    DuplicatedLinear.__init__ = unmarked
    return train(flags)


@pytest.mark.full
def test_unmarked_projections_lose_gradients(start_of):
    """Negative control: the first loss is the same, its gradients are not."""
    start = start_of("latent-experts")
    log = start.folder / "unmarked"
    flags = flags_of("latent-experts", "tp2 sp", *start.more, "--train-iters 2", f"--tensorboard-dir {log}")
    ranks.run(train_with_unmarked_projections, 2, flags, timeout_s=180)
    found = training.scalars(log, *NAMES)
    assert found["lm loss"][2] == pytest.approx(start.expected["lm loss"][2], rel=TOLERANCE)
    assert found["grad-norm"][2] != pytest.approx(start.expected["grad-norm"][2], rel=3 * TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("move", [("tp2 ep2", "ep2"), ("ep2", "tp2 sp")])
def test_latent_projections_move_between_layouts(tmp_path, move):
    """Weights and moments bit for bit: one of the tensor-parallel ranks writes them."""
    source, target = move
    (tmp_path / "from").mkdir()
    model = "latent-experts that move"
    assert_loads(save(tmp_path / "from", model, source), tmp_path / "to", model, target)


AUX_LAYOUTS = ("ep2", "tp2 sp", "tp2 ep2", "dp2", "pp2", "pp2 ep2 interleaved", "recompute full uniform")
QUICK_AUX = {("dgmoe", "tp2 sp")}


@pytest.mark.parametrize(
    ("model", "layout"),
    [case(f"{a} aux_loss", layout, quick=(a, layout) in QUICK_AUX) for a in ARCHITECTURES for layout in AUX_LAYOUTS]
    + [case("hybrid-mamba aux_loss", layout, quick=False) for layout in ("tp2 ep2", "pp2 ep2 interleaved")],
)
def test_balance_loss_agrees_with_one_rank(start_of, model, layout):
    """The logged balance loss too. Core computes it over one micro-batch, of which these layouts make no other size."""
    start = start_of(model)
    assert_agree(start.continued(layout).scalars, start.expected)


BALANCE_IN_LAYOUTS = {
    # kind, layout -> whether it is the same loss there
    ("aux_loss", "no accumulation"): False,
    ("seq_aux_loss", "no accumulation"): True,
    ("global_aux_loss", "dp2"): False,
    ("global_aux_loss", "pp2"): True,
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "layout", "is_same"),
    [
        (f"{model} {kind}", layout, is_same)
        for model in ("stock", *ARCHITECTURES)
        for (kind, layout), is_same in BALANCE_IN_LAYOUTS.items()
    ],
)
def test_balance_loss_that_core_computes_otherwise_in_another_layout(start_of, model, layout, is_same):
    """``aux_loss`` is of one micro-batch, whatever its size; ``seq_aux_loss`` of one sequence; ``global_aux_loss`` of
    all that the data-parallel ranks saw so far in this step. So the stock model differs where ours do.
    """
    start = start_of(model)
    found = start.continued(layout).scalars
    assert found["lm loss"][2] == pytest.approx(start.expected["lm loss"][2], rel=TOLERANCE)
    if is_same:
        assert_agree(found, start.expected)
        return
    name = start.names[-1]  # what it does to the gradients depends on the data
    assert found[name][2] != pytest.approx(start.expected[name][2], rel=TOLERANCE)


# --- dropout: other random numbers in every layout, the same ones in one layout --------------------------------------

DROPOUT = ("--hidden-dropout 0.1", "--attention-dropout 0.1")
SAME_WITH_DROPOUT = {
    "overlap": ("--overlap fixed",),
    "recompute": tuple(changes(f"{FULL} uniform --recompute-num-layers 1")),
}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """Function of architecture, layout and flags: scalars of three steps with dropout."""
    made: dict[tuple[str, ...], dict[str, dict[int, float]]] = {}

    def make(*key: str) -> dict[str, dict[int, float]]:
        if key not in made:
            made[key] = continued(tmp_path_factory.mktemp("dropout"), *key, f"--train-iters {STEPS}").scalars
        return made[key]

    return make


@pytest.mark.parametrize(
    ("architecture", "layout", "change"),
    [
        case(a, layout, change, quick=(a, layout, change) == ("scmoe", "tp2 sp", "overlap"))
        for a in ARCHITECTURES
        for layout in ("tp2 sp", "ep2", "tp2 ep2")
        for change in SAME_WITH_DROPOUT
    ],
)
def test_dropout_is_the_same_overlapped_and_recomputed(dropped, architecture, layout, change):
    """Bit for bit: the random numbers of an op do not depend on what flies meanwhile, and come again in recompute."""
    plain = dropped(architecture, layout, *DROPOUT, "--overlap off")
    found = dropped(architecture, layout, *DROPOUT, *SAME_WITH_DROPOUT[change])
    assert found == plain and len(plain["lm loss"]) == STEPS


@pytest.mark.full
@pytest.mark.parametrize("dropout", DROPOUT)
def test_dropout_is_noticed(dropped, dropout):
    """Negative control: each of them changes the first loss."""
    without = dropped("scmoe", "tp2 sp", "--overlap off")
    assert dropped("scmoe", "tp2 sp", dropout, "--overlap off")["lm loss"][1] != without["lm loss"][1]


# --- save here, load there -----------------------------------------------------------------------------------------

FAMILIES = (
    # Core gives the experts an optimizer of their own in all of the first, and in none of the second.
    ("ep2", "ep4", "tp2 sp", "tp2 ep2", "expert tp2 ep2", "pp2 ep2", "tp2 pp2 ep2"),
    ("one", "dp2", "expert tp2", "pp2", "pp2 interleaved"),
)
MOVES = [
    (family[i], family[(i + step) % len(family)]) for family in FAMILIES for i in range(len(family)) for step in (1, 2)
]
"""Every layout saves, and the next two of its family load."""


WIDE = "--hidden-size 128"
"""Core loses moments where a bucket ends in padding, which it does not at this width: see the last test."""


class Saved(NamedTuple):
    """A checkpoint of two steps, and steps 1 to 4 uninterrupted."""

    folder: Path
    through: Continued


def save(folder: Path, model: str, layout: str, width: str = WIDE) -> Saved:
    flags = [width, "--train-iters 4", f"--save {folder}/save", "--save-interval 2"]
    through = continued(folder / "log", model, layout, *flags)
    (folder / "save" / "latest_checkpointed_iteration.txt").write_text("2")
    return Saved(folder / "save", through)


def assert_loads(saved: Saved, folder: Path, model: str, layout: str, width: str = WIDE) -> None:
    """Weights and moments bit for bit; logits, losses and gradient norms of the next steps within the tolerance."""
    load = [width, f"--load {saved.folder}"]
    found = continued(folder / "log", model, layout, *load, "--train-iters 4")
    assert sorted(found.scalars["lm loss"]) == [3, 4]
    assert_agree(found.scalars, {name: {i: saved.through.scalars[name][i] for i in (3, 4)} for name in NAMES})
    assert_same_logits(logits_at(2, found.results), logits_at(2, saved.through.results))
    assert_saves_the_same(saved, folder, model, layout, width)


def assert_saves_the_same(saved: Saved, folder: Path, model: str, layout: str, width: str = WIDE) -> None:
    """Weights and moments, bit for bit, when the checkpoint is loaded and saved again."""
    load = [width, f"--load {saved.folder}"]
    convert = ["--ckpt-convert-format torch_dist", f"--ckpt-convert-save {folder}", "--train-iters 2"]
    ranks.run(train, LAYOUTS[layout][0], flags_of(model, layout, *load, *convert), timeout_s=180)
    before, after = (
        ranks.run(training.checkpoint_tensors, 1, path, 2)[0] for path in (saved.folder, folder / "torch_dist")
    )
    moments = [key for key in before if "exp_avg" in key]
    assert moments and all(before[key].abs().sum() > 0 for key in moments)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function of architecture and layout."""
    made: dict[tuple[str, str], Saved] = {}

    def make(architecture: str, layout: str) -> Saved:
        if (architecture, layout) not in made:
            made[architecture, layout] = save(tmp_path_factory.mktemp("saved"), architecture, layout)
        return made[architecture, layout]

    return make


@pytest.mark.full
@pytest.mark.parametrize(
    ("architecture", "source", "target"),
    [case(a, *move, quick=True) for a in ARCHITECTURES for move in MOVES]
    + [case(model, *move, quick=True) for model in PATTERNS for move in MOVES[::2]],  # the next one of its family
)
def test_save_at_one_layout_load_at_another(saved, tmp_path, architecture, source, target):
    """At other widths, and one of make test: tests/training/test_widths.py."""
    assert_loads(saved(architecture, source), tmp_path, architecture, target)


def logits_at(iteration: int, results: list[Result]) -> dict[tuple[int, ...], torch.Tensor]:
    return {key: logits for result in results for key, logits in result.logits.items() if key[0] == iteration}


def assert_same_logits(found: dict[tuple[int, ...], torch.Tensor], expected: dict[tuple[int, ...], torch.Tensor]):
    assert found and found.keys() == expected.keys()
    for key, logits in found.items():
        torch.testing.assert_close(logits, expected[key], rtol=TOLERANCE, atol=TOLERANCE)


def train_with_whole_projections(flags: list[str]) -> Result:
    """``train`` where a tensor-parallel rank saves its rows of z, x, B, C and dt of a Mamba layer in one piece."""
    from megatron.core.ssm import mamba_mixer

    mamba_mixer._split_tensor_factory = lambda tensor, *_args: tensor
    return train(flags)


@pytest.mark.full
def test_projections_of_mamba_in_one_piece_are_noticed(tmp_path):
    """Negative control of the moves: on one rank the rows would lie in another order."""
    scalars = []
    saving, loading = [f"--save {tmp_path}/save", "--save-interval 2"], [f"--load {tmp_path}/save"]
    for layout, folder in (("tp2 sp", saving), ("ep2", loading)):
        log = tmp_path / layout.replace(" ", "-")
        more = [WIDE, "--train-iters 4", f"--tensorboard-dir {log}"]
        flags = flags_of("hybrid-mamba", layout, *more, *folder)
        ranks.run(train_with_whole_projections, 2, flags, timeout_s=180)
        (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("2")
        scalars.append(training.scalars(log, *NAMES))
    through, found = scalars
    assert found["grad-norm"][3] != pytest.approx(through["grad-norm"][3], rel=10 * TOLERANCE)


REFUSED_MOVES = {
    ("one", "ep2"): ["expert_model_parallel_size 2,", "keep --expert-model-parallel-size 1,"],
    ("ep2", "one"): ["expert_model_parallel_size 1,", "keep --expert-model-parallel-size above 1,"],
    ("one", "tp2 sp"): [
        "expert_tensor_parallel_size 1, tensor_model_parallel_size 2",
        "use --expert-tensor-parallel-size 2,",
    ],
}


@pytest.mark.parametrize("move", REFUSED_MOVES, ids=" to ".join)
@pytest.mark.parametrize("model", cases(["scmoe", "stock"], ["scmoe"]))
def test_moments_of_another_number_of_optimizers_are_refused(tmp_path, model, move):
    """A limit of Core, in the stock model as well; ``test_core_cannot_load_them`` is the negative control."""
    flags = ARCHITECTURES["scmoe"] if model == "scmoe" else STOCK
    source, target = (with_flags(flags, *changes(LAYOUTS[layout][1])) for layout in move)
    run(LAYOUTS[move[0]][0], with_flags(source, "--train-iters 1", f"--save {tmp_path}", "--save-interval 1"))
    loading = with_flags(target, f"--load {tmp_path}")
    num_ranks = LAYOUTS[move[1]][0]
    words = ["cannot load the moments", f"the checkpoint in {tmp_path}", "--no-load-optim, or --finetune"]
    entry.assert_all_ranks_refuse(loading, [*words, *REFUSED_MOVES[move]], num_ranks, ONE_QUEUE)
    allowed = [with_flags(loading, flag) for flag in ("--no-load-optim", "--finetune")]
    entry.assert_accepted(allowed, ONE_QUEUE | entry.world(num_ranks))


def train_unchecked(flags: list[str]) -> Result:
    from megatron_scmoe.training import moments, resume

    moments._check_expert_optimizer = lambda args, saved: None
    resume.check_buckets = lambda args, model_chunks: model_chunks
    return train(flags)


@pytest.mark.full
def test_core_cannot_load_them(tmp_path):
    """Why the above is refused: when this test fails, Core has learnt it and the refusal can go."""
    flags = STOCK
    run(1, with_flags(flags, "--train-iters 1", f"--save {tmp_path}", "--save-interval 1"))
    with pytest.raises(ranks.RankError, match="Expected 2 entries in state dict, but got 4"):
        ranks.run(train_unchecked, 2, with_flags(flags, EP2, f"--load {tmp_path}"), timeout_s=180)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recompute_of_grouped_experts_is_refused(architecture):
    """By Megatron's own rule; what we refuse of recompute is tried in test_arguments.py."""
    flags = with_flags(ARCHITECTURES[architecture], *changes(f"{SELECTIVE} moe_act"))
    entry.assert_refused([(flags, ["Megatron's own rule: moe_act in recompute_modules is only supported with"])])


# --- gradient buckets that end in padding --------------------------------------------------------------------------

SEVERAL = ["--overlap-grad-reduce", "--ddp-bucket-size 3000"]
TIED = [*changes(PP2), "--num-layers 4"]
PADDED = {
    # a bucket before the last ends in padding -> words of the line
    "bucket size": (SEVERAL, ["use --ddp-bucket-size", ", or add --no-save-optim"]),
    "bucket number": (
        ["--overlap-grad-reduce", "--ddp-num-buckets 3"],
        ["use --ddp-bucket-size", " without --ddp-num-buckets, or add --no-save-optim"],
    ),
    "bf16": ([*SEVERAL, "--bf16"], [", or drop --dist-ckpt-optim-fully-reshardable (", ", or add --no-save-optim"]),
    "tied embeddings": (TIED, ["on rank 0", "; add --untie-embeddings-and-output-weights, or add --no-save-optim"]),
    "both": (
        [*SEVERAL, *TIED],
        ["use --ddp-bucket-size", " and add --untie-embeddings-and-output-weights, or add --no-save-optim"],
    ),
    "experts": (
        [*SEVERAL, *changes(EP2), "--ddp-bucket-size 1000"],
        ["use --ddp-bucket-size", ", or add --no-save-optim"],
    ),
}
PADDED_STOCK = {name: with_flags(STOCK, *flags) for name, (flags, _) in PADDED.items()}
for _name in ("tied embeddings", "both"):
    PADDED_STOCK[_name] = with_flags(PADDED_STOCK[_name], "--moe-layer-freq [0,1]*2")


def refused_in_training(num_ranks: int, flags: list[str]) -> str:
    """The one line that says why, where every rank ends with exit code 2."""
    results = ranks.run(train, num_ranks, flags, timeout_s=180)
    assert [result.printed.splitlines()[-1] for result in results] == ["exit code 2"] * num_ranks
    (line,) = [line for result in results for line in result.printed.splitlines() if "refused: " in line]
    return line


@pytest.mark.parametrize(
    ("model", "name"),
    [
        case(model, name, quick=(model == "stock") == (name in ("tied embeddings", "both")))
        for model in ("scmoe", "stock")
        for name in PADDED
    ],
)
def test_moments_behind_a_padded_bucket_are_refused(tmp_path, model, name):
    flags, words = PADDED[name]
    flags = PADDED_STOCK[name] if model == "stock" else with_flags(MODELS[model], *flags)
    line = refused_in_training(2, with_flags(flags, f"--save {tmp_path}", "--save-interval 1", "--train-iters 1"))
    rule = "Core saves moments at the wrong places behind a gradient bucket that ends in padding"
    for word in [rule, "--dist-ckpt-optim-fully-reshardable is set and bucket", *words]:
        assert word in line, line
    assert not list(tmp_path.glob("iter_*"))


def test_conversion_is_refused_too(tmp_path):
    """It saves before the first step."""
    run(2, with_flags(STOCK, f"--save {tmp_path}", "--save-interval 1", "--train-iters 1"))
    convert = ["--ckpt-convert-format torch_dist", f"--ckpt-convert-save {tmp_path}/to", f"--load {tmp_path}"]
    assert "ends in padding" in refused_in_training(2, with_flags(PADDED_STOCK["bucket size"], *convert))


UNHARMED = {
    "no moments saved": [*SEVERAL, "--no-save-optim"],
    "no padding": [*SEVERAL, WIDE],
    "one bucket": ["--ddp-bucket-size 3000"],
    "nothing trains": [*SEVERAL, "--skip-train"],
    "other format": [*SEVERAL, "--ckpt-format torch"],
}


@pytest.mark.parametrize("name", [case(name, quick=name == "other format") for name in UNHARMED])
def test_what_does_no_harm_is_not_refused(tmp_path, name):
    """Negative control: next to what is refused lies what is not."""
    run(2, with_flags(STOCK, *UNHARMED[name], f"--save {tmp_path}", "--save-interval 1", "--train-iters 1"))


def resumed(flags: list[str], folder: Path, function=train) -> tuple[dict[str, dict[int, float]], ...]:
    """Steps 3 and 4 of two ranks, uninterrupted and resumed at 2."""
    flags = with_flags(flags, "--train-iters 4")
    save = [f"--save {folder}/save", "--save-interval 2", f"--tensorboard-dir {folder}/through"]
    load = [f"--load {folder}/save", f"--tensorboard-dir {folder}/resumed"]
    results = ranks.run(function, 2, with_flags(flags, *save), timeout_s=180)
    (folder / "save" / "latest_checkpointed_iteration.txt").write_text("2")
    results += ranks.run(function, 2, with_flags(flags, *load), timeout_s=180)
    assert not [result.printed for result in results if "exit code" in result.printed]
    through, again = (training.scalars(folder / name, *NAMES) for name in ("through", "resumed"))
    return {name: {i: through[name][i] for i in (3, 4)} for name in NAMES}, again


@pytest.mark.full
@pytest.mark.parametrize("name", ["bucket size", "bf16", "tied embeddings", "both"])
def test_what_the_refusal_says_helps(tmp_path, name):
    """With the fix that the line gives, a resumed run is the uninterrupted one bit for bit."""
    flags = PADDED_STOCK[name]
    line = refused_in_training(2, with_flags(flags, f"--save {tmp_path}", "--save-interval 1"))
    if "drop --dist-ckpt-optim-fully-reshardable" in line:
        flags = without_flag(flags, "--dist-ckpt-optim-fully-reshardable")
    else:
        fixes = re.findall(r"(?:use|add) (--(?:ddp-bucket-size \d+|untie\S+[a-z]))", line)
        flags = with_flags(flags, *fixes)
    expected, found = resumed(flags, tmp_path)
    assert found == expected


CORE_SHIFTS = {
    "bucket size": (PADDED_STOCK["bucket size"], False),
    "tied embeddings": (PADDED_STOCK["tied embeddings"], False),
    "no padding": (with_flags(PADDED_STOCK["bucket size"], WIDE), True),
}


@pytest.mark.full
@pytest.mark.parametrize("name", CORE_SHIFTS)
def test_core_shifts_moments_behind_a_padded_bucket(tmp_path, name):
    """Why it is refused, tried with the stock model. When the first two fail, Core has been mended and it can go."""
    flags, is_exact = CORE_SHIFTS[name]
    expected, found = resumed(flags, tmp_path, train_unchecked)
    assert (found["grad-norm"][3] == pytest.approx(expected["grad-norm"][3], rel=TOLERANCE)) == is_exact


@pytest.mark.full
def test_core_cannot_save_the_other_format_behind_tied_embeddings(tmp_path):
    """Why the line does not name it there. When this fails, Core has been mended and the line can."""
    flags = without_flag(with_flags(PADDED_STOCK["tied embeddings"], "--bf16"), "--dist-ckpt-optim-fully-reshardable")
    with pytest.raises(ranks.RankError, match="has out of bounds chunk"):
        ranks.run(
            train, 2, with_flags(flags, f"--save {tmp_path}", "--save-interval 1", "--train-iters 1"), timeout_s=180
        )
