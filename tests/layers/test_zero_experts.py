"""LongCat-Flash's router and its zero experts: they equal the reference, travel nowhere, and their biases move."""

from __future__ import annotations

import dataclasses
import json

import entry
import models
import pytest
import ranks
import reference
import torch
import torch.distributed as dist
import training
from models import BATCH_SIZE, SEQ_LENGTH, Case
from test_arguments import DGMOE
from test_codec import assert_equals_reference
from test_layer import EP, largest_difference, run, run_reference
from test_overlap import assert_bit_equal, assert_close
from test_overlap import run as run_ranks
from training import SCMOE, with_flags

ZERO = Case(router="longcat", zero_experts=3, topk=3, combine="add")
FLAGS = with_flags(SCMOE, "--router longcat", "--zero-experts 3", "--moe-router-topk 3", "--shortcut-combine add")
FLAGS = with_flags(FLAGS, "--moe-router-topk-scaling-factor 2.5", "--moe-aux-loss-coeff 0")

CASES = {
    "pos2": ZERO,
    "pos1, every block": ZERO.replace(position=("pos1",), moe_every=1),
    "pos3, gated": ZERO.replace(position=("pos3",), combine="cg1"),
    "no zero experts": ZERO.replace(zero_experts=0),
    "top-1": ZERO.replace(topk=1),
    "more zero experts than real ones": ZERO.replace(zero_experts=9),
}


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference(name, ep):
    """Losses and every gradient: of the router, too, through real and zero experts."""
    case = CASES[name]
    assert largest_difference(run(case, ep), run_reference(case.reference_config())) < 1e-5


@pytest.mark.parametrize("wrong", ["bias", "scaling", "zero experts", "renormalised"])
def test_a_wrong_router_is_noticed(wrong):
    """Negative controls: the bugs of other implementations."""
    config = ZERO.reference_config()
    changes = {
        "bias": {"router_biases": tuple(torch.zeros_like(bias) for bias in config.router_biases)},
        "scaling": {"routed_scaling": 1.0},
        "zero experts": {},
        "renormalised": {},
    }
    config = dataclasses.replace(config, **changes[wrong])
    with pytest.MonkeyPatch.context() as patch:
        if wrong == "zero experts":  # as if they gave nothing
            patch.setattr(reference, "experts_output", _without_zero_experts)
        elif wrong == "renormalised":
            patch.setattr(reference, "route_longcat", _renormalised)
        loss, _ = run_reference(config)
    assert (run(ZERO)[0] - loss).abs().max() > 1e-3


def _without_zero_experts(params, prefix, choices, token, cfg):
    real = [(expert, weight) for expert, weight in choices if expert < cfg.num_experts]
    output = torch.zeros_like(token)
    for expert, weight in real:
        output = output + weight * reference.feed_forward(
            params, f"{prefix}experts.local_experts.{expert}.", token, cfg
        )
    return output


def _renormalised(logits, bias, topk, factor):
    scores = reference.softmax(logits)
    chosen = (scores + bias).topk(topk).indices.tolist()
    return [(expert, factor * scores[expert] / scores[chosen].sum()) for expert in chosen]


@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_every_slot_equals_off_bit_for_bit(slot):
    assert_bit_equal(run_ranks(ZERO.replace(expert_slot=(slot,)), 2), run_ranks(ZERO.replace(overlap="off"), 2))


@pytest.mark.parametrize("chunks", [2, 5])
def test_chunks_change_rounding_only(chunks):
    assert_close(run_ranks(ZERO.replace(chunks=chunks), 2), run_ranks(ZERO, 2))


def test_recompute_changes_nothing():
    assert_bit_equal(run_ranks(ZERO.replace(recompute="full"), 2), run_ranks(ZERO, 2))


@pytest.mark.parametrize("compensation", ["paper", "lowrank"])
def test_with_the_codec_it_equals_the_reference(compensation):
    """Tokens of zero experts are not clustered either."""
    assert_equals_reference(ZERO.replace(codec="lsh", compensation=compensation), 2)


def sent_rows(case: Case) -> tuple[list[int], int]:
    """Rows in every all-to-all of this rank's forward, and the choices of real experts that they should be."""
    model = models.build(case)
    sent: list[int] = []
    real = dist.all_to_all_single

    def counted(output, input, *args, **kwargs):
        sent.append(input.shape[0])
        return real(output, input, *args, **kwargs)

    chosen = 0

    def count(_module, _inputs, routing):
        nonlocal chosen
        chosen += int(routing[1].sum())

    for name, module in model.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_hook(count)
    dist.all_to_all_single = counted
    try:
        ((tokens, labels, positions),) = models.my_batch()
        with torch.no_grad():
            model(tokens, positions, None, labels=labels)
    finally:
        dist.all_to_all_single = real
    return sent, chosen


def test_tokens_of_zero_experts_do_not_travel():
    choices = BATCH_SIZE // 2 * SEQ_LENGTH * ZERO.topk * ZERO.num_groups
    for sent, chosen in ranks.run(sent_rows, 2, ZERO, layout=EP[2]):
        dispatched = sent[0::2]  # a dispatch, a combine, and so on
        assert len(sent) == 2 * ZERO.num_groups
        assert sum(dispatched) == chosen < choices


def all_to_zero_experts(case: Case) -> tuple[list[int], bool, float]:
    """Rows sent where every token chooses zero experts alone; whether all is finite; the router's gradient."""
    model = models.build(case)
    for name, value in model.named_buffers():
        if name.endswith("expert_bias"):
            value.copy_(torch.tensor([-100.0] * 4 + [0.0] * case.zero_experts))
    sent: list[int] = []
    real = dist.all_to_all_single

    def counted(output, input, *args, **kwargs):
        sent.append(input.shape[0])
        return real(output, input, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        ((tokens, labels, positions),) = models.my_batch()
        loss = model(tokens, positions, None, labels=labels)
        loss.mean().backward()
    finally:
        dist.all_to_all_single = real
    gradients = [value.grad for name, value in model.named_parameters() if name.endswith("router.weight")]
    return sent, bool(loss.isfinite().all()), min(float(gradient.norm()) for gradient in gradients)


def test_a_batch_that_no_real_expert_gets():
    for sent, finite, norm in ranks.run(all_to_zero_experts, 2, ZERO, layout=EP[2]):
        assert set(sent) == {0} and finite and norm > 0


def biases_after(steps: int, rate: str, folder) -> dict[str, torch.Tensor]:
    flags = with_flags(FLAGS, f"--train-iters {steps}", f"--moe-router-bias-update-rate {rate}")
    flags = with_flags(flags, f"--save {folder}", "--save-interval 1000", "--no-save-optim")
    flags = with_flags(flags, "--expert-model-parallel-size 2")
    (printed, _) = ranks.run(training.train, 2, flags)
    assert "exit code" not in printed, printed[-3000:]
    (tensors,) = ranks.run(training.checkpoint_tensors, 1, folder, steps)
    return {key: value for key, value in tensors.items() if key.endswith("expert_bias")}


def test_biases_move_by_the_rate(tmp_path):
    """Megatron's rule: by the sign of what an expert, real or zero, lacks to the mean."""
    biases = biases_after(3, "0.25", tmp_path / "on")
    assert len(biases) == 2
    for bias in biases.values():
        assert bias.shape == (7,) and bias.dtype is torch.float32
        assert set((bias / 0.25).tolist()) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0} and bias.any()
    for bias in biases_after(3, "0", tmp_path / "off").values():
        assert not bias.any()


def test_biases_move_towards_balance(tmp_path):
    """By the sign of what an expert lacks to the mean over real and zero experts, counted from the report."""
    flags = with_flags(FLAGS, "--train-iters 2", "--moe-router-bias-update-rate 0.25", "--save-interval 1")
    flags = with_flags(flags, f"--save {tmp_path}/save", "--no-save-optim", f"--overlap-report {tmp_path}/report")
    (printed,) = ranks.run(training.train, 1, flags)
    assert "exit code" not in printed, printed[-3000:]
    before, after = (ranks.run(training.checkpoint_tensors, 1, tmp_path / "save", step)[0] for step in (1, 2))
    step = json.loads((tmp_path / "report/rank00000.jsonl").read_text().splitlines()[-1])
    groups = step["groups"]
    assert len(groups) == 2 and step["iteration"] == 2
    for group in groups:
        tokens = torch.tensor(group["tokens_per_expert"])
        name = f"decoder.layers.{2 * group['group'] + 1}.mlp.router.expert_bias"
        bias = after[name] - before[name]
        mean = 8 * 16 * 3 / 7  # sequences, tokens, choices, experts
        assert torch.equal(bias[:4], 0.25 * torch.sign(mean - tokens)) and len(set(tokens.tolist())) > 1
        assert group["dropped_share"] == 0 and tokens.sum() < 8 * 16 * 3


def test_refused():
    refusals = [
        (["--zero-experts 3", "--router core"], "zero experts are chosen by LongCat-Flash's router"),
        (["--zero-experts -1"], "experts are counted from 0"),
        (["--moe-expert-capacity-factor 1.0"], "it would count the tokens of zero experts"),
        (["--moe-router-num-groups 2", "--moe-router-group-topk 2"], "zero experts belong to no group"),
        (["--moe-router-score-function sigmoid"], "it is a softmax over all experts"),
        (["--moe-router-load-balancing-type sinkhorn"], "sinkhorn routes in a way of its own"),
        (["--latent-scaling longcat"], "the norms of latents are scaled"),
    ]
    entry.assert_refused((with_flags(FLAGS, *changes), [words]) for changes, words in refusals)


def test_refused_with_dgmoe_and_without_a_shortcut():
    refusals = {"dgmoe's two gates choose by scores alone": DGMOE, "--router needs a shortcut": training.STOCK}
    entry.assert_refused((with_flags(flags, "--router longcat"), [words]) for words, flags in refusals.items())
