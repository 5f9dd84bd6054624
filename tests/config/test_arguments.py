"""What cannot work is refused in one line, before any process group starts, with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import pickle
import subprocess
import sys
import typing

import commands
import entry
import pytest
import ranks
import torch
import training
from training import ROOT, SCMOE, STOCK, STOCK_SHARED_EXPERT, with_flags, without_flag

REFUSED = {
    # flags -> words that the line must hold: the rule, both values, the fix
    "--num-layers 5": ["groups must be whole", "--num-layers 5", "--moe-every 2", "use 4 layers"],
    "--moe-every 5": ["1 to 4 blocks", "--moe-every is 5"],
    "--moe-every 1": ["the group has 1 op before its MoE", "is pos2", "use --shortcut-position pos1"],
    "--shortcut-position pos1 pos2 pos3": ["one value or one for each group", "3 values and 2 groups", "give 1 or 2"],
    "--expert-slot 5": ["slots 1 to 4", "--expert-slot of group 0 is 5", "use a value from 1 to 4"],
    "--expert-slot 0": ["slots 1 to 4", "is 0"],
    "--expert-slot 1 2 3": ["3 values and 2 groups"],
    "--overlap off --overlap-chunks 2": ["--overlap is off and --overlap-chunks is 2"],
    "--overlap adaptive --expert-slot 2": ["--overlap is adaptive and --expert-slot is 2", "use --overlap fixed"],
    "--overlap-interval -1": ["--overlap-interval is -1", "use 0 to measure once"],
    "--a2a-weights-apart-above -1": ["a size is counted from 0", "--a2a-weights-apart-above is -1", "inf for never"],
    "--a2a-weights-apart-above nan": ["a size is counted from 0", "--a2a-weights-apart-above is nan"],
    "--a2a-codec lsh --lsh-evaluation centroids --a2a-weights-apart-above 4": [
        "centroids travel without weights",
        "--lsh-evaluation is centroids and --a2a-weights-apart-above is 4",
    ],
    "--a2a-unique rank --moe-router-topk 1": ["with one expert each", "--moe-router-topk is 1", "drop --a2a-unique"],
    "--a2a-unique node --moe-router-topk 2": [
        "once to each of several nodes",
        "--a2a-unique is node and --expert-model-parallel-size is 1",
    ],
    "--a2a-unique node --moe-router-topk 1": ["with one expert each", "--a2a-unique is node"],
    "--a2a-unique rank --moe-router-topk 2 --a2a-codec lsh": [
        "for it alone",
        "--a2a-unique is rank",
        "drop one of them",
    ],
    "--overlap-chunks 2 --expert-slot 3,1": ["chunks travel in order", "is 3,1", "never decrease"],
    "--overlap-chunks 2 --expert-slot 1,2,3": ["--overlap-chunks is 2", "give one slot, or 2"],
    "--a2a-codec lsh --lsh-rank 16": ["learned maps", "--lsh-rank is 16", "add --lsh-compensation lowrank"],
    "--a2a-codec lsh --lsh-compensation lowrank --lsh-rank 12": ["multiples of 8", "--lsh-rank is 12", "use 8 or 16"],
    "--moe-router-padding-for-fp8": ["counts are exchanged", "--moe-router-padding-for-fp8 is True", "drop it"],
    "--moe-router-padding-for-quantization": ["counts are exchanged", "--moe-router-padding-for-quantization is True"],
    "--fp8-format hybrid": ["low precision", "--fp8-format is hybrid and --shortcut is scmoe", "drop it"],
    "--fp4-format e2m1": ["low precision", "--fp4-format is e2m1"],
    "--a2a-codec lsh --moe-apply-probs-on-input": [
        "many gate weights",
        "--moe-apply-probs-on-input is True and --a2a-codec is lsh",
    ],
    "--a2a-codec bf16 --bf16": ["rows have 16 bits already", "--bf16 is set and --a2a-codec is bf16", "or use fp8"],
    "--a2a-codec bf16 --fp16 --loss-scale 1": ["--fp16 is set and --a2a-codec is bf16"],
    "--fp8-transfers combine-forward": [
        "--fp8-transfers belongs to the codec fp8: it is set to combine-forward and --a2a-codec is none",
        "add --a2a-codec fp8 or drop --fp8-transfers",
    ],
    "--a2a-codec bf16 --fp8-transfers combine-forward": ["belongs to the codec fp8", "--a2a-codec is bf16"],
    "--a2a-codec fp8 --lsh-hashes 4": ["belongs to the codec lsh", "is set to 4 and --a2a-codec is fp8"],
    "--a2a-codec fp8 --fp8-transfers combine-forward combine-forward": [
        "a transfer is rounded or not",
        "--fp8-transfers is combine-forward combine-forward",
        "name each once",
    ],
    "--lsh-kind spherical": ["belongs to the codec lsh", "--a2a-codec is none"],
    "--a2a-codec lsh --lsh-hashes 0": ["1 to 64 functions", "--lsh-hashes is 0", "use 6"],
    "--a2a-codec lsh --lsh-hashes 65": ["1 to 64 functions", "--lsh-hashes is 65"],
    "--a2a-codec lsh --lsh-width 0": ["--lsh-width is 0", "use 2 or 4"],
    "--a2a-codec lsh --lsh-width 33": ["--lsh-width is 33 and --hidden-size is 32", "use --lsh-width 2"],
    "--a2a-codec lsh --lsh-kind spherical --lsh-width 4": ["a plane has two sides", "drop --lsh-width"],
    "--a2a-codec lsh --lsh-target-rate 1.5": ["a part of all rows", "--lsh-target-rate is 1.5", "such as 0.2"],
    "--a2a-codec lsh --lsh-target-rate nan": ["a part of all rows", "--lsh-target-rate is nan"],
    "--expert-slot two": ["a slot is a number", "--expert-slot is two"],
    "--overlap off --expert-slot 2": ["--overlap is off and --expert-slot is 2", "drop --expert-slot"],
    "--moe-token-dispatcher-type allgather": ["all-to-all", "allgather", "scmoe", "use --moe-token-dispatcher-type"],
    "--overlap-moe-expert-parallel-comm": ["--overlap-moe-expert-parallel-comm is True", "drop it: a shortcut"],
    "--mla-down-proj-fusion": ["--mla-down-proj-fusion is True", "the norm that the experts read", "drop it"],
    "--tensor-parallel-num-weight-shards 2": ["--tensor-parallel-num-weight-shards is 2", "drop it"],
    "--expert-tensor-parallel-num-weight-shards 2": ["once in a micro-batch", "num-weight-shards is 2", "drop it"],
    "--check-for-spiky-loss": ["--check-for-spiky-loss is True", "drop it"],
    "--logits-load-dir x": ["--logits-load-dir is x", "drop it"],
    "--inprocess-restart": ["--inprocess-restart is True", "restart the job"],
    "--recompute-granularity full --recompute-method block --recompute-num-layers 3": [
        "--recompute-num-layers is 3, --moe-every is 2 and --shortcut-span is 1",
        "use --recompute-num-layers 4",
    ],
    "--moe-shared-expert-overlap": ["--moe-shared-expert-overlap is True", "drop it"],
    "--delay-wgrad-compute": ["--delay-wgrad-compute is True", "drop it"],
    "--cuda-graph-impl local": ["--cuda-graph-impl is local", "use --cuda-graph-impl none"],
    "--use-megatron-fsdp": ["--use-megatron-fsdp is True", "drop it"],
    "--use-torch-fsdp2": ["--use-torch-fsdp2 is True", "drop it"],
    "--cpu-offloading-num-layers 1": ["--cpu-offloading-num-layers is 1", "drop it"],
    "--fine-grained-activation-offloading": ["--fine-grained-activation-offloading is True", "drop it"],
    "--use-transformer-engine-op-fuser": ["--use-transformer-engine-op-fuser is True", "drop it"],
    "--fused-residual-rmsnorm": ["--fused-residual-rmsnorm is True", "drop it"],
    "--heterogeneous-layers-config-path x.json": ["--heterogeneous-layers-config-path is x.json", "drop it"],
    "--transformer-impl inference_optimized": ["inference_optimized", "use --transformer-impl local"],
    "--spec local x": ["--spec is ['local', 'x']", "drop it"],
    "--moe-latent-size 8 --moe-shared-expert-overlap": ["--moe-latent-size is 8", "drop --moe-shared-expert-overlap"],
    "--moe-latent-size -8": ["a whole number from 1", "--moe-latent-size is -8"],
    "--moe-latent-size 4 --a2a-codec lsh --lsh-width 8": ["is 8 and --moe-latent-size is 4", "--lsh-width 2"],
    "--moe-latent-size 12 --a2a-codec lsh --lsh-compensation lowrank": ["multiples of 8", "--moe-latent-size is 12"],
    "--mlp-chunks-for-training 2": ["--mlp-chunks-for-training is 2", "use 1"],
    "--use-rope-scaling --rope-scaling-factor 32": ["stretches rotary positions by 8", "is 32.0", "use 8"],
    "--recompute-granularity selective --recompute-modules moe": ["--recompute-modules has moe", "drop moe"],
    "--recompute-granularity selective --recompute-modules core_attn layernorm": ["has layernorm", "drop layernorm"],
    "--moe-layer-freq [1,1,0,0]": ["--moe-layer-freq is [1, 1, 0, 0]", "--moe-every is 2", "drop --moe-layer-freq"],
    "--shortcut-combine add --moe-shared-expert-gate": ["cg1", "--shortcut-combine is add", "or drop"],
    "--tensor-model-parallel-size 2": ["--tensor-model-parallel-size is 2", "add --sequence-parallel"],
    "--tensor-model-parallel-size 2 --sequence-parallel --qk-layernorm": [
        "--qk-layernorm is set",
        "drop --qk-layernorm",
    ],
    "--moe-share-groups 3": ["the same number of groups everywhere", "is 3 and there are 2 groups", "a divisor of 2"],
    "--shortcut-span 3": ["spans are whole", "--shortcut-span is 3 and there are 2 groups", "use a divisor of 2"],
    "--shortcut-landing 1": ["--shortcut-landing is 1 and --shortcut-span is 1", "use --shortcut-span 2"],
    "--shortcut-span 2 --shortcut-landing 4": ["next group's 3 residual ops", "--shortcut-landing is 4", "use 0 to 3"],
    "--shortcut-span 2 --shortcut-landing 2 --expert-slot 8 1": ["slots 1 to 7 here", "of group 0 is 8"],
    "--shortcut-span 2 --shortcut-landing 2 --expert-slot 7 7": ["slots 1 to 4 here", "of group 1 is 7"],
    "--shortcut-span 2 --recompute-granularity full --recompute-method block --recompute-num-layers 2": [
        "--recompute-num-layers is 2, --moe-every is 2 and --shortcut-span is 2",
        "use --recompute-num-layers 4",
    ],
    "--shortcut-position farskip": ["behind every attention", "of group 0 is farskip", "the group has 3 ops"],
    "--fim-data": ["--fim-data is True", "drop it"],
    "--hybrid-layer-pattern M*M* --mamba-num-groups 1": [
        "a shortcut needs an MoE",
        "--hybrid-layer-pattern is M*M*",
        "put an E into it",
    ],
    "--hybrid-layer-pattern *-*E*-*E": ["--num-layers is 4 and", "has 8; drop --num-layers"],
    "--hybrid-layer-pattern *E*E": ["of group 0 is pos2", "the group has 1 op", "use --shortcut-position pos1"],
    "--hybrid-layer-pattern G-*E": ["layer G needs kernels", "--transformer-impl is local"],
    "--hybrid-layer-pattern *-*E --moe-every 1": ["says where an MoE is", "drop --moe-every"],
    "--hybrid-layer-pattern M*-E*-*E --mamba-num-groups 1 --recompute-granularity full --recompute-method block"
    " --num-layers 8 --recompute-num-layers 2": [
        "recomputed as a whole",
        "is M*-E*-*E and --shortcut-span is 1",
        "-num-layers 4",
    ],
    "--hybrid-layer-pattern M-EM-E --mamba-num-groups 1 --num-layers 6 --recompute-granularity selective": [
        "--recompute-modules has core_attn",
        "M-EM-E has none of *+D; drop core_attn",
    ],
    "--hybrid-layer-pattern M*EM*E --mamba-num-groups 1 --num-layers 6 --recompute-granularity selective"
    " --recompute-modules mlp": [
        "--recompute-modules has mlp",
        "M*EM*E has none of -; drop mlp",
    ],
    "--hybrid-layer-pattern *-*E --use-rope-scaling": ["stretches no rotary", "is *-*E and --use-rope-scaling is set"],
    "--hybrid-layer-pattern *-*E --qk-l2-norm": ["leave these norms out", "is local and --qk-l2-norm is set; drop it"],
    "--hybrid-layer-pattern *-*E --rotary-interleaved": ["turn in halves", "--rotary-interleaved is set", "drop it"],
    "--use-distributed-optimizer --save /nowhere --save-interval 1": [
        "fp32 moments",
        "--use-distributed-optimizer is set",
        "add --dist-ckpt-optim-fully-reshardable",
    ],
    "--save /nowhere": ["Megatron's own rule", "args.save_interval is not None"],
    "--expert-model-parallel-size 3": ["Megatron's own rule", "multiple of expert model parallel_size"],
    "--moe-router-enable-expert-bias": ["Megatron's own rule", "Expert bias for aux-loss-free routing"],
    "--moe-pad-expert-input-to-capacity": ["Megatron's own rule", "moe_expert_capacity_factor must be set"],
    "--use-checkpoint-args": ["--load is None", "add --load DIR"],
}

REFUSED_WITHOUT = {
    "--disable-bias-linear": ["no bias", "--disable-bias-linear is not set", "add --disable-bias-linear"],
    "--moe-router-pre-softmax": ["no gradient", "--moe-router-topk 1", "add --moe-router-pre-softmax"],
    "--moe-shared-expert-intermediate-size": [
        "shared expert",
        "is None",
        "add --moe-shared-expert-intermediate-size 24",
    ],
    "--num-experts": ["needs experts", "--num-experts is None", "add --num-experts 8"],
    "--num-layers": ["--num-layers is None", "add --num-layers N"],
}

DGMOE = with_flags(
    without_flag(SCMOE, "--moe-shared-expert-intermediate-size"), "--shortcut dgmoe", "--moe-router-topk 2"
)
DGMOE_REFUSED = {
    "--moe-shared-expert-intermediate-size 24": ["dgmoe has no shared expert", "is 24", "drop it"],
    "--moe-router-topk 1": ["one expert each", "--moe-router-topk is 1", "use --moe-router-topk 2"],
    "--shortcut-combine add": ["no shared expert to weigh", "--shortcut-combine is add"],
    "--moe-share-groups 3": ["the same number of groups everywhere", "is 3 and there are 2 groups", "a divisor of 2"],
    "--moe-share-groups 2 --num-layers 6": ["is 2 and there are 3 groups", "use a divisor of 3"],
    "--expert-slot 4": ["pos2 of dgmoe has the slots 1 to 3", "is 4"],
    "--a2a-unique rank": ["each gate of dgmoe chooses one expert", "--a2a-unique is rank and --shortcut is dgmoe"],
    "--a2a-unique node": ["each gate of dgmoe chooses one expert", "--a2a-unique is node and --shortcut is dgmoe"],
    "--moe-router-load-balancing-type sinkhorn": ["no second choice", "sinkhorn", "use aux_loss"],
    "--moe-enable-routing-replay": ["--moe-enable-routing-replay is True", "drop it"],
    "--calculate-per-token-loss": ["--calculate-per-token-loss is True", "drop it"],
}

STOCK_REFUSED = {
    "--shortcut-position pos1": ["needs a shortcut", "--shortcut is none", "add --shortcut scmoe"],
    "--overlap adaptive": [
        "nothing to choose",
        "add --overlap-chunks 2, --a2a-codec fp8, --a2a-unique rank or --shortcut scmoe",
    ],
    "--a2a-codec lsh --moe-token-dispatcher-type allgather": ["only the all-to-all", "is allgather"],
    "--lsh-hashes 4": ["--lsh-hashes belongs to the codec lsh", "is set to 4", "add --a2a-codec lsh"],
    "--overlap-report report": ["reports nothing", "--overlap-report is report"],
    "--a2a-weights-apart-above 4": ["gate weights by themselves", "above is 4", "add --overlap-chunks 2"],
    "--overlap-chunks 2 --moe-token-dispatcher-type allgather": [
        "only the all-to-all",
        "is allgather and --overlap-chunks is 2 and --a2a-codec is none",
    ],
    "--overlap-chunks 2 --moe-router-padding-for-fp8": ["counts are exchanged", "--moe-router-padding-for-fp8 is True"],
    "--a2a-unique rank --moe-router-topk 2 --spec a b": ["block spec of this script", "and --a2a-unique is rank"],
    "--a2a-unique rank --moe-router-topk 1": ["with one expert each", "--a2a-unique is rank"],
    "--a2a-unique node --moe-router-topk 2": ["once to each of several nodes", "--expert-model-parallel-size is 1"],
    "--overlap-chunks 2 --use-megatron-fsdp": ["--use-megatron-fsdp is True", "overwrite the gradients"],
    "--a2a-codec lsh --expert-tensor-parallel-num-weight-shards 2": ["once in a micro-batch", "drop it"],
    "--moe-latent-size 16 --moe-shared-expert-overlap": ["overlaps no shared expert", "--moe-latent-size is 16"],
    "--overlap-chunks 2 --tensor-model-parallel-size 2": ["only under sequence", "add --sequence-parallel"],
    "--a2a-codec lsh --tensor-model-parallel-size 2": ["only under sequence", "add --sequence-parallel"],
    "--overlap-chunks 0": ["one at least", "--overlap-chunks is 0"],
    "--expert-slot 2": ["--expert-slot needs a shortcut"],
    "--moe-every 4": ["--moe-every needs a shortcut"],
}


def changes(flags: str) -> list[str]:
    return ["--" + change for change in flags.removeprefix("--").split(" --")]


def test_refused():
    entry.assert_refused((with_flags(SCMOE, *changes(flags)), words) for flags, words in REFUSED.items())


def test_refused_without():
    entry.assert_refused((without_flag(SCMOE, flag), words) for flag, words in REFUSED_WITHOUT.items())


def test_dgmoe_refused():
    entry.assert_refused((with_flags(DGMOE, *changes(flags)), words) for flags, words in DGMOE_REFUSED.items())


def test_refused_without_a_shortcut():
    entry.assert_refused((with_flags(STOCK, *changes(flags)), words) for flags, words in STOCK_REFUSED.items())


def older_torch() -> None:
    del torch.nn.functional.grouped_mm


def test_older_torch_is_refused_where_its_products_are_missing():
    entry.assert_refused(
        [
            (
                with_flags(SCMOE, "--a2a-codec lsh", flag),
                [f"came with torch 2.10: {flag.replace(' ', ' is ')} and this is torch", "install a newer torch"],
            )
            for flag in ("--lsh-compensation lowrank", "--lsh-refinement lloyd")
        ],
        before=older_torch,
    )


PIPELINES = {
    # what cuts a group -> ranks
    "--pipeline-model-parallel-size 4": 4,
    "--pipeline-model-parallel-layout Et|ttt|L": 3,
}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_refused_where_a_pipeline_stage_would_hold_part_of_a_group(pipeline):
    num_ranks = PIPELINES[pipeline]
    flags = with_flags(SCMOE, f"--pipeline-model-parallel-size {num_ranks}", pipeline)
    words = ["a pipeline stage holds whole groups", "stage 0 would hold the layers [0], --moe-every is 2"]
    entry.assert_all_ranks_refuse(flags, words, num_ranks)


def test_refused_where_a_pipeline_stage_would_split_two_groups_that_share():
    flags = with_flags(DGMOE, "--moe-share-groups 2", "--pipeline-model-parallel-size 2")
    words = ["stage 0 would hold the layers [0, 1], --moe-every is 2, --moe-share-groups is 2"]
    entry.assert_all_ranks_refuse(flags, words, 2)


@pytest.mark.parametrize(
    ("pattern", "flag", "words"),
    [
        ("*-*E*-*E", "--overlap fixed", ["put a | between stages"]),
        ("*-*E|*-*E", "--shortcut-span 2", ["stage 0 would hold the layers [0, 1, 2, 3]", "move the cuts of"]),
    ],
)
def test_refused_where_a_hybrid_model_is_cut_in_the_wrong_place(pattern, flag, words):
    layers = f"--hybrid-layer-pattern {pattern}"
    flags = with_flags(SCMOE, layers, "--num-layers 8", flag, "--pipeline-model-parallel-size 2")
    entry.assert_all_ranks_refuse(flags, words, 2)


ACCEPTED = [
    SCMOE,
    with_flags(SCMOE, "--hybrid-layer-pattern M*-E*-*E", "--num-layers 8", "--mamba-num-groups 1"),
    with_flags(
        SCMOE,
        "--hybrid-layer-pattern M*-E*-*E",
        "--num-layers 8",
        "--mamba-num-groups 1",
        "--recompute-activations",
    ),
    with_flags(
        SCMOE,
        "--hybrid-layer-pattern M*-E*-*E-",
        "--num-layers 9",
        "--mamba-num-groups 1",
        "--recompute-granularity full",
        "--recompute-method block",
        "--recompute-num-layers 4",
    ),
    with_flags(DGMOE, "--moe-share-groups 2"),
    STOCK,
    STOCK_SHARED_EXPERT,
    DGMOE,
    with_flags(SCMOE, "--shortcut-position pos1 pos3", "--expert-slot 3 5"),
    with_flags(SCMOE, "--moe-every 1", "--shortcut-position pos1"),
    with_flags(SCMOE, "--moe-router-topk 2", "--overlap off"),
    with_flags(SCMOE, "--moe-latent-size 16", "--a2a-codec lsh", "--overlap-chunks 2"),
    with_flags(STOCK, "--moe-latent-size 16", "--overlap-chunks 2"),
    with_flags(SCMOE, "--a2a-codec lsh", "--lsh-kind spherical", "--lsh-hashes 12", "--lsh-target-rate 0.2"),
    with_flags(SCMOE, "--recompute-granularity selective", "--recompute-modules core_attn mlp shared_experts"),
]


def test_accepted():
    """Negative control: what works is not refused."""
    entry.assert_accepted(ACCEPTED)


def saved_namespace(flags: list[str]) -> bytes:
    from megatron_scmoe.training.arguments import parse_and_validate_args

    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    args, *_ = parse_and_validate_args()
    from megatron_scmoe.config import ScMoEConfig

    return pickle.dumps({field.name: getattr(args, field.name) for field in dataclasses.fields(ScMoEConfig)})


def test_the_saved_settings_are_builtin_types():
    """A checkpoint's arguments must load where this package is not installed."""
    (pickled,) = ranks.run(saved_namespace, 1, with_flags(SCMOE, "--shortcut-position pos1 pos2"))
    assert b"megatron_scmoe" not in pickled
    assert pickle.loads(pickled)["shortcut_position"] == ["pos1", "pos2"]


def help_text() -> str:
    from megatron_scmoe.training.arguments import parse_and_validate_args

    sys.argv[:] = ["pretrain_gpt_scmoe.py", "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse_and_validate_args()
    return printed.getvalue()


def test_help_is_shown():
    """Megatron's own breaks off: one of its texts has a bare percent sign."""
    (text,) = ranks.run(help_text, 1)
    assert "--shortcut {none,scmoe,dgmoe}" in text and "Magnitude is headroom (e.g. 1.10 = 10%)" in " ".join(
        text.split()
    )
    assert "%%" not in text


def test_every_field_is_a_flag_with_its_docstring_as_help():
    from megatron_scmoe import config
    from megatron_scmoe.training.arguments import add_scmoe_arguments

    parser = add_scmoe_arguments(argparse.ArgumentParser())
    actions = {action.dest: action for action in parser._actions}
    for name in typing.get_type_hints(config.ScMoEConfig):
        assert len(actions[name].help) > 60, name
    assert "arXiv 2404.05019" in actions["shortcut"].help


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A checkpoint of 1 iteration, bf16, with the position-wise distributed optimizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    flags = with_flags(SCMOE, "--train-iters 1", "--bf16", "--use-distributed-optimizer", "--save-interval 1")
    (printed,) = ranks.run(training.train, 1, with_flags(flags, f"--save {folder}"))
    assert "successfully saved checkpoint" in printed
    return str(folder)


RESUME_REFUSED = {
    "--shortcut-position pos1": ["--shortcut-position is pos1", "has pos2", "--finetune", "--shortcut-resume changed"],
    "--shortcut-combine add": ["--shortcut-combine is add", "has cg1"],
    "--moe-every 4": ["--moe-every is 4", "has 2"],
    "--hybrid-layer-pattern *-*E": ["--hybrid-layer-pattern is *-*E", "has none", "--container hybrid --load"],
}


def test_resume_with_another_shortcut_is_refused(checkpoint):
    resumed = with_flags(SCMOE, f"--load {checkpoint}")
    refusals = [(with_flags(resumed, *changes(flags)), words) for flags, words in RESUME_REFUSED.items()]
    stock = with_flags(STOCK_SHARED_EXPERT, f"--load {checkpoint}")
    entry.assert_refused([*refusals, (stock, ["--shortcut is none", "has scmoe"])])


def test_resume_is_accepted(checkpoint):
    """Of the same shortcut, of another one where that is asked for, and with another overlap."""
    resumed = with_flags(SCMOE, f"--load {checkpoint}", "--train-iters 1")
    another = with_flags(resumed, "--shortcut-position pos1")
    allowed = ("--finetune", "--shortcut-resume changed", "--shortcut-position pos2")
    entry.assert_accepted([*(with_flags(another, flag) for flag in allowed), with_flags(resumed, "--overlap off")])


@pytest.mark.parametrize("saves", [[], ["--dist-ckpt-optim-fully-reshardable"]], ids=["", "saves otherwise"])
def test_position_wise_optimizer_in_another_layout_is_refused(checkpoint, saves):
    """Core loads by the format of the checkpoint, whatever the run saves in."""
    flags = with_flags(
        SCMOE, f"--load {checkpoint}", "--bf16", "--use-distributed-optimizer", "--expert-model-parallel-size 2", *saves
    )
    words = ["expert_model_parallel_size is 2 and the checkpoint", "--dist-ckpt-optim-fully-reshardable"]
    entry.assert_all_ranks_refuse(flags, words, 2)


PLACES = {
    # implementation, other flags of this run, its position, what the checkpoint's arguments hold -> refused
    "another position": ("transformer_engine", {}, "pos1", {}, True),
    "the same": ("transformer_engine", {}, "pos2", {}, False),
    "local": ("local", {}, "pos1", {}, False),
    "weights only": ("transformer_engine", {"no_load_optim": True}, "pos1", {}, False),
    "nothing but weights saved": ("transformer_engine", {}, "pos1", {"no_save_optim": True}, False),
    "by parameter": ("transformer_engine", {}, "pos1", {"dist_ckpt_optim_fully_reshardable": True}, False),
    "by parameter, older": ("transformer_engine", {}, "pos1", {"ckpt_fully_parallel_save": True}, False),
    "other optimizer": ("transformer_engine", {}, "pos1", {"use_distributed_optimizer": False}, False),
}


@pytest.mark.parametrize(("implementation", "more", "position", "saved", "refused"), PLACES.values(), ids=PLACES)
def test_moments_by_place_need_the_norms_that_were_fused(monkeypatch, implementation, more, position, saved, refused):
    from megatron_scmoe import config
    from megatron_scmoe.training import moments, resume

    flags = dict.fromkeys((*moments._LAYOUT_FLAGS, "use_distributed_optimizer", "dist_ckpt_optim_fully_reshardable"), 1)
    flags |= {"finetune": False, "no_load_optim": False, "load": "run", "num_experts": None, "moe_latent_size": None}
    now, then = (
        config.ScMoEConfig(
            shortcut=config.Shortcut.SCMOE,
            shortcut_position=(config.Position(one),),
            shortcut_resume=config.Resume.CHANGED,
        )
        for one in (position, "pos2")
    )
    kept = argparse.Namespace(**{"use_distributed_optimizer": True} | saved)
    monkeypatch.setattr(resume.checkpoints, "saved_args", lambda _args: kept)
    monkeypatch.setattr(resume, "print_rank_0", lambda _text: None)
    args = argparse.Namespace(transformer_impl=implementation, mtp_num_layers=None, **flags | more)
    expected = pytest.raises(config.ConfigError, match="--shortcut-position is pos1 and the checkpoint in run has pos2")
    with expected if refused else contextlib.nullcontext():
        assert resume.check(args, now, lambda _saved: then) is kept


@pytest.mark.parametrize(("now", "then"), [(8, None), (None, 8), (16, 8), (8, 8), (None, None)])
def test_experts_of_another_width_are_refused(monkeypatch, now, then):
    """Also weights alone: Core leaves out what the model has no place for, and experts of the same width fit."""
    from megatron_scmoe import config
    from megatron_scmoe.training import resume

    kept = argparse.Namespace(moe_latent_size=then) if then else argparse.Namespace()
    monkeypatch.setattr(resume.checkpoints, "saved_args", lambda _args: kept)
    args = argparse.Namespace(
        use_distributed_optimizer=False, finetune=True, load="run", moe_latent_size=now, mtp_num_layers=None
    )
    said = f"--moe-latent-size is {now} and the checkpoint in run has {then}; " + ("use" if then else "drop")
    expected = contextlib.nullcontext() if now == then else pytest.raises(config.ConfigError, match=said)
    with expected:
        assert resume.check(args, config.ScMoEConfig(), lambda _saved: config.ScMoEConfig()) is kept


def with_a_gpu() -> None:
    torch.cuda.is_available = lambda: True


def test_latent_projections_need_transformer_engine_on_a_gpu():
    words = ["Transformer Engine's linears", "--moe-latent-size is 8 and Transformer Engine is not installed"]
    flags = [with_flags(base, "--moe-latent-size 8") for base in (SCMOE, STOCK)]
    entry.assert_refused([(one, words) for one in flags], before=with_a_gpu)


def restored(flags: list[str]) -> tuple[list[str], str, object]:
    from megatron_scmoe.training.arguments import parse_and_validate_args

    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    args, scmoe, _ = parse_and_validate_args()
    return list(scmoe.shortcut_position), str(scmoe.shortcut), args.moe_layer_freq


def test_use_checkpoint_args_restores_the_shortcut(checkpoint):
    flags = without_flag(SCMOE, "--shortcut")
    position, shortcut, pattern = ranks.run(
        restored, 1, with_flags(flags, f"--load {checkpoint}", "--use-checkpoint-args", "--train-iters 1")
    )[0]
    assert (position, shortcut, pattern) == (["pos2"], "scmoe", [0, 1, 0, 1])


# --- the corpus ----------------------------------------------------------------------------------------------------


def write_dataset(prefix: str, num_documents: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for _ in range(num_documents):
        builder.add_document(torch.arange(50), [50])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    ("num_documents", "split", "words"),
    [
        (0, "95,5,0", ["/none.idx is no file", "tools/preprocess_data.py"]),
        (4, "95,5,0", ["has 4 and --split is 95,5,0", "none for validation", "smaller --document-kib"]),
        (1, "0,100,0", []),
        (20, "95,5,0", []),
        (4, "95,5,5", ["none for"]),
    ],
)
def test_a_corpus_that_leaves_a_part_without_documents(tmp_path, num_documents, split, words):
    """Megatron counts epochs of an empty part for ever."""
    prefix = str(tmp_path / ("corpus" if num_documents else "none"))
    if num_documents:
        ranks.run(write_dataset, 1, prefix, num_documents)
    flags = with_flags(without_flag(SCMOE, "--mock-data"), f"--data-path {prefix}", f"--split {split}")
    if words:
        entry.assert_refused([(flags, words)])
    else:
        entry.assert_accepted([flags])


def test_a_process_that_was_told_of_no_others_is_refused():
    unknown = {"MASTER_ADDR": "", "MASTER_PORT": ""}
    entry.assert_refused([(SCMOE, ["MASTER_ADDR", "not set", "torchrun, also on one GPU"])], unknown)


# --- the process ---------------------------------------------------------------------------------------------------

NO_PROCESS_GROUP = """
import os, runpy, sys, torch.distributed
def forbidden(*args, **kwargs): raise SystemExit("other ranks were looked for")
torch.distributed.rendezvous = forbidden
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
sys.argv[:] = ["pretrain_gpt_scmoe.py", *sys.argv[1:]]
runpy.run_path("pretrain_gpt_scmoe.py", run_name="__main__")
"""


def run_script(flags: list[str], *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "LOCAL_RANK": "0"}
    )


def test_refusal_ends_the_process_with_2_before_any_process_group(tmp_path):
    script = tmp_path / "no_process_group.py"
    script.write_text(NO_PROCESS_GROUP)
    refused = commands.run(script, *with_flags(SCMOE, "--num-layers 5"), cwd=ROOT, env={"LOCAL_RANK": "0"})
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("pretrain_gpt_scmoe.py: refused: groups must be whole")
    # Negative control: a run that is not refused does look for other ranks.
    accepted = commands.run(script, *SCMOE, cwd=ROOT, env={"LOCAL_RANK": "0"})
    assert "other ranks were looked for" in accepted.stderr


def test_torchrun_turns_a_refusal_into_1_and_the_line_is_there():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    refused = run_script(with_flags(SCMOE, "--moe-every 5"), *torchrun, "pretrain_gpt_scmoe.py")
    assert refused.returncode == 1
    assert refused.stderr.count("pretrain_gpt_scmoe.py: refused:") == 1


def warnings_of_one_queue() -> list[str | None]:
    from megatron_scmoe.config import Overlap, ScMoEConfig, Shortcut
    from megatron_scmoe.training.slower import one_queue_warning

    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE)
    chunks = dataclasses.replace(scmoe, overlap_chunks=2)
    side_by_side = (
        chunks,
        ScMoEConfig(shortcut=Shortcut.DGMOE),
        dataclasses.replace(scmoe, shortcut_span=2, shortcut_landing=1),
        ScMoEConfig(overlap_chunks=2),
    )
    off = dataclasses.replace(scmoe, overlap=Overlap.OFF, shortcut_span=2, shortcut_landing=1)
    one_by_one = ((chunks, False), (scmoe, True), (off, True), (ScMoEConfig(), True))
    cases = (*((settings, True) for settings in side_by_side), *one_by_one)
    return [one_queue_warning(settings, one_queue=one_queue) for settings, one_queue in cases]


def test_one_queue_is_warned_of_where_collectives_wait_for_one_another():
    """Those of one call in one chunk do not."""
    found = ranks.run(warnings_of_one_queue, 1)[0]
    assert all(text.startswith("CUDA_DEVICE_MAX_CONNECTIONS is 1") and "set it to 32" in text for text in found[:4])
    assert found[4:] == [None] * 4


@pytest.mark.parametrize(
    ("experts", "ep", "unique", "why"),
    [
        (4, 1, "rank", "no token travels: --a2a-unique is rank, --num-experts 4 and --expert-model-parallel-size 1"),
        (4, 4, "rank", "a rank has one expert: --a2a-unique is rank"),
        (4, 2, "rank", None),
        (4, 1, "none", None),
    ],
)
def test_unique_tokens_that_save_nothing_are_warned_of(experts, ep, unique, why):
    from megatron_scmoe.config import ScMoEConfig, Unique
    from megatron_scmoe.training.slower import unique_warning

    args = argparse.Namespace(num_experts=experts, expert_model_parallel_size=ep)
    found = unique_warning(args, ScMoEConfig(a2a_unique=Unique(unique)))
    assert found is None if why is None else (found.startswith(why) and found.endswith("drop --a2a-unique"))


@pytest.mark.parametrize(
    ("ep", "codec", "warns"),
    [(1, "fp8", True), (1, "bf16", True), (2, "fp8", False), (1, "none", False), (1, "lsh", False)],
)
def test_rounding_that_saves_nothing_is_warned_of(ep, codec, warns):
    from megatron_scmoe.config import Codec, ScMoEConfig
    from megatron_scmoe.training.slower import codec_warning

    found = codec_warning(argparse.Namespace(expert_model_parallel_size=ep), ScMoEConfig(a2a_codec=Codec(codec)))
    assert (found is not None) == warns
    assert not warns or f"--a2a-codec is {codec} and --expert-model-parallel-size 1" in found


ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("TORCH_NCCL_ENABLE_TIMING", "1"), ("TORCH_NCCL_DESYNC_DEBUG", "True"), ("TORCH_DISTRIBUTED_DEBUG", "DETAIL")],
)
def test_timed_collectives_in_one_queue_are_refused(name, value):
    words = [
        "CUDA_DEVICE_MAX_CONNECTIONS is 1",
        f"{name} is {value}",
        f"unset {name}",
        "CUDA_DEVICE_MAX_CONNECTIONS=32",
    ]
    chunked = with_flags(STOCK, "--overlap-chunks 2")
    entry.assert_refused([(flags, words) for flags in (SCMOE, DGMOE, chunked)], ONE_QUEUE | {name: value})


@pytest.mark.parametrize("value", [" 1", "", "0", "01", "33", "many", "1.0"])
def test_a_number_of_queues_that_is_none_is_refused(value):
    """CUDA may read a number in it, and Megatron reads none: 1 in ' 1'."""
    words = [f"CUDA_DEVICE_MAX_CONNECTIONS is {value!r}", "write a number from 1 to 32"]
    entry.assert_refused([(flags, words) for flags in (STOCK, SCMOE)], {"CUDA_DEVICE_MAX_CONNECTIONS": value})


def test_timed_collectives_elsewhere_are_accepted():
    """Negative control: with several queues, without timing, and where nothing of ours overlaps."""
    timed = {"TORCH_NCCL_ENABLE_TIMING": "1"}
    entry.assert_accepted([SCMOE], timed | {"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    entry.assert_accepted([SCMOE], ONE_QUEUE | {"TORCH_NCCL_ENABLE_TIMING": "0", "TORCH_DISTRIBUTED_DEBUG": "INFO"})
    entry.assert_accepted([with_flags(SCMOE, "--overlap off"), STOCK], ONE_QUEUE | timed)


def test_what_is_untried_is_named():
    from megatron_scmoe.config import Overlap, ScMoEConfig, Shortcut
    from megatron_scmoe.training import untried

    scmoe, te = ScMoEConfig(shortcut=Shortcut.SCMOE), "transformer_engine"
    args = argparse.Namespace(context_parallel_size=2, transformer_impl=te, tp_comm_overlap=True)
    cp, tp = untried.found_in(args, scmoe)
    assert "--context-parallel-size is 2" in cp and "--tp-comm-overlap is set" in tp
    tried = [
        (argparse.Namespace(context_parallel_size=1, transformer_impl=te, tp_comm_overlap=False), scmoe),
        (argparse.Namespace(context_parallel_size=2, transformer_impl="local", tp_comm_overlap=False), scmoe),
        (args, ScMoEConfig()),
        (args, dataclasses.replace(scmoe, overlap=Overlap.OFF)),
    ]
    assert [untried.found_in(*one) for one in tried] == [[]] * 4


def something_is_untried() -> None:
    from megatron_scmoe.training import untried

    untried.found_in = lambda _args, _scmoe: ["this and that"]


def test_a_run_says_what_is_untried():
    said, silent = (entry.ends([entry.Command(SCMOE, None, before)])[0] for before in (something_is_untried, None))
    assert " > untried: this and that\n" in said.stdout and said.accepts()
    assert "untried" not in silent.stdout  # negative control
