"""Spans, late landing, farskip and sharing: what cannot work is refused in one line, and which checkpoints go on."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import entry
import pytest
import ranks
import training
from test_arguments import DGMOE, changes
from training import SCMOE, with_flags

SPAN = "--shortcut-span 2 --shortcut-landing 1"
FARSKIP = "--moe-every 1 --shortcut-position farskip"
BLOCKS = "--recompute-granularity full --recompute-method block --recompute-num-layers"

REFUSED = {
    # flags -> words that the line must hold: the rule, the values, the fix
    "--shortcut-landing 1": ["within a span", "--shortcut-landing is 1 and --shortcut-span is 1", "--shortcut-span 2"],
    "--shortcut-span 2 --shortcut-landing 4": ["3 residual ops", "--shortcut-landing is 4", "use 0 to 3"],
    "--shortcut-span 2 --shortcut-landing -1": ["--shortcut-landing is -1", "use 0 to 3"],
    "--shortcut-span 3": ["spans are whole", "--shortcut-span is 3 and there are 2 groups", "use a divisor of 2"],
    "--shortcut-span 0": ["spans are whole", "--shortcut-span is 0"],
    f"{SPAN} --expert-slot 7 1": ["slots 1 to 6 here", "--expert-slot of group 0 is 7"],
    f"{SPAN} --expert-slot 6 5": ["slots 1 to 4 here", "--expert-slot of group 1 is 5"],
    f"{SPAN} {BLOCKS} 2": ["--recompute-num-layers is 2", "--shortcut-span is 2", "use --recompute-num-layers 4"],
    "--moe-share-groups 3": ["--moe-share-groups is 3 and there are 2 groups", "use a divisor of 2"],
    "--moe-share-groups 0": ["--moe-share-groups is 0"],
    "--shortcut-position farskip": [
        "group 0 is farskip",
        "the group has 3 ops",
        "use --shortcut scmoe and --moe-every 1",
    ],
    f"{FARSKIP} --shortcut-span 2": ["behind the next attention", "--shortcut-landing is 0", "--shortcut-landing 1"],
    f"{FARSKIP} --shortcut-span 2 --shortcut-landing 2": ["--shortcut-landing is 2", "use 0 to 1"],
    f"{FARSKIP} {SPAN}": ["two tensors", "--hidden-dropout is 0.1", "add --hidden-dropout 0"],
}
DGMOE_REFUSED = {
    FARSKIP: ["an MoE with a shared expert", "--shortcut is dgmoe", "or another position"],
    "--shortcut-span 2 --shortcut-landing 4": ["3 residual ops", "use 0 to 3"],
    f"{SPAN} --expert-slot 6": ["slots 1 to 5 here", "--expert-slot of group 0 is 6"],
}
ACCEPTED = [
    SPAN,
    f"{SPAN} --expert-slot 6 4",
    f"{SPAN} {BLOCKS} 4",
    "--shortcut-span 2 --shortcut-landing 3",
    "--moe-share-groups 2",
    "--num-layers 6 --moe-share-groups 3 --shortcut-span 3",
    FARSKIP,
    f"{FARSKIP} {SPAN} --hidden-dropout 0",
]


def test_refused():
    entry.assert_refused((with_flags(SCMOE, *changes(flags)), words) for flags, words in REFUSED.items())


def test_dgmoe_refused():
    entry.assert_refused((with_flags(DGMOE, *changes(flags)), words) for flags, words in DGMOE_REFUSED.items())


def test_accepted():
    """Negative control: next to what is refused lies what works."""
    flags = [with_flags(SCMOE, *changes(flags)) for flags in ACCEPTED]
    entry.assert_accepted([*flags, with_flags(DGMOE, *changes(f"{SPAN} --expert-slot 5 3"))])


def test_a_pipeline_stage_that_would_cut_a_span_is_refused():
    flags = with_flags(SCMOE, *changes(SPAN), "--pipeline-model-parallel-size 2")
    words = ["stage 0 would hold the layers [0, 1], --moe-every is 2, --shortcut-span is 2", "whole units of 4 blocks"]
    entry.assert_all_ranks_refuse(flags, words, 2)
    accepted = with_flags(flags, "--num-layers 8")
    entry.assert_accepted([accepted], entry.world(2))


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of one step without a span."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (printed,) = ranks.run(training.train, 1, with_flags(SCMOE, "--train-iters 1", f"--save {folder}", SAVING))
    assert "successfully saved checkpoint" in printed
    return folder


SAVING, GOES_ON = "--save-interval 1", "--override-opt-param-scheduler"
LATE = ["--shortcut-span is 2", "has 1", "--shortcut-resume changed"]


def test_resume_with_a_span_is_refused_unless_it_is_asked_for(checkpoint):
    late = with_flags(SCMOE, f"--load {checkpoint}", *changes(SPAN), GOES_ON)
    entry.assert_refused([(late, LATE)])
    entry.assert_accepted([with_flags(late, flag) for flag in ("--shortcut-resume changed", "--finetune")])


def train_before_spans(flags: list[str]) -> list[str]:
    """Train and save as it was before there were spans; what the arguments now hold of them."""
    from megatron.training import checkpointing

    generate, known = checkpointing.generate_state_dict, []

    def forgetful(args: Namespace, *rest, **more):
        state = generate(args, *rest, **more)
        names = [name for name in vars(args) if name in ("shortcut_span", "shortcut_landing")]
        state["args"] = Namespace(**{name: value for name, value in vars(args).items() if name not in names})
        known[:] = names
        return state

    checkpointing.generate_state_dict = forgetful
    assert "exit code" not in training.train(flags)
    return sorted(known)


def test_a_checkpoint_of_before_spans_is_one_without(tmp_path):
    saving = with_flags(SCMOE, "--train-iters 1", f"--save {tmp_path}", SAVING)
    assert ranks.run(train_before_spans, 1, saving) == [["shortcut_landing", "shortcut_span"]]
    loading = with_flags(SCMOE, f"--load {tmp_path}", "--train-iters 2", GOES_ON)
    entry.assert_refused([(with_flags(loading, *changes(SPAN)), LATE)])
    for flags in (loading, [*loading, "--use-checkpoint-args"]):
        (printed,) = ranks.run(training.train, 1, flags)
        assert "exit code" not in printed and "iteration        2/       2" in printed, printed[-3000:]
