"""Forward and backward of one op on one rank: computation by kind of op, communication by group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from planning.hardware import Machine
from planning.kernels import Kernel, Work
from planning.ops import Ops
from planning.prediction import Wire
from planning.tensors import collectives
from planning.training import Graphs
from planning.wires import Groups, Sent
from planning.workload import Attention, Embedding, Moe, Output, Single, Workload

OUTSIDE_GRAPHS = ("permute", "experts", "shared expert")
"""Kinds that CUDA graphs in part leave to the host: their shapes follow from routing."""
RECOMPUTED = {"moe", "mlp", "shared_experts", "moe_act", "core_attn", "mla_up_proj", "layernorm"}
"""Modules whose second run forward is priced (--recompute-modules)."""
FIRST, LAST = ("first", "qkv", "up", "logits"), ("second", "proj")
"""Parts of an op that are its first and last linear layer on tensor parallel ranks."""
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

    def again(self, forward: Passes, times: float) -> None:
        """Let ``forward``, which goes forward alone, run so many times before what runs backward."""
        for name, seconds in forward.forward.items():
            self.backward[name] += seconds * times
        for wire in forward.wires.values():
            self.send(wire.times(times))

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
        self.forward = self if forward_only else Pricing(workload, machine, forward_only=True)

    @property
    def runs_again(self) -> float:
        """How often --recompute-granularity full runs layers forward again, as they ran before; a mean of all."""
        return self.training.recomputed_layers if "full" in self.training.recompute and not self.forward_only else 0.0

    def op(self, op: Single) -> Passes:
        """An op that waits for its communication, its layer's second run forward included."""
        passes = self.op_once(op)
        if not isinstance(op, Embedding | Output):
            passes.again(self.forward.op_once(op), self.runs_again)
        return passes

    def op_once(self, op: Single) -> Passes:
        """The same, where no whole layer runs again."""
        kernels = self.ops.kernels(op)
        passes = self.computing(kernels)
        idle = self._idle(kernels, passes)
        if isinstance(op, Moe):
            self._experts(op, passes)
        self._tensors(op, kernels, passes, idle)
        if isinstance(op, Attention):
            self._context(op, kernels, passes, idle)
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
        return self.training.recomputed_layers if "moe" in self.training.recompute else 0.0

    def _recomputed(self, kernel: Kernel) -> float:
        chosen, kind = self.training.recompute, kernel.kind
        again = (
            ("moe" in chosen and kind in ("router", "permute", "experts", "shared expert"))
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

    def _idle(self, kernels: Iterable[Kernel], passes: Passes) -> list[float]:
        """Seconds that the device waits for the host, forward and backward: what is sent then costs nothing."""
        busy_s = [0.0, 0.0]
        for kernel in kernels:
            busy_s[0] += kernel.forward.seconds
            busy_s[1] += kernel.backward.seconds + kernel.forward.seconds * self._recomputed(kernel)
        return [sum(passes.forward.values()) - busy_s[0], sum(passes.backward.values()) - busy_s[1]]

    def _wait(self, passes: Passes, wire: tuple[str, str], forward: Sent, backward: Sent) -> None:
        """What is sent forward and backward, all waited for."""
        group, kind = wire
        backward = backward.times(not self.forward_only)
        passes.forward[f"exposed {group}"] += forward.seconds
        passes.backward[f"exposed {group}"] += backward.seconds
        total = forward.then(backward)
        passes.wire(group, kind, total, total.seconds)

    def _hide(
        self, passes: Passes, wire: tuple[str, str], sent: Sent, beside_s: float, *, idle: list[float], way: int = 1
    ) -> None:
        """``sent`` forward (way 0) or backward, beside so many seconds of computation and what the device idles."""
        if way and self.forward_only:
            return
        exposed_s = max(0.0, sent.seconds - beside_s)
        waited_s = min(exposed_s, idle[way])
        idle[way] -= waited_s
        seconds = passes.backward if way else passes.forward
        seconds[f"exposed {wire[0]}"] += exposed_s - waited_s
        passes.wire(*wire, sent, exposed_s - waited_s)

    def _experts(self, op: Moe, passes: Passes) -> None:
        flights = self.groups.flights(op, self.ops.own_tokens, self.recomputes_experts())
        for kind, (forward, backward) in flights.items():
            self._wait(passes, ("EP", kind), forward, backward)

    def _tensors(self, op: Single, kernels: Sequence[Kernel], passes: Passes, idle: list[float]) -> None:
        own = [kernel for kernel in kernels if not isinstance(op, Moe) or kernel.kind == "shared expert"]
        first, last = ([kernel for kernel in own if kernel.part in parts] for parts in (FIRST, LAST))
        # Half of a linear layer's backward pass is for its input, half for its weights.
        beside_s = sum(kernel.backward.seconds for kernel in first) / 2
        sequence = self.training.sequence_parallel
        for one in collectives(op, self.workload.hidden, sequence_parallel=sequence):
            sent = self.groups.tensors(one.kind, self.ops.tokens, one.width)
            edge = first if one.kind == "all-gather" else last
            again = max(map(self._recomputed, edge), default=0.0) * one.forward
            self._wait(passes, ("TP", one.kind), sent.times(one.forward), sent.times(one.backward + again))
            if one.beside:
                self._hide(passes, ("TP", one.kind), sent, beside_s, idle=idle)

    def _context(self, op: Attention, kernels: Sequence[Kernel], passes: Passes, idle: list[float]) -> None:
        """Keys and values go round while scores are computed; backward with their gradients, and where scores are
        recomputed once more.
        """
        width = op.kv_heads / self.workload.layout.tp * (op.head_dim + op.rope_dim + (op.value_dim or op.head_dim))
        sent = self.groups.cp.ring(self.ops.tokens * self.workload.layout.cp * width * 2)
        core = next(kernel for kernel in kernels if kernel.part == "core")
        wire, again = ("CP", "point-to-point"), self._recomputed(core)
        self._hide(passes, wire, sent, core.forward.seconds, idle=idle, way=0)
        self._hide(passes, wire, sent.times(2), core.backward.seconds, idle=idle)
        self._hide(passes, wire, sent.times(again), core.forward.seconds * again, idle=idle)
