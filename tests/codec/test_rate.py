"""A target rate is held, whatever hash functions there are: rates follow from synthetic rows, without a model."""

from __future__ import annotations

import pytest
import torch

from megatron_scmoe.codec.lsh import Hasher, cluster, owners
from megatron_scmoe.codec.rate import RateControl

STEPS, SETTLED, TEN = 40, 15, 10


def rates_of(width: int, hashes: int, target: float, experts: int, rows: int, *, gain: float = 1.0) -> list[float]:
    """Of every step, with other rows in each; coordinates have other variances, as those of tokens."""
    hasher, control = Hasher(48, hashes=hashes, width=width, seed=3), RateControl(target, hashes, width)
    control._levels_per_e *= gain
    scales = torch.arange(1, 49).float() ** -0.5
    found = []
    for step in range(STEPS):
        tokens = torch.randn(experts * rows, 48, generator=torch.Generator().manual_seed(step)) * scales
        rows_per_expert = torch.full((experts,), rows)
        keys, _ = hasher.keys(tokens, control.level, owners(rows_per_expert, experts * rows))
        control.see(cluster(keys, rows_per_expert))
        found.append((control.seen[0] / control.seen[1]).item())
        control.adjust(control.seen)
    return found


def farthest(rates: list[float], target: float) -> float:
    """The largest relative difference of a mean of ten steps from the target, once it has settled."""
    means = [sum(rates[begin : begin + TEN]) / TEN for begin in range(SETTLED, STEPS - TEN + 1)]
    return max(abs(mean / target - 1) for mean in means)


@pytest.mark.parametrize(
    ("width", "hashes", "target", "experts", "rows"),
    [
        pytest.param(1, 24, 0.2, 4, 1024, id="spherical"),
        pytest.param(2, 12, 0.2, 4, 1024, id="width 2"),
        pytest.param(2, 12, 0.02, 4, 1024, id="few centroids"),
        pytest.param(2, 12, 0.2, 64, 64, id="few tokens for each expert"),
        pytest.param(4, 8, 0.1, 4, 1024, id="width 4"),
        pytest.param(4, 8, 0.1, 32, 128, id="width 4, many experts"),
        pytest.param(8, 8, 0.1, 4, 1024, id="width 8"),
        pytest.param(8, 8, 0.1, 64, 64, id="width 8, few tokens for each expert"),
        pytest.param(4, 8, 0.05, 64, 64, id="less than one function"),
        pytest.param(2, 12, 0.1, 64, 64, id="hardly more than one function"),
    ],
)
def test_a_target_rate_is_held_with_every_width(width, hashes, target, experts, rows):
    assert farthest(rates_of(width, hashes, target, experts, rows), target) < 0.05


def test_a_level_that_moves_too_far_does_not_hold_it():
    """Negative control: it swings around the target with a larger gain."""
    assert farthest(rates_of(4, 8, 0.1, 4, 1024, gain=3.0), 0.1) > 0.1
