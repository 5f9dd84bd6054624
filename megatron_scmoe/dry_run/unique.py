"""Unique tokens (``--a2a-unique``) without data: gate weights do not say to which ranks a token goes.

Tokens choose as they would where every choice is as likely, so that as many rows travel as
``config.expected_unique_share`` says; and every expert gets its even share of them, as in all of a dry run.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_scmoe.dispatch import unique
from megatron_scmoe.dry_run.meta import balanced_map, replaced
from megatron_scmoe.mcore import unique_rows

_DRAWN = 8
"""Random choices, at least: one alone may be far from the mean."""


@contextlib.contextmanager
def chosen_evenly(topk: int, num_choices: int) -> Iterator[None]:
    """In here tokens choose ``topk`` of ``num_choices``, the experts and zero experts behind them, whatever weights."""

    def experts_of_tokens(probs: Tensor) -> Tensor:
        num_tokens, num_experts = probs.shape
        return even_choices(num_tokens, topk, num_choices)[:, :num_experts]

    def experts_of_rows(weights: Tensor, rows_per_expert: Tensor) -> Tensor:
        return balanced_map(len(weights), rows_per_expert)

    with (
        replaced(unique, "experts_of_tokens", experts_of_tokens),
        replaced(unique_rows, "experts_of_rows", experts_of_rows),
    ):
        yield


def even_choices(num_tokens: int, topk: int, num_choices: int) -> Tensor:
    """Which of ``num_choices`` each token takes, bool, [tokens, choices]: ``topk`` each.

    Random choices, each of which some tokens take turned on by equal steps: so all are taken about as often, and a
    token's are as far from each other as chance has them.
    """
    drawn = random.Random(0)  # the same on every machine
    rounds = max(_DRAWN, -(-num_tokens // num_choices))
    choices = torch.tensor([drawn.sample(range(num_choices), topk) for _ in range(rounds)])
    token = torch.arange(num_tokens)
    turn, step = token % rounds, token // rounds
    steps = -(-num_tokens // rounds)
    chosen = (choices[turn] + (step * num_choices // steps)[:, None]) % num_choices
    return torch.zeros(num_tokens, num_choices, dtype=torch.bool).scatter_(1, chosen, True)
