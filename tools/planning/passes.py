"""Forward and backward of one op on one rank: computation by kind of op, communication by group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from planning.hardware import Machine
from planning.kernels import Kernel, Work
from planning.ops import Ops
from planning.prediction import Wire
from planning.wires import Groups, Sent
from planning.workload import Attention, Graphs, Mamba, Mlp, Moe, Single, Workload

OUTSIDE_GRAPHS = ("permute", "experts", "shared expert")
"""Kinds that CUDA graphs in part leave to the host: their shapes follow from routing."""


Seconds = defaultdict[str, float]


@dataclass(slots=True)
class Passes:
    """What a micro-batch takes of an op or a stage.

    Attributes:
        forward: seconds by name: a kind of op, or ``exposed`` and a group.
        backward: as long, recomputation included.
        wires: what is sent, by group and kind.
    """

    forward: Seconds = field(default_factory=lambda: defaultdict(float))
    backward: Seconds = field(default_factory=lambda: defaultdict(float))
    wires: dict[tuple[str, str], Wire] = field(default_factory=dict)

    def add(self, other: Passes, count: int = 1) -> None:
        """Add ``other``, so many times."""
        for mine, its in ((self.forward, other.forward), (self.backward, other.backward)):
            for name, seconds in its.items():
                mine[name] += seconds * count
        for wire in other.wires.values():
            self.send(wire.times(count))

    def send(self, wire: Wire) -> None:
        """Add a wire."""
        key = (wire.group, wire.kind)
        self.wires[key] = self.wires[key].plus(wire) if key in self.wires else wire

    def wire(self, group: str, kind: str, sent: Sent, exposed_s: float) -> None:
        """Add what was sent."""
        if sent.seconds:
            self.send(
                Wire(
                    group=group,
                    kind=kind,
                    inside=sent.inside,
                    between=sent.between,
                    seconds=sent.seconds,
                    exposed_s=exposed_s,
                )
            )


class Pricing:
    """What ops of a workload take on a machine.

    Args:
        workload: what runs.
        machine: where.
        forward_only: whether nothing runs backward.
    """

    def __init__(self, workload: Workload, machine: Machine, *, forward_only: bool = False) -> None:
        self.workload, self.training, self.forward_only = workload, workload.training, forward_only
        self.ops, self.groups = Ops(workload, machine), Groups(workload, machine)
        self._launch_s = machine.constants.launch_s

    def op(self, op: Single) -> Passes:
        """An op that waits for its communication."""
        passes = self.computing(self.ops.kernels(op))
        if isinstance(op, Moe):
            self._experts(op, passes)
        if isinstance(op, Attention | Mamba | Mlp) or (isinstance(op, Moe) and op.shared):
            self._sequence(passes)
        if isinstance(op, Attention):
            self._context(op, passes)
        return passes

    def computing(self, kernels: Iterable[Kernel]) -> Passes:
        """Kernels of one op: as long as the device takes, or the host to launch them."""
        forward: Seconds = defaultdict(float)
        backward: Seconds = defaultdict(float)
        hosts = [Work(), Work()]
        for kernel in kernels:
            again = self._recomputed(kernel)
            backwards = kernel.backward + kernel.forward.times(again)
            forward[kernel.kind] += kernel.forward.seconds
            backward[kernel.kind] += 0.0 if self.forward_only else backwards.seconds
            for number, work in enumerate((kernel.forward, backwards)):
                hosts[number] += Work(work.seconds, work.launches * self._launched(kernel.kind))
        for seconds, host in ((forward, hosts[0]), (backward, hosts[1])):
            waiting = max(1.0, host.launches * self._launch_s / host.seconds) if host.seconds else 1.0
            for kind in seconds:
                seconds[kind] *= waiting
        return Passes(forward, backward)

    def recomputes_experts(self) -> float:
        """How often their exchanges run again."""
        return self.training.recomputed_layers if self.training.recompute & {"full", "moe"} else 0.0

    def _recomputed(self, kernel: Kernel) -> float:
        chosen, kind = self.training.recompute, kernel.kind
        again = (
            ("full" in chosen and kind not in ("embedding", "output"))
            or ("moe" in chosen and kind in ("router", "permute", "experts", "shared expert"))
            or ("mlp" in chosen and kind == "mlp")
            or ("shared_experts" in chosen and kind == "shared expert")
            or ("moe_act" in chosen and kind == "experts" and kernel.part == "act")
            or ("core_attn" in chosen and kernel.part == "core")
            or ("mla_up_proj" in chosen and kernel.part == "up")
            or ("layernorm" in chosen and kernel.part == "norm")
        )  # fmt: skip
        return self.training.recomputed_layers * again

    def _launched(self, kind: str) -> float:
        """Whether the host launches kernels of a kind one by one."""
        graphs = self.training.cuda_graphs
        return float(graphs is Graphs.NONE or (graphs is Graphs.PARTIAL and kind in OUTSIDE_GRAPHS))

    def _wait(self, passes: Passes, wire: tuple[str, str], forward: Sent, backward: Sent) -> None:
        """What is sent forward and backward, all waited for."""
        group, kind = wire
        backward = backward.times(not self.forward_only)
        passes.forward[f"exposed {group}"] += forward.seconds
        passes.backward[f"exposed {group}"] += backward.seconds
        total = forward.then(backward)
        passes.wire(group, kind, total, total.seconds)

    def _experts(self, op: Moe, passes: Passes) -> None:
        flights = self.groups.flights(op, self.ops.own_tokens, self.recomputes_experts())
        for kind, (forward, backward) in flights.items():
            self._wait(passes, ("EP", kind), forward, backward)

    def _sequence(self, passes: Passes) -> None:
        """Sequence parallelism: a gather before the op and a scatter behind it; backward gathers its input again."""
        sent = self.groups.sequence(self.ops.tokens)
        again = self.training.recomputed_layers if "full" in self.training.recompute else 0.0
        self._wait(passes, ("TP", "all-gather"), sent, sent.times(2 + again))
        self._wait(passes, ("TP", "reduce-scatter"), sent, sent.times(1 + again))

    def _context(self, op: Attention, passes: Passes) -> None:
        """Keys and values go round while scores are computed; backward their gradients, too."""
        width = op.kv_heads / self.workload.layout.tp * (op.head_dim + op.rope_dim + (op.value_dim or op.head_dim))
        sent = self.groups.cp.ring(self.ops.tokens * self.workload.layout.cp * width * 2)
        core = next(kernel for kernel in self.ops.kernels(op) if kernel.part == "core")
        for seconds, count, work in ((passes.forward, 1, core.forward), (passes.backward, 2, core.backward)):
            exposed_s = max(0.0, count * sent.seconds - work.seconds)
            if count == 1 or not self.forward_only:
                seconds["exposed CP"] += exposed_s
                passes.wire("CP", "point-to-point", sent.times(count), exposed_s)
