"""^C in the middle of a training: one line, exit code 130, and checkpoints that are whole."""

from __future__ import annotations

import signal

import ranks
import training
from training import SCMOE, with_flags


def interrupted(flags: list[str]) -> str:
    """On a rank: the script, stopped in its second step."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as when it is started
    entry = training.entry_script()
    say = entry.TimeLeft.say

    def say_and_stop(self, args):
        say(self, args)
        if args.curr_iteration == 1:
            signal.raise_signal(signal.SIGINT)

    entry.TimeLeft.say = say_and_stop
    training.entry_script = lambda: entry
    return training.train(flags)


def test_it_says_so_in_a_line(tmp_path):
    flags = with_flags(SCMOE, "--train-iters 3", f"--save {tmp_path}", "--save-interval 1", "--ckpt-format torch_dist")
    (printed,) = ranks.run(interrupted, 1, flags)
    line = "pretrain_gpt_scmoe.py: stopped by SIGINT; what it saved is whole"
    assert printed.endswith("exit code 130") and printed.count(line) == 1 and "Traceback" not in printed
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
    (printed,) = ranks.run(training.train, 1, with_flags(flags, f"--load {tmp_path}"))
    assert "exit code" not in printed and "iteration        3/" in printed
