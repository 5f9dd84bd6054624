"""What a dry run says, compared with what ranks of real trainings hold (tests/support/footprint.py)."""

from __future__ import annotations

import dataclasses
import re

import commands
import footprint
import pytest
import ranks
import torch
from training import ROOT, SCMOE, with_flags, without_flag

from megatron_scmoe.config import expected_unique_share
from megatron_scmoe.dry_run.meta import FlashAttention, SavedForBackward, balanced_map
from megatron_scmoe.dry_run.stages import Stage, micro_batches_in_flight
from megatron_scmoe.dry_run.unique import even_choices

# Large enough for buckets' padding, and for the counts of random experts, to be small.
BASE = with_flags(
    [*SCMOE, "--moe-router-force-load-balancing"],
    *("--hidden-size 64", "--num-attention-heads 4", "--ffn-hidden-size 256", "--vocab-size 1000", "--seq-length 64"),
    *("--max-position-embeddings 64", "--moe-ffn-hidden-size 128", "--moe-shared-expert-intermediate-size 128"),
    *("--micro-batch-size 4", "--global-batch-size 16", "--train-iters 1"),
)
EP2, PP2 = "--expert-model-parallel-size 2", "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full"
DISTRIBUTED = ("--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
WORLD = {"RANK": "0", "LOCAL_RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "ep2": (2, (EP2,)),
    "ep2 bf16 distributed optimizer": (2, (EP2, *DISTRIBUTED)),
    "ep2 bf16 plain optimizer": (2, (EP2, "--bf16")),
    "dp4 ep2 fp32 distributed optimizer": (4, (EP2, "--use-distributed-optimizer")),
    "pp2": (2, (PP2,)),
    "pp2 interleaved": (2, (PP2, "--num-virtual-stages-per-pipeline-rank 2", "--num-layers 8")),
    "tp2": (2, ("--tensor-model-parallel-size 2", "--sequence-parallel")),
    "pp2 tp2 ep2": (
        4,
        (
            PP2,
            "--tensor-model-parallel-size 2",
            "--sequence-parallel",
            EP2,
            "--expert-tensor-parallel-size 1",
            "--bf16",
        ),
    ),
    "recompute full uniform": (2, (EP2, FULL, "--recompute-method uniform", "--recompute-num-layers 2")),
    "recompute full block": (2, (EP2, FULL, "--recompute-method block", "--recompute-num-layers 2")),
    "pp2 recompute full": (2, (PP2, FULL, "--recompute-method uniform", "--recompute-num-layers 2")),
    "recompute attention": (2, (EP2, "--recompute-granularity selective", "--recompute-modules core_attn")),
    "padded capacity": (2, (EP2, "--moe-expert-capacity-factor 2.0", "--moe-pad-expert-input-to-capacity")),
    "chunks": (2, (EP2, "--overlap-chunks 2")),
    "latents": (2, (EP2, "--moe-latent-size 16")),
    "unique tokens": (2, (EP2, "--a2a-unique rank", "--num-experts 8", "--moe-router-topk 4", "--bf16")),
    "unique tokens in chunks": (
        4,
        (
            *("--expert-model-parallel-size 4", "--a2a-unique rank", "--num-experts 8", "--moe-router-topk 2"),
            *("--overlap-chunks 2", "--moe-latent-size 16"),
        ),
    ),
    "cp2 ep2": (2, ("--context-parallel-size 2", EP2, "--use-distributed-optimizer")),
    "prediction layer": (2, (PP2, "--mtp-num-layers 1", "--untie-embeddings-and-output-weights")),
    "prediction layer recomputed": (
        2,
        (EP2, "--mtp-num-layers 1", FULL, "--recompute-method uniform", "--recompute-num-layers 1"),
    ),
    "fused activations": (2, (EP2, "--cross-entropy-loss-fusion", "--moe-router-dtype fp32")),
}
QUICK = {
    "unique tokens",
    "prediction layer",
    "ep2 bf16 distributed optimizer",
    "pp2 interleaved",
    "recompute full uniform",
}


def estimated(flags: list[str], num_ranks: int) -> list[Stage]:
    (found,) = ranks.run(footprint.estimated, 1, flags, WORLD | {"WORLD_SIZE": str(num_ranks)}, distributed=False)
    return found


def measured(flags: list[str], num_ranks: int) -> list[footprint.Footprint]:
    return ranks.run(footprint.measure, num_ranks, flags, WORLD)


def within(value: float, truth: float, share: float) -> bool:
    return abs(value - truth) <= share * truth


def agrees(stage: Stage, rank: footprint.Footprint) -> bool:
    """The bounds that docs/cluster.md promises."""
    return (
        stage.held == (rank.dense, rank.expert)
        and within(stage.standing.weights, rank.weights, 0.02)
        and within(stage.standing.gradients, rank.gradients, 0.02)
        and within(stage.standing.optimizer, rank.optimizer, 0.02)
        and within(stage.activations, rank.activations, 0.1)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in CASES]
)
def test_ranks_hold_what_is_said(name):
    num_ranks, changes = CASES[name]
    flags = with_flags(BASE, *changes)
    stages, held = estimated(flags, num_ranks), measured(flags, num_ranks)
    for number, stage in enumerate(stages):
        for rank in held[number * num_ranks // len(stages) : (number + 1) * num_ranks // len(stages)]:
            assert agrees(stage, rank), (stage, rank)
            assert not any(agrees(wrong, rank) for wrong in mistaken(stage)), (stage, rank)


def mistaken(stage: Stage) -> list[Stage]:
    """Negative control: what a careless estimate would say."""
    standing = stage.standing
    forgets = {"recomputed": 0} if stage.recomputed else {"in_flight": [number + 1 for number in stage.in_flight]}
    return [
        dataclasses.replace(stage, standing=standing._replace(weights=standing.weights * 2)),
        dataclasses.replace(stage, standing=standing._replace(gradients=standing.gradients // 2)),
        dataclasses.replace(stage, standing=standing._replace(optimizer=standing.optimizer * 3 // 2)),
        dataclasses.replace(stage, **forgets),
    ]


@pytest.mark.full
@pytest.mark.parametrize("form", ["dgmoe", "top-2"])
def test_other_forms_too(form):
    changes = {
        "dgmoe": ("--shortcut dgmoe", "--moe-router-topk 2"),
        "top-2": ("--shortcut none", "--moe-router-topk 2", "--moe-layer-freq [0,1]*2"),
    }
    flags = without_flag(with_flags(BASE, EP2, *changes[form]), "--moe-shared-expert-intermediate-size")
    (stage,), held = estimated(flags, 2), measured(flags, 2)
    assert all(agrees(stage, rank) for rank in held), (stage, held)


@pytest.mark.parametrize(
    "stage, stages, chunks, micro_batches, expected",
    [
        (0, 1, 1, 8, [1]),
        (0, 4, 1, 8, [4]),
        (3, 4, 1, 8, [1]),
        (0, 4, 1, 2, [2]),
        # Stage 0 of 2 goes forward with 2 (a round of its first chunk) + 2 more, and one before the first turns back.
        (0, 2, 2, 4, [3, 2]),
        (1, 2, 2, 4, [2, 1]),
    ],
)
def test_micro_batches_in_flight(stage, stages, chunks, micro_batches, expected):
    found = micro_batches_in_flight(
        stage=stage, num_stages=stages, num_chunks=chunks, round_size=stages, num_micro_batches=micro_batches
    )
    assert found == expected


def test_balanced_experts():
    routing_map = balanced_map(6, torch.tensor([3, 3, 3, 3]))
    assert routing_map.sum(dim=0).tolist() == [3, 3, 3, 3] and routing_map.sum(dim=1).tolist() == [2] * 6


@pytest.mark.parametrize(
    "tokens, topk, experts, zero, ranks_", [(4096, 8, 64, 0, 8), (1024, 2, 8, 0, 2), (1000, 12, 512, 256, 32)]
)
def test_even_choices(tokens, topk, experts, zero, ranks_):
    """Each as many, all about as often, and to as many ranks as chance has it."""
    found = even_choices(tokens, topk, experts + zero)
    assert set(found.sum(dim=1).tolist()) == {topk}
    of_ranks = found[:, :experts].unflatten(1, (ranks_, -1))
    sent = of_ranks.any(dim=-1).sum().item() / of_ranks.sum().item()
    assert sent == pytest.approx(expected_unique_share(experts, topk, ranks_, zero), rel=0.025)
    shares = of_ranks.sum(dim=(0, 2)).float()
    assert shares.max() <= shares.mean() * 1.05
    in_turn = balanced_map(tokens, found[:, :experts].sum(dim=0)).unflatten(1, (ranks_, -1))  # negative control
    assert in_turn.any(dim=-1).sum().item() / in_turn.sum().item() > 1.03 * sent


def test_attention_keeps_what_a_flash_attention_keeps():
    """Torch's own, for CPUs: queries, keys, values, output and the logarithms of sums."""
    query, key, value = (torch.randn(64, 2, 4, 32, requires_grad=True) for _ in range(3))

    def kept(attend):
        saved = SavedForBackward(torch.nn.Module())
        with saved.counting():
            output = attend()
        assert output.requires_grad
        return saved.nbytes

    heads_first = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        flash = kept(lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = kept(lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True))
    stand_in = kept(lambda: FlashAttention()(query, key, value))
    assert flash == stand_in != plain


def dry_run(flags: list[str], **environment: str):
    return commands.run(
        ROOT / "pretrain_gpt_scmoe.py", *flags, env=WORLD | {"WORLD_SIZE": "2", "DRY_RUN": "1"} | environment
    )


def test_the_command_prints_a_table(tmp_path):
    """And leaves nothing behind, and says nothing else; one rank speaks for all."""
    flags = with_flags(BASE, EP2, f"--save {tmp_path / 'save'}", "--save-interval 1")
    flags = with_flags(flags, f"--tensorboard-dir {tmp_path / 'logs'}", f"--overlap-report {tmp_path / 'report'}")
    done = dry_run(flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Dry run on 2 GPUs") and "not counted" in done.stdout
    (row,) = re.findall(r"^ +0 +4 +2 +1 .*$", done.stdout, re.MULTILINE)
    assert len(row.split()) == 12
    assert "local spec" not in done.stdout  # it is what was asked for
    assert list(tmp_path.iterdir()) == []
    assert dry_run(flags, RANK="1").stdout == ""


def test_rows_that_are_rounded_keep_nothing():
    """The table is that of rows as they are, and says what it leaves out."""
    plain, fp8 = (dry_run(with_flags(BASE, EP2, *more)) for more in ((), ("--a2a-codec fp8",)))
    assert fp8.returncode == 0, fp8.stderr
    *table, last = fp8.stdout.splitlines()
    assert table == plain.stdout.splitlines() and "--a2a-codec fp8 makes smaller" in last


def test_a_stock_model():
    """With what stands for Transformer Engine's attention in Core's own spec."""
    flags = with_flags([*BASE, *EP2.split()], "--shortcut none", "--moe-layer-freq [0,1]*2")
    done = dry_run(with_flags(flags, "--transformer-impl transformer_engine"))
    assert done.returncode == 0, done.stderr


def test_a_dense_model():
    flags = with_flags(BASE, "--shortcut none", "--transformer-impl transformer_engine")
    for name in [flag for flag in flags if flag.startswith("--moe-") or flag == "--num-experts"]:
        flags = without_flag(flags, name)
    done = dry_run(flags)
    assert done.returncode == 0 and " 0 of routed experts" in done.stdout, done.stderr


def test_what_needs_a_gpu_is_left_out_and_named():
    flags = [*BASE, *EP2.split(), "--moe-grouped-gemm", "--moe-permute-fusion", "--tp-comm-overlap", "--bf16"]
    flags = with_flags(flags, "--tensor-model-parallel-size 2", "--sequence-parallel")
    flags = with_flags(flags, "--transformer-impl transformer_engine", "--high-priority-stream-groups ep")
    done = dry_run(flags, WORLD_SIZE="4")
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    for flag in ("--transformer-impl transformer_engine", "--moe-grouped-gemm", "--moe-permute-fusion"):
        assert flag in last
    assert "--tp-comm-overlap" in last and "--bf16" not in last


REFUSED = {
    "ours": (["--moe-every 3"], "groups must be whole"),
    "a flag that groups do not know": (["--delay-wgrad-compute"], "--delay-wgrad-compute is True"),
    "Megatron's": (["--global-batch-size 15"], "Megatron's own rule"),
    "what the model has to be there for": (
        [
            *("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", "--overlap-grad-reduce"),
            *("--ddp-bucket-size 3000", "--save nowhere", "--save-interval 1", "--hidden-size 72"),
        ],
        "Core saves moments at the wrong places",
    ),
    "a codec": (["--a2a-codec lsh"], "--a2a-codec is lsh in a dry run"),
    "unique tokens of nodes": (
        ["--a2a-unique node", "--moe-router-topk 2", "--expert-model-parallel-size 2"],
        "--a2a-unique is node in a dry run; use --a2a-unique rank for it",
    ),
    "blocks of another spec": (["--shortcut none", "--spec here there"], "--spec is here there"),
    "an optimizer": (["--optimizer muon"], "--optimizer is muon"),
    "host memory": (
        ["--optimizer-cpu-offload", "--use-precision-aware-optimizer", "--use-distributed-optimizer"],
        "--optimizer-cpu-offload is set",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_training_refuses(name):
    changes, words = REFUSED[name]
    done = dry_run(with_flags(BASE, *changes))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


@pytest.mark.parametrize("size", ["0", "-8", "x"])
def test_a_world_of_no_gpu_is_refused(size):
    done = dry_run(BASE, WORLD_SIZE=size)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and f"WORLD_SIZE is {size} in a dry run" in done.stderr, done.stderr
