"""Megatron's marks around steps and saves, which it keeps for NVIDIA's resiliency package and gives to any client."""

from __future__ import annotations

from typing import Protocol

from megatron.training import ft_integration


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
