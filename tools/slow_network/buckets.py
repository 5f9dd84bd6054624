"""Rates, sizes and times as people write them, and the token bucket (`tc tbf`) that they make."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_RATES = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SIZES = {"b": 1, "kb": 1 << 10, "mb": 1 << 20}  # as in tc, where kb is 1024 bytes
_TIMES_US = {"us": 1, "ms": 10**3, "s": 10**6}
_LOWEST_RATE, _HIGHEST_RATE = 64_000, 100 * 10**9
_LEAST_BURST = 2 << 10  # bytes; the kernel drops every packet that is larger than the bucket
_TICKS_PER_S = 15_625_000  # the kernel holds the time that a full bucket lasts in 32 bits of these
UNLIMITED = "unlimited"


class UserError(Exception):
    """Something that who started the tool can mend; the message is one line and says how."""


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
    """What tbf does to one end of a link; a rate of None leaves it out.

    An idle link saves up `burst_bytes` that then pass at full speed, and what would wait longer than `latency_us` is
    dropped (TCP sends it again).
    """

    rate: int | None
    burst_bytes: int
    latency_us: int

    @classmethod
    def parse(cls, rate: str, burst: str, latency: str) -> TokenBucket:
        """Return the bucket of three texts. Raises UserError."""
        size = f"burst {burst[:40]!a} is not understood; write a number and b, kb or mb, such as 256kb"
        time = f"latency {latency[:40]!a} is not understood; write a number and us, ms or s, such as 50ms"
        return cls(parse_rate(rate), _quantity(burst, _SIZES, size), _quantity(latency, _TIMES_US, time))

    def __post_init__(self) -> None:
        if self.burst_bytes < _LEAST_BURST:
            raise UserError(f"burst of {self.burst_bytes} bytes holds no whole packet; give at least 2kb")
        if self.latency_us < 1:
            raise UserError("latency of 0 leaves no queue; give at least 1us, such as 50ms")
        if self.rate is None:
            return
        if self.burst_bytes * 8 * _TICKS_PER_S >= self.rate << 32:
            raise UserError(f"burst of {self.burst_bytes} bytes is too much for {format_rate(self.rate)}; lower it")
        if self.rate * self.latency_us // 8_000_000 + self.burst_bytes >= 1 << 32:
            words = f"latency of {self.latency_us} us at {format_rate(self.rate)} with a burst of {self.burst_bytes}"
            raise UserError(f"{words} bytes is a queue of 4 GiB or more; lower one of them")

    def with_rate(self, rate: str) -> TokenBucket:
        """Return this bucket with another rate. Raises UserError."""
        return replace(self, rate=parse_rate(rate))

    def words(self) -> str:
        """Return the words that `tc qdisc add` and `tc qdisc change` take for it."""
        return f"tbf rate {self.rate}bit burst {self.burst_bytes} latency {self.latency_us}us"
