"""Which links and ranks are slow, from the rate of each link. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median, median_high, median_low

from doctoring.check import Finding, by_host, ok, problem
from megatron_scmoe.job.roll_call import in_words

SLOW = 0.5
"""Part of what is usual below which a link, or a group's collective, is slow."""

Link = tuple[int, int]
"""Two ranks, the lower one first."""

_FIX = "see its adapter, cable and switch port (ibstat, ethtool), what else uses it, and NCCL_SOCKET_IFNAME"


def opponent(rank: int, players: int, game: int) -> int | None:
    """Whom ``rank`` meets in a game of a round-robin tournament (circle method); None where it sits out.

    Args:
        rank: of ``players``.
        players: in all.
        game: from 0; in as many games as there are players, less one where these are even, each meets each once.
    """
    places = players + players % 2
    last = places - 1
    if rank == last:
        other = game
    else:
        other = (2 * game - rank) % last
        if other == rank:
            other = last
    return other if other < players else None


def games(players: int) -> int:
    """Of a whole tournament."""
    return players - 1 + players % 2


def usual(rates: Mapping[Link, float]) -> float:
    """The median over ranks of the median over each one's links, of two in the middle the higher one.

    It stays where one rank's links are all slow, which are half of all links of four ranks.
    """
    of_rank: dict[int, list[float]] = defaultdict(list)
    for link, rate in rates.items():
        for rank in link:
            of_rank[rank].append(rate)
    return median_high(median_high(mine) for mine in of_rank.values())


def slow(rates: Mapping[Link, float]) -> tuple[list[int], list[Link]]:
    """Ranks most of whose links are slow, and slow links between other ranks.

    Args:
        rates: of links that should be alike, in any unit.
    """
    limit = SLOW * usual(rates)
    links = [link for link, rate in rates.items() if rate < limit]
    ranks = {rank for link in rates for rank in link}
    few = [rank for rank in sorted(ranks) if 2 * _count(links, rank) > _count(rates, rank)]
    return few, [link for link in links if not set(few) & set(link)]


def _count(links: Iterable[Link], rank: int) -> int:
    return sum(rank in link for link in links)


def judged(rates: Mapping[Link, float], hosts: Sequence[str]) -> list[Finding]:
    """What there is to say of all links, in bytes a second: those inside hosts and those between them apart."""
    found = []
    inside = {link: rate for link, rate in rates.items() if hosts[link[0]] == hosts[link[1]]}
    between = {link: rate for link, rate in rates.items() if link not in inside}
    for kind, alike in (("within a host", inside), ("between hosts", between)):
        if not alike:
            continue
        ranks, links = slow(alike)
        found += _of_ranks(alike, ranks, hosts, kind)
        found += [
            problem(
                f"the link {kind} from rank {one} ({hosts[one]}) to rank {other} ({hosts[other]}) carries "
                f"{speed(alike[one, other])}, and {speed(usual(alike))} is usual",
                _FIX,
            )
            for one, other in links
        ]
        if not ranks and not links:
            least = min(alike, key=lambda link: alike[link])
            where = f"{len(alike)} link{'s' * (len(alike) > 1)} {kind}"
            alone = "" if len(alike) > 1 else "; there is none to compare it with"
            speeds = f"{speed(usual(alike))} is usual, {speed(alike[least])} the least"
            found.append(ok(f"{where}: {speeds}, from rank {least[0]} to {least[1]}{alone}"))
    return found


def _of_ranks(rates: Mapping[Link, float], ranks: Sequence[int], hosts: Sequence[str], kind: str) -> list[Finding]:
    """Slow ranks, those of a host in one line."""
    found = []
    for host, mine in by_host(hosts, ranks).items():
        own = median(rate for link, rate in rates.items() if set(mine) & set(link))
        text = f"{in_words(mine)} ({host}): most links {kind} are slow: they carry {speed(own)}, and "
        found.append(problem(f"{text}{speed(usual(rates))} is usual", _FIX))
    return found


def judged_groups(seconds: Mapping[str, Mapping[tuple[int, ...], float]], num_bytes: int) -> list[Finding]:
    """What there is to say of collectives: for each kind the seconds of each group, which are alike.

    Args:
        seconds: by kind, such as ``ep all-to-all``, of each group's ranks.
        num_bytes: that each rank had.
    """
    found = []
    for kind, of_groups in seconds.items():
        middle = median_low(of_groups.values())  # of two the faster one's
        late = {ranks: one for ranks, one in of_groups.items() if SLOW * one > middle}
        found += [
            problem(
                f"{kind} of {in_words(ranks)} takes {one * 1e3:.1f} ms, and {middle * 1e3:.1f} ms are usual",
                "see the links of these ranks",
            )
            for ranks, one in late.items()
        ]
        if not late:
            worst = max(of_groups.values())
            size = len(next(iter(of_groups)))
            text = f"{kind}: {len(of_groups)} x {size} ranks, {num_bytes >> 10} KiB each: {middle * 1e3:.1f} ms, "
            found.append(ok(f"{text}{worst * 1e3:.1f} ms at most"))
    return found


def speed(rate: float) -> str:
    """Bytes a second with a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if rate >= size:
            return f"{rate / size:.1f} {unit}/s"
    return f"{rate / 1e3:.1f} kB/s"
