"""tools/plan.py with --a2a-unique: rows, the bytes beside them, what they cost at home, and when they are launched."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace

import pytest
from test_plan import BASE, H100, of_flags, plan, run_of
from training import with_flags

from megatron_scmoe.config import ScMoEConfig, Unique, expected_unique_share

sys.path.insert(0, "tools")
from command_line import UserError
from planning import sending, whatif
from planning.rows import Leg, nbytes, travelling
from planning.step import predict
from planning.workload import Moe, Span, Training

HIDDEN, TOKENS, EP, TOPK, EXPERTS = 256, 512, 4, 4, 8
PLAIN = with_flags(BASE, f"--expert-model-parallel-size {EP}", f"--moe-router-topk {TOPK}")
ONCE = expected_unique_share(EXPERTS, TOPK, EP)
RANK = "--a2a-unique rank"


def workload_and_variants(found):
    run = run_of(found)
    return run.workload, [(one.name, one.workload) for one in whatif.what_if(run)]


def sent(workload):
    """MiB of one micro-batch's dispatches and combines, forward and backward together."""
    told = predict(replace(workload, global_batch=EP), H100)
    return {wire.kind: (wire.inside + wire.between) for wire in told.wires if wire.group == "EP"}


def test_rows_travel_once_with_what_belongs_to_them():
    (plain, variants), (unique, _) = (
        of_flags(flags, EP, workload_and_variants) for flags in (PLAIN, [*PLAIN, *RANK.split()])
    )
    spans, layers = [op for op in unique.stages[0] if isinstance(op, Span)], 4
    assert len(spans) == layers and all(span.shape.waits_to_pack for span in spans)  # launched before the op, alone
    assert not any(op.shape.waits_to_pack for op in plain.stages[0] if isinstance(op, Span))
    rows = TOKENS * TOPK * (1 - 1 / EP) * layers
    row = 2 * HIDDEN
    assert sent(plain) == pytest.approx(dict.fromkeys(("dispatch", "combine"), rows * row * 2))
    # Two experts on a rank: a weight for each, filled up to 16 bytes, and their gradients.
    expected = {"dispatch": rows * ONCE * (row + 16) * 2, "combine": rows * ONCE * row * 2}
    assert sent(unique) == pytest.approx(expected) and ONCE < 0.9
    assert dict(variants)["unique tokens"] == unique  # what would be is what is
    permuting = [predict(one, H100).parts["permute"] for one in (plain, unique)]
    assert permuting[1] > permuting[0]  # spread where they arrive, and more launches


def test_ids_go_along_where_that_is_shorter_and_do_not_come_back():
    args = Namespace(
        num_experts=64, moe_router_topk=2, expert_model_parallel_size=2, moe_router_group_topk=None,
        moe_router_num_groups=None, moe_router_dtype="fp32", params_dtype=None,
    )  # fmt: skip
    scmoe = replace(ScMoEConfig(), a2a_unique=Unique.RANK)
    told = sending.of_rows(args, scmoe)
    assert (told["beside"], told["beside_back"]) == (32, 16)  # docs/codec.md: two of 32 experts
    args.moe_router_topk = 8
    told = sending.of_rows(args, scmoe)
    assert (told["beside"], told["beside_back"]) == (48, 32)  # and eight of 32
    moe = Moe(experts=64, top_k=8, width=1, **told)
    assert [nbytes(moe, 100, leg) for leg in Leg] == [248, 200, 200, 232]
    assert travelling(moe, 10, Training(expert_rows=3.0)) == 80 * told["once"]  # what fills experts up stays
    assert travelling(replace(moe, once=None), 10, Training(expert_rows=3.0)) == 240
    assert sending.of_rows(args, ScMoEConfig()) == {}


def test_limited_choices_go_to_fewer_ranks():
    args = Namespace(
        num_experts=64, moe_router_topk=4, expert_model_parallel_size=8, moe_router_group_topk=2,
        moe_router_num_groups=4, moe_router_dtype="fp32", params_dtype=None,
    )  # fmt: skip
    scmoe = replace(ScMoEConfig(), a2a_unique=Unique.RANK)
    limited = sending.of_rows(args, scmoe)["once"]
    assert limited == expected_unique_share(32, 4, 4) < expected_unique_share(64, 4, 8)
    args.expert_model_parallel_size = 1
    with pytest.raises(
        UserError, match=r"--moe-router-num-groups is 4, --moe-router-group-topk 2.*plan with --a2a-unique none"
    ):
        sending.of_rows(args, scmoe)


def test_the_command_plans_it():
    done = plan("--gpus", EP, "--gpu", "H100", "--", *PLAIN, *RANK.split())
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "unique tokens" not in done.stdout and "--a2a-unique none --a2a-codec lsh" in done.stdout
    top1 = plan("--gpus", EP, "--gpu", "H100", "--", *with_flags(PLAIN, "--moe-router-topk 1"), *RANK.split())
    assert (top1.returncode, top1.stdout) == (2, "") and "no token goes to a rank twice" in top1.stderr
