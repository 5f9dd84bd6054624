"""Megatron's marks around steps and saves, which it keeps for NVIDIA's resiliency package and gives to any client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from megatron.training import ft_integration, get_args


class SectionClient(Protocol):
    """What Megatron calls: sections are ``step``, in training and evaluation but the first ones, and
    ``checkpointing``.
    """

    def start_section(self, name: str) -> None:
        """A section begins."""

    def end_section(self, name: str) -> None:
        """It has ended."""

    def shutdown_workload_monitoring(self) -> None:
        """The training has ended."""


def follow_sections(client: SectionClient) -> None:
    """Let Megatron tell ``client``; not where --enable-ft-package brings a client of its own."""
    ft_integration._GLOBAL_RANK_MONITOR_CLIENT = client
    # What this module of Megatron says at the end, "FT: closing...", is said of NVIDIA's package, which there is not.
    ft_integration.print_rank_0 = lambda _line: None


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Mark a section that Megatron has no mark for; NVIDIA's client knows none but Megatron's."""
    client = None if get_args().enable_ft_package else ft_integration.get_rank_monitor_client()
    if client is None:
        yield
        return
    client.start_section(name)
    yield
    client.end_section(name)
