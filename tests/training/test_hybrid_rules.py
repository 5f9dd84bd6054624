"""What a hybrid model cannot be, from the command line: refused in one line, before any process group starts."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable

import entry
import pytest
import torch
from test_arguments import DGMOE, changes
from training import SCMOE, STOCK, with_flags, without_flag

MAMBA = "--mamba-num-heads 4 --mamba-head-dim 8 --mamba-state-dim 8 --mamba-num-groups 2"


def hybrid(flags: list[str], pattern: str) -> list[str]:
    return with_flags(without_flag(flags, "--num-layers"), f"--hybrid-layer-pattern {pattern}", *changes(MAMBA))


def refusals(flags: list[str], table: dict[tuple[str, str], list[str]]) -> list[tuple[list[str], list[str]]]:
    """Of ``flags`` with a pattern and changes."""
    return [
        (with_flags(hybrid(flags, pattern), *(changes(change) if change else [])), words)
        for (pattern, change), words in table.items()
    ]


WITH_GROUPS = {
    ("M-*X", ""): ["a group runs the layers", "layer 3 of --hybrid-layer-pattern M-*X is X"],
    ("E*E", ""): ["group 0 is pos2", "the group has 0 ops", "a longer group"],
    ("M-*EM*E", "--shortcut-position pos3"): ["group 1 is pos3", "the group has 2 ops", "--shortcut-position pos2"],
    ("M-*EM-*E", "--shortcut-position pos1 pos2 pos3"): ["3 values and 2 groups"],
    ("M-*EM-*E", "--num-layers 6"): ["--num-layers is 6", "M-*EM-*E has 8; drop --num-layers"],
    ("M-*EM-*E", "--shortcut-span 3"): ["spans are whole", "--shortcut-span is 3 and there are 2 groups"],
    ("*-*E+-+E", ""): ["Megatron's own rule", "both Attention and MLA"],
    ("G-*E", "--transformer-impl transformer_engine"): [
        "layer G needs kernels of flash-linear-attention (a gated delta net)",
        "--hybrid-layer-pattern is G-*E and there is no CUDA device",
        "leave it out",
    ],
    ("D-DE", ""): ["layer D needs Transformer Engine's linears", "--transformer-impl is local"],
    ("M-*E", "--expert-model-parallel-size 3"): ["Megatron's own rule", "multiple of expert model parallel_size"],
    ("M-*E|M-*E", ""): ["has 2 stages and --pipeline-model-parallel-size is 1", "use --pipeline-model-parallel-size 2"],
    ("M-*E|M-*E|M-*E", "--pipeline-model-parallel-size 2"): ["3 stages and --pipeline-model-parallel-size is 2"],
    ("M-*E", "--mamba-num-heads 3"): ["--mamba-num-heads is 3, and --mamba-num-groups is 2", "use a multiple of 2"],
    ("M-*E", "--mamba-num-groups 0"): ["a whole number from 1", "--mamba-num-groups is 0"],
    ("M-*E", "--tensor-model-parallel-size 4 --sequence-parallel"): [
        "--mamba-num-groups is 2 and --tensor-model-parallel-size is 4",
        "use a multiple of 4 groups",
    ],
}
WITHOUT_GROUPS = {
    ("G-*E", ""): ["layer G needs kernels", "--transformer-impl is local"],
    ("G-*E", "--transformer-impl transformer_engine"): ["layer G needs kernels", "there is no CUDA device"],
    ("M-*X", ""): ["Megatron's own rule", "'X' is not a valid layer symbol"],
}


def test_refused():
    cases = refusals(SCMOE, WITH_GROUPS) + refusals(STOCK, WITHOUT_GROUPS)
    unsaid = without_flag(hybrid(SCMOE, "M-*E"), "--mamba-num-heads")
    cases += [
        (with_flags(unsaid, "--mamba-head-dim 48"), ["of whole heads", "--mamba-head-dim is 48", "give --mamba-num"]),
        (with_flags(unsaid, "--mamba-num-groups 3"), ["makes 8 of --mamba-head-dim 8", "--mamba-num-groups is 3"]),
        (without_flag(hybrid(SCMOE, "M-*E"), "--num-experts"), ["a shortcut needs experts"]),
    ]
    entry.assert_refused(cases)


def test_accepted():
    """Negative control."""
    patterns = ["M-*EM-*E", "M*-E-", "M-*E*-*E"]
    commands = [hybrid(flags, pattern) for flags in (SCMOE, DGMOE, STOCK) for pattern in patterns]
    commands.append(without_flag(hybrid(SCMOE, "M-*E"), "--mamba-num-heads"))
    entry.assert_accepted([*commands, with_flags(hybrid(SCMOE, "MEM*E"), "--shortcut-position pos1")])


def assert_said(check: Callable[[Namespace], None], args: Namespace, words: str) -> None:
    """A refusal in one line, or none where there are no words."""
    from megatron_scmoe.config import ConfigError

    if not words:
        check(args)
        return
    with pytest.raises(ConfigError) as refused:
        check(args)
    assert words in str(refused.value) and "\n" not in str(refused.value)


ARGS = Namespace(
    hidden_size=32,
    use_checkpoint_args=False,
    transformer_impl="transformer_engine",
    tensor_model_parallel_size=1,
    mamba_num_heads=4,
    mamba_head_dim=8,
    mamba_num_groups=2,
)


@pytest.mark.parametrize(
    ("pattern", "missing", "words"),
    [
        ("G-*E", "fla", "G-*E and the package fla is not installed"),
        ("D-DE", "transformer_engine", "D-DE and the package transformer_engine is not installed"),
        ("M-*E", "mamba_ssm", "on a GPU layer M needs the package mamba_ssm"),
        ("*-*E", "transformer_engine", "on a GPU a hybrid model needs the package transformer_engine"),
        ("GMDE", "", ""),
        ("*-*E", "mamba_ssm fla", ""),
    ],
)
def test_what_a_machine_with_a_gpu_may_lack(monkeypatch, pattern, missing, words):
    """The last ones are negative controls: all is there that is needed."""
    from megatron_scmoe.training import hybrid_rules

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing.split() else name)
    assert_said(hybrid_rules.check_layers, Namespace(**vars(ARGS), hybrid_layer_pattern=pattern), words)


@pytest.mark.parametrize(
    ("set_to", "words"),
    [
        ({"qk_layernorm": True}, "--qk-layernorm is set; drop it, or use --transformer-impl local"),
        ({"qk_l2_norm": True, "transformer_impl": "local"}, "is local and --qk-l2-norm is set; drop it"),
        ({"qk_layernorm": True, "transformer_impl": "local"}, ""),
        ({"qk_layernorm": True, "latent_scaling": "longcat"}, ""),
        ({"qk_layernorm": True, "hybrid_layer_pattern": "M-E"}, ""),
        ({}, ""),
    ],
)
def test_norms_that_are_left_out(set_to, words):
    """The last ones are negative controls: such norms are there, or nothing asks for them."""
    from megatron_scmoe.training import hybrid_rules

    asked = {"qk_layernorm": False, "qk_l2_norm": False, "latent_scaling": "none", "hybrid_layer_pattern": "+-*E"}
    assert_said(hybrid_rules.check_norms, Namespace(**{**vars(ARGS), **asked, **set_to}), words)
