"""`SlowNetwork`: a network namespace per rank, veth links to a bridge, and a token bucket on both ends of each.

    rank 0: eth0 ==htb== port0 +--------+ port1 ==htb== eth0 :rank 1
                               | bridge |
    rank 2: eth0 ==htb== port2 +--------+ port3 ==htb== eth0 :rank 3

Ranks of a node share a namespace and its link; among themselves they talk through memory. The bridge and its ports live
in a namespace of their own. The machine's network sees none of it, its firewall and its
addresses do not interfere, and nothing can be left over but namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any, Self

from command_line import UserError

from slow_network import leftovers
from slow_network.buckets import TokenBucket, format_rate
from slow_network.control import VARIABLE, ControlServer

MASTER_PORT = 29500  # each rank has all ports for itself
MAX_RANKS = 128
_SLOW_START = "/proc/sys/net/ipv4/tcp_slow_start_after_idle"
_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "taskset": "util-linux"}


class NetworkError(OSError):
    """`ip` or `tc` failed on a network that was fine before, or that is gone."""


class SlowNetwork:
    """A context manager: inside it the network is there, after it nothing is, whatever happened.

    Args:
        num_ranks: How many ranks there are.
        rate: Of every link, each direction, such as "50mbit", or "unlimited".
        burst: What an idle link saves up, such as "16kb".
        num_threads: OMP_NUM_THREADS, and how many cores a rank is pinned to.
        ranks_per_node: How many ranks share a link, and say that they are a node; None: each has a link of its own,
            and all say that they are one machine. Link n has address 10.77.0.(n + 1).

    Raises UserError for bad arguments; entering it, for what the machine lacks. An owner that a signal may end turns
    it into an exception, as Python does with SIGINT; else the network stays until somebody enters another.
    """

    def __init__(
        self,
        num_ranks: int,
        rate: str,
        *,
        burst: str = "16kb",
        num_threads: int = 1,
        ranks_per_node: int | None = None,
    ):
        if not 1 <= num_ranks <= MAX_RANKS:
            raise UserError(f"{num_ranks} ranks cannot be had; choose 1 to {MAX_RANKS}")
        if num_threads < 1:
            raise UserError(f"{num_threads} threads cannot be had; choose 1 or more")
        if ranks_per_node is not None and (ranks_per_node < 1 or num_ranks % ranks_per_node):
            raise UserError(f"{num_ranks} ranks cannot lie on nodes of {ranks_per_node}; choose a divisor")
        self.num_ranks = num_ranks
        self.ranks_per_node = ranks_per_node
        self.num_threads = num_threads
        self.name = leftovers.new_name()
        self._wanted = TokenBucket.parse(rate, burst)
        self._buckets = [TokenBucket(None, self._wanted.burst_bytes)] * self.num_links
        self._bridge = f"{self.name}-bridge"
        self._spaces = [f"{self.name}-rank{link}" for link in range(self.num_links)]
        self._socket = leftovers.FOLDERS / self.name / "control"
        self._control: ControlServer | None = None
        self._lock = threading.Lock()  # the control channel and the owner may both change the rate

    def __enter__(self) -> Self:
        check_machine()
        for line in leftovers.remove_leftovers():
            print(f"slow_link: {line}", file=sys.stderr, flush=True)
        try:
            self._build()
            self._socket.parent.mkdir(mode=0o700)
            self._control = ControlServer(self._socket, self._answer)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._control is not None:
            self._control.close()
        with self._lock:
            self._control = None
            leftovers.remove(self.name, [*self._spaces, self._bridge])

    # --- what runs in it ---------------------------------------------------------------------------------------------

    def cpus(self, rank: int) -> list[int]:
        """Return the cores of a rank: as many as it has threads, the ranks one after another, round and round."""
        usable = sorted(os.sched_getaffinity(0))
        first = rank * self.num_threads
        return sorted({usable[(first + thread) % len(usable)] for thread in range(self.num_threads)})

    @property
    def num_links(self) -> int:
        """How many links there are: one for each rank, or for each node."""
        return self.num_ranks // (self.ranks_per_node or 1)

    def link_of(self, rank: int) -> int:
        """Return the number of the link that a rank has, alone or with the others of its node."""
        return rank // (self.ranks_per_node or 1)

    def address(self, rank: int) -> str:
        """Return the IP address of a rank."""
        return f"10.77.0.{self.link_of(rank) + 1}"

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables that torch.distributed and `Control` want, as torchrun sets them on a node.

        NCCL_HOSTID says which node that is, where there are several.
        """
        size = self.ranks_per_node or self.num_ranks
        node = {} if self.ranks_per_node is None else {"NCCL_HOSTID": f"{self.name}-node{self.link_of(rank)}"}
        return node | {
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank % size}",
            "WORLD_SIZE": f"{self.num_ranks}",
            "LOCAL_WORLD_SIZE": f"{size}",
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": f"{MASTER_PORT}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": f"{self.num_threads}",
            VARIABLE: str(self._socket),
        }

    def command_prefix(self, rank: int) -> list[str]:
        """Return the words that run a command in a rank's namespace, on its cores; they exec, so the pid stays."""
        cpus = ",".join(map(str, self.cpus(rank)))
        return ["ip", "netns", "exec", self._spaces[self.link_of(rank)], "taskset", "--cpu-list", cpus]

    def popen(self, rank: int, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command as a rank, in a session of its own; it and what it starts are killed with the network."""
        words, variables = [*self.command_prefix(rank), *argv], {**os.environ, **self.environment(rank)}
        return subprocess.Popen(words, env=variables, start_new_session=True, **options)

    def kill(self) -> None:
        """Kill every process in the network, at once."""
        leftovers.kill_members(self._spaces)

    # --- the links ---------------------------------------------------------------------------------------------------

    @property
    def rate(self) -> str:
        """The rate of every link; where these differ, that of each one, with commas between."""
        rates = [format_rate(bucket.rate) for bucket in self._buckets]
        return rates[0] if len(set(rates)) == 1 else ",".join(rates)

    def set_rate(self, rate: str, rank: int | None = None) -> None:
        """Give every link, or that of one rank (and its node), another rate, now; queues leave at that rate.

        Raises UserError, NetworkError.
        """
        if rank is not None and not 0 <= rank < self.num_ranks:
            raise UserError(f"there is no rank {rank}; ranks are 0 to {self.num_ranks - 1}")
        bucket = self._wanted.with_rate(rate)
        with self._lock:
            if self._control is None:
                raise NetworkError("the network is gone")
            self._shape(bucket, range(self.num_links) if rank is None else [self.link_of(rank)])

    def bytes_sent(self) -> list[int]:
        """Return how many bytes each rank, or node, has put on the wire, frame headers and repetitions included.

        The kernel hands TCP on in large pieces and counts their headers once: some 4% less than on a cable.
        """
        ports = json.loads(_run(["ip", "-json", "-statistics", "-netns", self._bridge, "link", "show"]))
        received = {port["ifname"]: port["stats64"]["rx"]["bytes"] for port in ports}
        return [received[f"port{link}"] for link in range(self.num_links)]

    def _build(self) -> None:
        for name in (self._bridge, *self._spaces):
            _run(["ip", "netns", "add", name])
        quiet = "addrgenmode none"  # no IPv6, whose greetings would be counted
        lines = ["link add bridge type bridge mcast_snooping 0", f"link set bridge {quiet} up"]
        for link, name in enumerate(self._spaces):
            lines.append(f"link add port{link} type veth peer name eth0 netns {name}")
            lines += [f"link set port{link} {quiet}", f"link set port{link} master bridge up"]
        _run(["ip", "-netns", self._bridge, "-batch", "-"], lines)
        for link, name in enumerate(self._spaces):
            address = self.address(link * (self.ranks_per_node or 1))
            lines = ["link set lo up", f"link set eth0 {quiet}", f"address add {address}/24 dev eth0"]
            _run(["ip", "-netns", name, "-batch", "-"], [*lines, "link set eth0 up"])
            # Else TCP forgets how fast it may send while a rank computes for 0.2 s, which no cluster's fabric does.
            _run(["ip", "netns", "exec", name, "sh", "-c", f"echo 0 > {_SLOW_START}"])
        self._shape(self._wanted, range(self.num_links))

    def _shape(self, bucket: TokenBucket, links: Iterable[int]) -> None:
        """Make both ends of `links` what `bucket` says."""
        links = [link for link in links if self._buckets[link].rate != bucket.rate]
        if not links:
            return

        def lines(link: int, device: str) -> list[str]:
            if bucket.rate is None:
                return [f"qdisc delete dev {device} root"]
            return bucket.add_lines(device) if self._buckets[link].rate is None else [bucket.change_line(device)]

        ports = [line for link in links for line in lines(link, f"port{link}")]
        _run(["tc", "-netns", self._bridge, "-batch", "-"], ports)
        for link in links:
            _run(["tc", "-netns", self._spaces[link], "-batch", "-"], lines(link, "eth0"))
            self._buckets[link] = bucket

    def _answer(self, request: str) -> dict[str, Any]:
        match request.split():
            case ["rate"]:
                return {"rate": self.rate}
            case ["rate", rate]:
                self.set_rate(rate)
                return {"rate": self.rate}
            case ["rate", rate, rank] if rank.isascii() and rank.isdigit() and len(rank) < 5:
                self.set_rate(rate, int(rank))
                return {"rate": self.rate}
            case ["bytes"]:
                return {"bytes_sent": self.bytes_sent()}
        known = "'rate 100mbit', 'rate 100mbit 2', 'rate' or 'bytes'"
        raise UserError(f"request {request.strip()[:40]!a} is not understood; ask {known}")


def check_machine() -> None:
    """Raise UserError if something is missing that can be seen without trying."""
    if os.geteuid() != 0:
        raise UserError("only root may make network namespaces; run it with sudo")
    for program, package in _PACKAGES.items():
        if shutil.which(program) is None:
            raise UserError(f"the program {program} is missing from PATH; install it: apt-get install {package}")


def _run(words: list[str], lines: list[str] | None = None) -> str:
    """Run `ip` or `tc`, return what it prints. Its own session keeps ^C from it. Raises UserError, NetworkError."""
    given = "\n".join(lines) + "\n" if lines else None
    result = subprocess.run(words, input=given, capture_output=True, text=True, check=False, start_new_session=True)
    if result.returncode == 0:
        return result.stdout
    problem = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
    if "kind is unknown" in problem or "RTNETLINK answers: No such file" in problem:
        raise UserError(f"the kernel has no htb qdisc ({problem}); modprobe sch_htb, or choose the rate unlimited")
    if "not permitted" in problem or "ermission denied" in problem:
        raise UserError(f"root may not make network namespaces here ({problem}); start the container with --privileged")
    if "Unknown device type" in problem or "not supported" in problem:
        raise UserError(f"the kernel lacks veth or bridge devices ({problem}); modprobe veth bridge")
    raise NetworkError(f"{' '.join(words)}: {problem}")
