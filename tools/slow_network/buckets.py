"""Rates and sizes as people write them, and the token bucket (`tc htb`) that they make."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from command_line import UserError

_RATES = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SIZES = {"b": 1, "kb": 1 << 10, "mb": 1 << 20}  # as in tc, where kb is 1024 bytes
_LOWEST_RATE, _HIGHEST_RATE = 64_000, 100 * 10**9
_LEAST_BURST = 2 << 10  # bytes, about a packet
_TICKS_PER_S = 15_625_000  # the kernel holds the time that a full bucket lasts in 32 bits of these
UNLIMITED = "unlimited"


def _quantity(text: str, units: dict[str, int], problem: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([a-z]+)", text.strip().lower())
    if not match or match[2] not in units:
        raise UserError(problem)
    return round(float(match[1]) * units[match[2]])


def parse_rate(text: str) -> int | None:
    """Return bits per second, or None for 'unlimited'. Raises UserError."""
    if text.strip().lower() == UNLIMITED:
        return None
    words = "write a number and bit, kbit, mbit or gbit, such as 50mbit, or the word unlimited"
    rate = _quantity(text, _RATES, f"rate {text[:40]!a} is not understood; {words}")
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise UserError(f"rate {text[:40]!a} is out of range; choose 64kbit to 100gbit, or unlimited")
    return rate


def format_rate(rate: int | None) -> str:
    """Return the shortest exact way to write a rate."""
    if rate is None:
        return UNLIMITED
    unit = max((unit for unit, factor in _RATES.items() if rate % factor == 0), key=_RATES.__getitem__)
    return f"{rate // _RATES[unit]}{unit}"


@dataclass(frozen=True)
class TokenBucket:
    """What htb does to one end of a link; a rate of None leaves it out.

    An idle link saves up `burst_bytes` that then pass at full speed. A packet that is larger than what is left passes,
    too, and the next one waits until the debt is paid: htb, unlike tbf, never cuts what TCP hands down in one piece (up
    to 64 KiB), which took up to half a core (docs/decisions.md, 22). Nothing is dropped: a queue holds 1000 pieces.
    """

    rate: int | None
    burst_bytes: int

    @classmethod
    def parse(cls, rate: str, burst: str) -> TokenBucket:
        """Return the bucket of two texts. Raises UserError."""
        size = f"burst {burst[:40]!a} is not understood; write a number and b, kb or mb, such as 16kb"
        return cls(parse_rate(rate), _quantity(burst, _SIZES, size))

    def __post_init__(self) -> None:
        if self.burst_bytes < _LEAST_BURST:
            raise UserError(f"burst of {self.burst_bytes} bytes holds no whole packet; give at least 2kb")
        if self.rate is not None and self.burst_bytes * 8 * _TICKS_PER_S >= self.rate << 32:
            raise UserError(f"burst of {self.burst_bytes} bytes is too much for {format_rate(self.rate)}; lower it")

    def with_rate(self, rate: str) -> TokenBucket:
        """Return this bucket with another rate. Raises UserError."""
        return replace(self, rate=parse_rate(rate))

    def add_lines(self, device: str) -> list[str]:
        """Return the lines for `tc -batch` that put it on a device."""
        return [f"qdisc add dev {device} root handle 1: htb default 1", f"class add dev {device} {self._words()}"]

    def change_line(self, device: str) -> str:
        """Return the line for `tc -batch` that makes the bucket of a device this one."""
        return f"class change dev {device} {self._words()}"

    def _words(self) -> str:
        burst = f"burst {self.burst_bytes} cburst {self.burst_bytes}"
        return f"parent 1: classid 1:1 htb rate {self.rate}bit {burst} quantum 65536"
