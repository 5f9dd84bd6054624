"""Checkpoints of Megatron's hybrid container: from GPT's and back, to Hugging Face and back, with Mamba layers too."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import small_checkpoints
import torch
from cases import cases
from checkpoint_files import TOOLS, assert_same, opened, read_all
from test_hf_scmoe import CASES as GPT_CASES
from test_hf_scmoe import TOKENS, build_and_save, greedily_decoded, loaded, logits_of
from test_settings import changed_args
from training import SCMOE, STOCK, STOCK_SHARED_EXPERT, with_flags, without_flag

sys.path.insert(0, str(TOOLS))
import convert_checkpoint as tool
from checkpoints.mappings import hybrid
from checkpoints.mappings.links import expected_tensors
from checkpoints.mappings.megatron_settings import complete
from checkpoints.mappings.scmoe_settings import config_of
from checkpoints.running import verify as running

TOLERANCE = 1e-5
"""Of logits of two models on the same sums; those of transformers add up in another order."""
THEIR_TOLERANCE = 1e-4
MAMBA = ("--mamba-num-heads 4", "--mamba-head-dim 8", "--mamba-state-dim 8", "--mamba-num-groups 2")

CASES = {
    **{name: GPT_CASES[name] for name in ("pos2", "each group its own", "moe-every 1", "moe-every 3", "dgmoe")},
    **{name: GPT_CASES[name] for name in ("dgmoe pos3 share", "latent", "latent yarn", "longcat", "layer norm")},
    **{name: GPT_CASES[name] for name in ("grouped queries", "stock", "stock every block", "lowrank codec")},
    "late": with_flags(SCMOE, "--shortcut-span 2", "--shortcut-landing 1"),
    "farskip": with_flags(SCMOE, "--shortcut-position farskip", "--moe-every 1", "--hidden-dropout 0"),
    "upstream": with_flags(SCMOE, "--shortcut-norms upstream"),
    "shared": with_flags(SCMOE, "--moe-share-groups 2", "--shortcut-combine cg2"),
    "predicting": with_flags(SCMOE, "--mtp-num-layers 2"),
    "dgmoe predicting": with_flags(GPT_CASES["dgmoe"], "--mtp-num-layers 1"),
    "stock predicting": with_flags(STOCK_SHARED_EXPERT, "--mtp-num-layers 1"),
    "longcat predicting": with_flags(GPT_CASES["longcat"], "--mtp-num-layers 1"),
}


def as_hybrid(flags: list[str], pattern: str) -> list[str]:
    """The hybrid model of these flags."""
    for name in ("--num-layers", "--moe-every", "--moe-layer-freq"):
        if name in flags:
            flags = without_flag(flags, name)
    return with_flags(flags, f"--hybrid-layer-pattern {pattern}")


HYBRIDS = {
    "M*-EME-": with_flags(as_hybrid(SCMOE, "M*-EME-"), *MAMBA, "--shortcut-position pos3 pos1"),
    "cg2": with_flags(as_hybrid(SCMOE, "MM*E-ME"), *MAMBA, "--shortcut-position pos2", "--shortcut-combine cg2"),
    "dgmoe": with_flags(as_hybrid(GPT_CASES["dgmoe"], "*MEM-E"), *MAMBA),
    "no attention": with_flags(as_hybrid(SCMOE, "M-EMMME"), *MAMBA),
    "uneven": as_hybrid(SCMOE, "*-*E-*-E"),
    "latent": with_flags(as_hybrid(GPT_CASES["longcat"], "+-ME+-+E"), *MAMBA),
    "stock": with_flags(as_hybrid(STOCK_SHARED_EXPERT, "MEM*-"), *MAMBA),
    "layer norm": with_flags(as_hybrid(GPT_CASES["layer norm"], "M*-E"), *MAMBA),
}
QUICK_HYBRIDS = ("M*-EME-", "latent")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[tuple[str, ...]], tuple[Path, torch.Tensor]]:
    """A function of flags: the checkpoint that Core saves of that model, and its logits."""

    @functools.cache
    def make(flags: tuple[str, ...]) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp("case") / "megatron"
        (logits,) = ranks.run(build_and_save, 1, list(flags), folder, TOKENS, layout={})
        return folder, logits

    return make


def convert(load: Path, save: Path, *words: str) -> str:
    """What the tool prints; AssertionError where it does not convert."""
    code, printed = attempt(load, save, *words)
    assert code == 0, printed
    return printed


def attempt(load: Path, save: Path, *words: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = tool.main([*words, "--load", str(load), "--save", str(save)])
    return code, printed.getvalue()


def to_container(load: Path, save: Path, container: str, *more: str) -> Path:
    convert(load, save, "--from", "megatron", "--to", "megatron", "--container", container, *more)
    return save


def refused(load: Path, save: Path, *words: str) -> str:
    """The line that refuses a conversion."""
    code, printed = attempt(load, save, *words)
    assert code == 2 and printed.count("\n") == 1 and not save.exists(), printed
    return printed


def write_logits(request):
    running._write_logits(*request)


@pytest.fixture
def no_start_up(monkeypatch):
    """Megatron's models run in forks of a process that has imported it."""

    def run(request):
        ranks.run(write_logits, 1, json.loads(request), distributed=False)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(running, "_in_a_process", run)


def difference(one: Path, other: Path) -> float:
    """The largest of logits of two checkpoints of Megatron's."""
    return running.verify(one, "megatron", other, "megatron")["largest_difference"]


# --- GPT to hybrid and back ---


@pytest.mark.usefixtures("no_start_up")
@pytest.mark.parametrize("case", cases(CASES, ["pos2", "longcat", "upstream", "shared", "predicting"]))
def test_gpt_becomes_hybrid_and_comes_back(saved, tmp_path, case):
    """Bit for bit, and the hybrid model computes the same."""
    source, _ = saved(tuple(CASES[case]))
    there = to_container(source, tmp_path / "hybrid", "hybrid")
    back = to_container(there, tmp_path / "back", "gpt")
    before, after = opened(source), opened(back)
    assert_same(read_all(after), read_all(before))
    for name in ("num_layers", "moe_every", "moe_layer_freq", "shortcut_position", "shortcut"):
        assert getattr(after.args, name) == getattr(before.args, name), name
    assert opened(there).args.hybrid_layer_pattern and not after.args.hybrid_layer_pattern
    assert difference(source, there) <= TOLERANCE


PAIRS = {
    "pos2": ("*-*E*-*E", SCMOE),
    "longcat": ("+-+E+-+E", GPT_CASES["longcat"]),
    "stock": ("*-*E*-*E", STOCK_SHARED_EXPERT),
}
PREDICTING = {
    "predicting": ("*-*E*-*E/*E/*E", CASES["predicting"]),
    "one layer predicts twice": ("*-*E*-*E/*E/*E", with_flags(CASES["predicting"], "--mtp-use-repeated-layer")),
    "longcat predicting": ("+-+E+-+E/+-", CASES["longcat predicting"]),
}


@pytest.mark.parametrize("case", cases(PAIRS | PREDICTING, ["longcat", "predicting", "longcat predicting"]))
def test_names_are_those_that_core_saves(saved, tmp_path, case):
    """Of the same model built as a hybrid one: an independent truth for names, shapes and dtypes, both ways."""
    pattern, flags = (PAIRS | PREDICTING)[case]
    gpt, of_core = saved(tuple(flags))[0], saved(tuple(as_hybrid(flags, pattern)))[0]
    there = opened(to_container(gpt, tmp_path / "hybrid", "hybrid"))
    assert there.args.hybrid_layer_pattern == pattern
    assert there.infos == opened(of_core).infos
    assert opened(to_container(of_core, tmp_path / "gpt", "gpt")).infos == opened(gpt).infos


@pytest.mark.usefixtures("no_start_up")
def test_a_layer_in_the_wrong_place_is_noticed(saved, tmp_path, monkeypatch):
    """Negative control: norms of two layers of one shape are exchanged."""
    source, _ = saved(tuple(CASES["pos2"]))
    renamed = hybrid._hybrid_norms

    def exchanged(args: Namespace) -> dict[str, str]:
        names = renamed(args)
        one, other = (f"decoder.layers.{n}.self_attention.linear_qkv.layer_norm_weight" for n in (0, 1))
        return {**names, one: names[other], other: names[one]}

    with monkeypatch.context() as patch:
        patch.setattr(hybrid, "_hybrid_norms", exchanged)
        there = to_container(source, tmp_path / "hybrid", "hybrid")
    assert difference(source, there) > 100 * TOLERANCE
    back = to_container(there, tmp_path / "back", "gpt")
    with pytest.raises(AssertionError):
        assert_same(read_all(opened(back)), read_all(opened(source)))


@pytest.mark.full
def test_the_command_compares_logits(saved, tmp_path):
    source, _ = saved(tuple(CASES["longcat"]))
    to_container(source, tmp_path / "hybrid", "hybrid", "--verify", "--verify-tolerance", str(TOLERANCE))
    receipt = json.loads((tmp_path / "hybrid" / "conversion.json").read_text())
    assert receipt["verified"]["passed"] and receipt["options"]["container"] == "hybrid"


@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_the_specs_of_a_hybrid_checkpoint_have_the_same_names(saved, tmp_path, spec):
    """By way of the GPT model's, of which one has others; and cuts between pipeline stages stay."""
    source, _ = saved(tuple(as_hybrid(SCMOE, "*-*E*-*E")))
    words = ("--from", "megatron", "--to", "megatron")
    convert(source, tmp_path / "te", *words, "--transformer-impl", "transformer_engine")
    assert_same(read_all(opened(tmp_path / "te")), read_all(opened(source)))
    if spec == "local":
        convert(tmp_path / "te", tmp_path / "back", *words, "--transformer-impl", "local")
        assert_same(read_all(opened(tmp_path / "back")), read_all(opened(source)))
    else:
        to_container(tmp_path / "te", tmp_path / "gpt", "gpt")
        convert(tmp_path / "gpt", tmp_path / "back", *words, "--transformer-impl", "local")
        gpt, _ = saved(tuple(SCMOE))
        assert opened(tmp_path / "back").infos == opened(gpt).infos


def test_cuts_between_stages_stay_in_a_hybrid_checkpoint():
    args = complete(Namespace(num_layers=2, num_experts=4, moe_layer_freq=[0, 1]))
    assert hybrid.hybrid_args(args)["hybrid_layer_pattern"] == "*-*E"
    assert hybrid.hybrid_args(args, "*-|*-")["hybrid_layer_pattern"] == "*-|*E"


def test_upcycling_takes_hybrid_checkpoints(saved, tmp_path):
    """A dense hybrid model becomes ScMoE, in its container."""
    of_experts = (
        *("--num-experts", "--moe-router-topk", "--moe-router-pre-softmax", "--moe-ffn-hidden-size"),
        *("--moe-shared-expert-intermediate-size", "--moe-token-dispatcher-type", "--moe-aux-loss-coeff"),
    )
    flags = as_hybrid(functools.reduce(without_flag, of_experts, STOCK), "*-*-*-*-")
    source, _ = saved(tuple(flags))
    convert(source, tmp_path / "up", "--from", "megatron", "--to", "megatron", "--experts", "4", "--skip-change")
    made = opened(tmp_path / "up")
    assert made.args.hybrid_layer_pattern == "*-*E*-*E" and made.args.shortcut == "scmoe"
    assert made.infos["decoder.layers.3.mlp.experts.experts.linear_fc2.weight"].shape == (4, 32, 48)


# --- to Hugging Face and back ---


@pytest.mark.parametrize("case", cases(PAIRS, ["longcat"]))
def test_hybrid_becomes_the_folder_of_the_gpt_model(saved, tmp_path, case):
    """Its logits are those of the hybrid model, and it comes back to either container."""
    pattern, flags = PAIRS[case]
    source, expected = saved(tuple(as_hybrid(flags, pattern)))
    convert(source, tmp_path / "hf", "--from", "megatron", "--to", "hf-scmoe")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()).get("layer_pattern", "") == ""
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(loaded(tmp_path / "hf")), expected, rtol=0, atol=THEIR_TOLERANCE)
    words = ("--from", "hf-scmoe", "--to", "megatron")
    convert(tmp_path / "hf", tmp_path / "back", *words, "--container", "hybrid")
    assert_same(read_all(opened(tmp_path / "back")), read_all(opened(source)))
    convert(tmp_path / "hf", tmp_path / "gpt", *words)
    to_container(source, tmp_path / "direct", "gpt")
    assert_same(read_all(opened(tmp_path / "gpt")), read_all(opened(tmp_path / "direct")))


def test_longcat_goes_through_a_hybrid_checkpoint(tmp_path):
    source = small_checkpoints.longcat(tmp_path / "hf")
    convert(source, tmp_path / "hybrid", "--from", "hf-longcat", "--to", "megatron", "--container", "hybrid")
    there = opened(tmp_path / "hybrid")
    assert there.args.hybrid_layer_pattern == "+-+E+-+E"
    assert there.infos.keys() == expected_tensors(there.args, there.infos).keys()
    convert(tmp_path / "hybrid", tmp_path / "back", "--from", "megatron", "--to", "hf-longcat")
    assert_same(read_all(opened(tmp_path / "back")), read_all(opened(source)))


# --- Mamba layers, and groups of several sizes ---


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Callable[[str], tuple[Path, Path, torch.Tensor]]:
    """A function of the name of a case: its checkpoint, the folder made of it, and the former's logits."""

    @functools.cache
    def make(case: str) -> tuple[Path, Path, torch.Tensor]:
        source, logits = saved(tuple(HYBRIDS[case]))
        folder = tmp_path_factory.mktemp("exported") / "hf"
        convert(source, folder, "--from", "megatron", "--to", "hf-scmoe")
        return source, folder, logits

    return make


@pytest.mark.parametrize("case", cases(HYBRIDS, QUICK_HYBRIDS))
def test_hybrid_folders_compute_what_megatron_does(exported, tmp_path, case):
    source, folder, expected = exported(case)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(loaded(folder)), expected, rtol=0, atol=THEIR_TOLERANCE)
    convert(folder, tmp_path / "back", "--from", "hf-scmoe", "--to", "megatron")
    before, after = opened(source), opened(tmp_path / "back")
    assert_same(read_all(after), read_all(before))
    assert after.args.hybrid_layer_pattern == before.args.hybrid_layer_pattern
    assert config_of(complete(after.args)) == config_of(complete(before.args))


CONTROLS = [
    ("M*-EME-", {"shortcut_position": ["pos1", "pos1"]}),
    ("M*-EME-", {"shortcut_combine": "add"}),
    ("M*-EME-", {"mamba_num_groups": 4, "mamba_state_size": 4}),
    ("latent", {"shortcut_position": ["pos1"]}),
]


@pytest.mark.parametrize(("case", "changes"), CONTROLS)
def test_a_wrong_setting_is_another_function(exported, case, changes):
    """Negative control."""
    _, folder, expected = exported(case)
    assert (logits_of(loaded(folder, **changes)) - expected).abs().max() > 10 * THEIR_TOLERANCE


@pytest.mark.parametrize("case", cases(HYBRIDS, QUICK_HYBRIDS))
def test_generation_with_a_cache_is_greedy_decoding_without(exported, case):
    _, folder, _ = exported(case)
    greedily_decoded(loaded(folder), 6, THEIR_TOLERANCE)


def test_padding_on_the_left_reaches_no_state(exported):
    _, folder, expected = exported("M*-EME-")
    model = loaded(folder)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), TOKENS), dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    positions = (torch.arange(15) - 3).clamp(min=0).expand(2, -1)
    found = logits_of(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
    torch.testing.assert_close(found, expected, rtol=0, atol=THEIR_TOLERANCE)
    without = logits_of(model, padded, attention_mask=torch.ones_like(mask), position_ids=positions)[:, 3:]
    assert (without - expected).abs().max() > 10 * THEIR_TOLERANCE


def test_gradients_reach_every_mamba_parameter(exported):
    _, folder, _ = exported("M*-EME-")
    model = loaded(folder).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert all(".experts." in name for name in without)  # an expert may have got no token


@pytest.mark.usefixtures("no_start_up")
def test_the_command_scores_hybrid_models(exported, tmp_path):
    """A checkpoint and what came back of its folder are one model."""
    source, folder, _ = exported("M*-EME-")
    convert(folder, tmp_path / "back", "--from", "hf-scmoe", "--to", "megatron")
    assert difference(source, tmp_path / "back") == 0.0
    ids = running.random_tokens(source)
    assert ids.shape == (2, 16)


# --- refusals ---


def test_what_a_gpt_model_cannot_hold_is_refused(saved, tmp_path):
    target = tmp_path / "new"
    to_gpt = ("--from", "megatron", "--to", "megatron", "--container", "gpt")
    for case, words in (
        ("M*-EME-", "its blocks have no Mamba layers, and hybrid_layer_pattern is M*-EME-"),
        ("uneven", "its blocks are an attention and an MLP or MoE each"),
    ):
        source, _ = saved(tuple(HYBRIDS[case]))
        assert words in refused(source, target, *to_gpt)
    source, _ = saved(tuple(as_hybrid(SCMOE, "*-*E*-*-*E")))
    assert "its groups have all one size" in refused(source, target, *to_gpt)
    source, _ = saved(tuple(as_hybrid(SCMOE, "*-*E*-*E/*-")))
    assert "it predicts by a block like its last one" in refused(source, target, *to_gpt)
    source, _ = saved(tuple(HYBRIDS["latent"]))
    line = refused(source, target, "--from", "megatron", "--to", "hf-longcat")
    assert "has hybrid_layer_pattern None, and the checkpoint has +-ME+-+E; use --to hf-scmoe" in line


def test_what_a_hybrid_model_cannot_hold_is_refused(saved, tmp_path):
    to_hybrid = ("--from", "megatron", "--to", "megatron", "--container", "hybrid")
    source, _ = saved(tuple(GPT_CASES["llama3 rope"]))
    line = refused(source, tmp_path / "new", *to_hybrid)
    assert "its rotary positions are not stretched: the checkpoint has --use-rope-scaling True" in line
    source, _ = saved(tuple(GPT_CASES["latent"]))
    convert(source, tmp_path / "te", *to_hybrid[:4], "--transformer-impl", "transformer_engine")
    assert "have no norms of queries, keys and latents" in refused(tmp_path / "te", tmp_path / "new", *to_hybrid)
    source, _ = saved(tuple(with_flags(SCMOE, "--qk-l2-norm")))
    line = refused(source, tmp_path / "new", *to_hybrid)
    assert "no norms of queries and keys without weights: the checkpoint has --qk-l2-norm True" in line


def test_the_converter_refuses_what_the_entry_script_would():
    """Every flag that Core's hybrid layers leave out is a row of the converter's, or has a rule of its own there."""
    from megatron_scmoe.training import hybrid_rules

    norms = set(re.findall(r"qk_\w+norm", inspect.getsource(hybrid_rules.check_norms)))
    known = {*hybrid._NOT_IN_HYBRID, "use_rope_scaling", "qk_layernorm"}
    assert {*hybrid_rules._UNREAD, *norms} <= known and norms == {"qk_l2_norm", "qk_layernorm"}


CONTRADICTING = {
    "fewer predictions": ("gpt", {"mtp_num_layers": 1}, "has no place for, or not in this shape: 'mtp.layers.1."),
    "none": ("gpt", {"mtp_num_layers": None}, "has no place for, or not in this shape: 'mtp.layers.0."),
    "more": ("gpt", {"mtp_num_layers": 3}, "tensors that the target would lack: 'mtp.layers.2."),
    "a count": ("gpt", {"mtp_num_layers": 10**9}, "mtp_num_layers is 1000000000 in"),
    "one layer predicts twice": (
        "hybrid",
        {"mtp_use_repeated_layer": True},
        "has no place for, or not in this shape: 'mtp.layers.1.",
    ),
    "one slash": ("hybrid", {"hybrid_layer_pattern": "*-*E*-*E/*E"}, "and mtp_num_layers is 2; correct it"),
    "fewer layers": (
        "hybrid",
        {"hybrid_layer_pattern": "*-*E/*E/*E", "num_layers": 4},
        "has no place for, or not in this shape: 'decoder.layers.4.",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTING)
def test_arguments_that_contradict_the_tensors_are_refused(saved, tmp_path, case):
    """In one line, and nothing is dropped."""
    container, changes, words = CONTRADICTING[case]
    source, _ = saved(tuple(CASES["predicting"]))
    release = to_container(source, tmp_path / "hybrid", "hybrid")
    if container == "gpt":
        release = to_container(release, tmp_path / "gpt", "gpt")
    other = {"gpt": "hybrid", "hybrid": "gpt"}[container]
    to_other = ("--from", "megatron", "--to", "megatron", "--container", other)
    assert words in refused(changed_args(release, tmp_path / "changed", changes), tmp_path / "new", *to_other)


def test_a_checkpoint_from_before_layers_predicted_twice_changes_its_spec(saved, tmp_path):
    source, _ = saved(tuple(CASES["predicting"]))
    release = to_container(to_container(source, tmp_path / "hybrid", "hybrid"), tmp_path / "gpt", "gpt")
    older = changed_args(release, tmp_path / "older", {}, without=("mtp_use_repeated_layer",))
    words = ("--from", "megatron", "--to", "megatron", "--transformer-impl", "transformer_engine")
    convert(older, tmp_path / "older-te", *words)
    convert(release, tmp_path / "te", *words)
    assert_same(read_all(opened(tmp_path / "older-te")), read_all(opened(tmp_path / "te")))


def test_odd_requests_are_refused(saved, tmp_path):
    source, _ = saved(tuple(SCMOE))
    new, mine = tmp_path / "new", ("--from", "megatron", "--to", "megatron")
    assert "is gpt already" in refused(source, new, *mine, "--container", "gpt")
    assert "drop one of them" in refused(source, new, *mine, "--container", "hybrid", "--with-optimizer")
    assert "drop one of them" in refused(source, new, "--from", "megatron", "--to", "hf-scmoe", "--container", "gpt")
    there = to_container(source, tmp_path / "hybrid", "hybrid")
    assert "is hybrid already" in refused(there, new, *mine, "--container", "hybrid")
