"""How one span runs. This is the file to read: ``GroupSpan.run`` shows the whole data flow.

A span is one group of blocks, or ``--shortcut-span`` neighbouring ones: a list of ops, and a list of routed calls.
Each call reads the normed input of the op at its tap; for one group of two blocks and position pos2 (ScMoE, arXiv
2404.05019, section 3)::

                          tap                                                            landing
    dense ops      attention | MLP ---------- attention -------- shared expert --------------- add -->
    routed call              | route, dispatch ~~~~~~~> experts, combine ~~~~~~~~~~~~~~~~~~~~~> |

No op between tap and landing waits for the routed experts, so what is drawn with ~ is hidden behind them, and in
backward, where everything runs mirrored, again. In a span of several groups, ``--shortcut-landing K`` moves the landing
of every group but the last behind the K-th op of the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.codec.maker import CargoMaker
from megatron_scmoe.config import Group, ScMoEConfig
from megatron_scmoe.contracts import DenseOp, Flying, Launch, Plan, Stream
from megatron_scmoe.dispatch.exchange import Tag
from megatron_scmoe.dispatch.flights import Flights
from megatron_scmoe.layers.router import ZeroRouting
from megatron_scmoe.mcore import blocks
from megatron_scmoe.overlap.observe import BEGIN, END, Marker
from megatron_scmoe.overlap.plan import CORE_ATTENTION, ROUTE


class Member(Protocol):
    """What a span asks of a group (``layers/group.py``).

    Attributes:
        group: its layers.
        group_index: over the whole model.
        ops: in order, the group's end last.
        cargo_maker: of what its calls carry.
    """

    group: Group
    group_index: int
    ops: tuple[DenseOp, ...]
    cargo_maker: CargoMaker

    @property
    def moe(self) -> MoELayer:
        """The MoE that serves the group, its own or a shared one."""

    def read(self, op: DenseOp, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """What routed experts of the group read at ``op``, [s, b, h], and what the op reads; None if not known yet."""

    def land(self, stream: Stream, routed: Sequence[Tensor]) -> Stream:
        """Add outputs of the group's calls that land behind its end."""


class GroupSpan:
    """The ops and routed calls of neighbouring groups, and the plan by which they run.

    Args:
        groups: that it consists of, in order, each linked to its blocks.
        scmoe: their settings.

    Attributes:
        group_index: of its first group, over the whole model; it names the span in plans and reports.
        shape: what a plan has to know.
        plan: by which a training step runs.
        forward_plan: by which an evaluation runs.
        first_plan: before anything was measured.
    """

    def __init__(self, groups: Sequence[Member], scmoe: ScMoEConfig) -> None:
        self._groups = tuple(groups)
        self._ops = tuple(op for group in groups for op in group.ops)
        self.group_index = groups[0].group_index
        sizes = [group.group.num_ops for group in groups]
        self.shape = replace(
            scmoe.span_shape(self.group_index, sizes),
            waits_to_pack=any(group.cargo_maker.waits_to_pack for group in groups),
            attentions=frozenset(place for place, op in enumerate(self._ops) if op.cut is not None),
        )
        assert self.shape.num_ops == len(self._ops)
        self._cut = self.shape.cut
        self.plan = self.forward_plan = self.first_plan = scmoe.plan(self.group_index, sizes)
        self._marker = Marker(self.group_index)

    @property
    def op_names(self) -> list[str]:
        """Names of the ops in order."""
        return [op.name for op in self._ops]

    def run(self, hidden_states: Tensor, inputs: Any, padding_mask: Tensor | None, plan: Plan) -> Tensor:
        """Run the span on ``hidden_states`` [s, b, h]; returns its output, [s, b, h].

        Args:
            hidden_states: the residual stream.
            inputs: what Core hands to every block beside it (``mcore.blocks.AttentionInputs``).
            padding_mask: True where a token is padding, [s, b]; of packed samples as routers read them.
            plan: where the experts run, and dispatches are launched.
        """
        shape, begin, begin_backward = self.shape, self._marker.now, self._marker.in_backward
        aside = shape.launched_aside(plan.launch)
        flying: dict[int, Flying] = {}
        routings: dict[int, tuple[Any, ...]] = {}  # of each group's calls: a second gate is told of the first one
        begin(BEGIN)
        begin_backward(END, hidden_states)
        stream = Stream(hidden_states)

        for place, op in enumerate(self._ops):
            if late := shape.landing_before(place):
                stream = self._land(stream, {number: flying.pop(number) for number in late}, place)
            normed = None
            for number in shape.tapped_at(place):
                begin(ROUTE, call=number)
                source, normed = self._groups[shape.calls[number].group].read(op, stream)
                source = blocks.by_sample(source, inputs.packed_seq_params)
                flying[number] = self._take_off(number, source, routings, padding_mask, plan, aside=number in aside)
            for number, tokens in flying.items():
                tokens.run_experts(slot=place - shape.calls[number].tap + 1)
            if landing := shape.landing_in(place):
                stream = stream._replace(routed=_arrived(stream, [flying.pop(number) for number in landing]))
            begin(op.name, place)
            if normed is None and op.norm is not None:
                normed = op.norm(stream)
            announced = [flying[number] for number in aside.intersection(shape.tapped_at(place))]
            stream = self._run(place, stream, normed, inputs, announced=announced, launch=plan.launch)
            if place == shape.num_ops - 1:
                begin_backward(BEGIN, stream.hidden)
            begin_backward(op.name, stream.newest, place)

        begin(END)
        return stream.hidden

    def _take_off(
        self,
        number: int,
        source: Tensor,
        routings: dict[int, tuple[Any, ...]],
        padding_mask: Tensor | None,
        plan: Plan,
        *,
        aside: bool,
    ) -> Flying:
        """Route what the experts of call ``number`` read, [s, b, h], and send it off, or announce it."""
        part = self.shape.calls[number].group
        group, marker, slots = self._groups[part], self._marker, plan.slots[number]
        moe, before = group.moe, routings.get(part, ())
        routing = moe.router(source, padding_mask, *before)
        routings[part] = (*before, routing)
        probs, routing_map = routing[:2]
        marker.in_backward(ROUTE, probs, call=number)
        at_home = routing.at_home(source) if isinstance(routing, ZeroRouting) else None
        marker.load(probs, routing_map, moe.router.topk if at_home is None else None, part=part)
        tag = Tag(marker, call=number)
        cargo = group.cargo_maker.cargo(moe, source, probs, routing_map, chunks=len(slots), tag=tag)
        return Flights(moe, cargo, slots=slots, blocking=plan.blocking, aside=aside, tag=tag, at_home=at_home)

    def _run(
        self,
        place: int,
        stream: Stream,
        normed: Tensor | None,
        inputs: Any,
        *,
        announced: Sequence[Flying],
        launch: Launch,
    ) -> Stream:
        """Run op ``place``, and launch what was announced before it, at its core attention or behind it."""
        op = self._ops[place]

        def at_core() -> None:
            if launch is Launch.WITHIN:
                _launch(announced)
            self._marker.now(CORE_ATTENTION, place)

        with op.cut(at_core) if op.cut is not None and place in self._cut else nullcontext():
            stream = op.run(stream, normed, inputs)
        if launch is Launch.BEHIND:
            _launch(announced)
        return stream

    def _land(self, stream: Stream, landing: dict[int, Flying], place: int) -> Stream:
        """Add what lands before op ``place``, behind the end of its group."""
        calls = self.shape.calls
        for number, tokens in landing.items():
            tokens.run_experts(slot=place - calls[number].tap + 1)
        (part,) = {calls[number].group for number in landing}
        return self._groups[part].land(stream, _arrived(stream, landing.values()))


def _launch(announced: Iterable[Flying]) -> None:
    for tokens in announced:
        tokens.launch()


def _arrived(stream: Stream, landing: Iterable[Flying]) -> tuple[Tensor, ...]:
    """What routed calls bring back, each as the residual stream lies."""
    return tuple(blocks.as_stream(tokens.finish_combine(), stream.hidden) for tokens in landing)
