"""tools/plan.py with --a2a-unique and --a2a-codec fp8: rows, their bytes, those beside them, what they cost at home."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace

import pytest
from test_plan import BASE, H100, of_flags, plan, run_of
from training import with_flags

from megatron_scmoe.codec.rounding import BLOCK
from megatron_scmoe.config import ScMoEConfig, Unique, expected_unique_share
from megatron_scmoe.contracts import TransferName

sys.path.insert(0, "tools")
from command_line import UserError
from planning import sending, whatif
from planning.ops import Ops
from planning.rows import FP8_BLOCK, nbytes, nbytes_gathered, travelling
from planning.step import predict
from planning.training import Training
from planning.wires import Groups
from planning.workload import Moe, Span

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
    assert [nbytes(moe, 100, transfer) for transfer in TransferName] == [248, 200, 232, 200]
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


FP8 = "--a2a-codec fp8"
DEFAULT = (TransferName.DISPATCH_FORWARD, TransferName.COMBINE_BACKWARD)
TRANSFERS = {
    "towards experts": ((), {"dispatch": (8, 16), "combine": (16, 8)}),
    "outputs alone": (("combine-forward",), {"dispatch": (16, 16), "combine": (8, 16)}),
    "gradients of tokens alone": (("dispatch-backward",), {"dispatch": (16, 8), "combine": (16, 16)}),
    "all": (tuple(TransferName), {"dispatch": (8, 8), "combine": (8, 8)}),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_values_of_a_rounded_transfer_have_eight_bits(name):
    chosen, bits = TRANSFERS[name]
    flags = [*PLAIN, *FP8.split(), *(("--fp8-transfers", *chosen) if chosen else ())]
    (plain, variants), (rounded, others) = (of_flags(its, EP, workload_and_variants) for its in (PLAIN, flags))
    rows = TOKENS * TOPK * (1 - 1 / EP) * 4
    row = {16: 2 * HIDDEN, 8: HIDDEN + HIDDEN / BLOCK}
    expected = {kind: rows * (row[there] + row[back]) for kind, (there, back) in bits.items()}
    assert sent(rounded) == pytest.approx(expected)
    assert sent(rounded) != pytest.approx(sent(plain), rel=0.1)  # negative control
    if not chosen:
        assert dict(variants)["fp8 dispatch"] == rounded  # what would be is what is
    assert "fp8 dispatch" not in dict(others)
    lsh = next(workload for words, workload in others if words.startswith("LSH-MoE"))
    assert not any(call.rounded for op in lsh.stages[0] if isinstance(op, Span) for call in op.calls)


def test_rounding_passes_over_the_rows_at_both_ends():
    """Forward of what is rounded forward, backward of what is rounded backward."""
    flags = [*PLAIN, *FP8.split()]
    (workload, _), (plain, _) = (of_flags(its, EP, workload_and_variants) for its in (flags, PLAIN))
    (call, *_), (stock, *_) = (
        [call for op in one.stages[0] if isinstance(op, Span) for call in op.calls] for one in (workload, plain)
    )
    assert call.rounded == set(DEFAULT) and not stock.rounded
    ops = Ops(workload, H100)
    for chunks in (1, 2):
        found = zip(ops.flight(call, chunks), ops.flight(stock, chunks), strict=True)
        more = {
            mine.part: (mine.forward.seconds - its.forward.seconds, mine.backward.seconds - its.backward.seconds)
            for mine, its in found
            if mine.kind == "permute"
        }
        one = ops.plain.moving(TOKENS / chunks * TOPK * (2 * HIDDEN + HIDDEN + HIDDEN / BLOCK), 1).seconds
        assert {name: pytest.approx(its) for name, its in more.items()} == {
            "encode": (one, 0.0), "unpack": (one, 0.0), "repack": (0.0, one), "decode": (0.0, one)
        }  # fmt: skip


def test_what_expert_tensor_ranks_gather_is_not_rounded():
    """It has arrived by then, and is what it was; and rows of which a value is left over have a scale for it."""
    assert FP8_BLOCK == BLOCK
    moe = Moe(experts=8, top_k=2, width=1, rounded=frozenset(DEFAULT), beside=16.0)
    assert nbytes(moe, 129, DEFAULT[0]) == 129 + 2 + 16 and nbytes_gathered(moe, 129, DEFAULT[0]) == 258 + 16
    assert nbytes(moe, 129, TransferName.COMBINE_FORWARD) == 258
    (workload, _) = of_flags(PLAIN, EP, workload_and_variants)
    shared = replace(workload, layout=replace(workload.layout, gpus=8, ep=4, etp=2, tp=2))
    groups, tokens = Groups(shared, H100), 100
    for transfer, each in ((DEFAULT[0], HIDDEN + 2 + 16), (TransferName.DISPATCH_BACKWARD, 2 * HIDDEN)):
        gathered = groups.etp.ring(tokens * 2 * (2 * HIDDEN + 16 * (transfer is DEFAULT[0])) * 2)
        expected = groups.ep.all_to_all(tokens * 2 * each).then(gathered)
        assert groups.flight(moe, tokens, transfer) == pytest.approx(expected)


def test_the_command_plans_it():
    done = plan("--gpus", EP, "--gpu", "H100", "--", *PLAIN, *RANK.split())
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "unique tokens" not in done.stdout and "--a2a-unique none --a2a-codec lsh" in done.stdout
    top1 = plan("--gpus", EP, "--gpu", "H100", "--", *with_flags(PLAIN, "--moe-router-topk 1"), *RANK.split())
    assert (top1.returncode, top1.stdout) == (2, "") and "no token goes to a rank twice" in top1.stderr
