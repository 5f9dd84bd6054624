"""Which cases of a parametrised test `make test` runs; the others are of `make test-full`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def cases(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """``values`` for ``pytest.mark.parametrize``, tuples for several names; all but those in ``quick`` are full."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[] if value in quick else pytest.mark.full
        )
        for value in values
    ]
