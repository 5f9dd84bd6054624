"""The stock MoE layer with its tokens in chunks: while one chunk computes, another one travels (Tutel, MLSys 2023).

It has no shortcut, so its dense stream is what does not wait for the routed experts inside the layer: the shared
expert, where there is one. The honest baseline of every measurement; ``--shortcut none --overlap-chunks 2`` trains it.
With ``--a2a-unique`` tokens travel once to a rank; with ``--a2a-codec lsh`` it is the layer of the LSH-MoE paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.codec.maker import CargoMaker, residual_map_of
from megatron_scmoe.config import Overlap, ScMoEConfig
from megatron_scmoe.contracts import Plan, RoutedCall, SpanShape
from megatron_scmoe.dispatch.exchange import Tag
from megatron_scmoe.dispatch.flights import Flights
from megatron_scmoe.mcore import blocks
from megatron_scmoe.mcore.padding import mask_of_rank
from megatron_scmoe.overlap.observe import BEGIN, END, Marker
from megatron_scmoe.overlap.plan import ADD, ROUTE, SHARED_EXPERT


class PipelinedMoELayer(MoELayer):
    """Core's MoE layer, its parameters and its numbers (rounding apart, and the codec), in starts and finishes.

    Args:
        scmoe: chunks, overlap and codec. The other arguments are those of Core's layer.
    """

    def __init__(self, *args: Any, scmoe: ScMoEConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end = int(self.use_shared_expert)  # the only op before it
        self._call = RoutedCall(tap=0, landing=end)
        self.shape = SpanShape(num_ops=end + 1, calls=(self._call,))
        # The shared expert runs while the first chunk travels to its experts.
        chunks = scmoe.overlap_chunks if scmoe.overlap is Overlap.FIXED else 1
        slots = (self._call.num_slots,) * chunks
        self.plan = self.forward_plan = self.first_plan = Plan((slots,), blocking=scmoe.overlap is Overlap.OFF)
        self.scmoe = scmoe
        blocks.let_experts_run_repeatedly(self)

    def set_layer_number(self, layer_number: int) -> None:
        """Core calls it once, behind the constructor."""
        super().set_layer_number(layer_number)
        self.residual_map = residual_map_of(self.scmoe, self.config, self.group_index)
        self.cargo_maker = CargoMaker(self.scmoe, self.config, self.group_index, self.residual_map)
        self.cargo_maker.prepare(self)
        self.shape = replace(self.shape, waits_to_pack=self.cargo_maker.waits_to_pack)

    @property
    def group_index(self) -> int:
        """Its place among the layers of the whole model."""
        return self.layer_number - 1

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Route ``hidden_states`` [s, b, h] through the experts; returns the layer's output, [s, b, h], and no bias."""
        marker = Marker(self.group_index)
        marker.now(BEGIN)
        marker.in_backward(END, hidden_states)
        plan = self.plan if self.training else self.forward_plan
        marker.now(ROUTE, call=0)
        probs, routing_map = self.route(hidden_states, mask_of_rank(padding_mask, hidden_states, self.router))
        marker.in_backward(ROUTE, probs, call=0)
        marker.load(probs, routing_map, self.router.topk)
        tag = Tag(marker)
        cargo = self.cargo_maker.cargo(self, hidden_states, probs, routing_map, chunks=plan.chunks, tag=tag)
        aside = bool(self.shape.launched_aside(plan.launch))  # behind the shared expert: there is no attention here
        flights = Flights(self, cargo, slots=plan.slots[0], blocking=plan.blocking, aside=aside, tag=tag)
        shared = None
        if self.use_shared_expert:
            flights.run_experts(slot=1)
            marker.now(SHARED_EXPERT)
            shared = self.shared_experts_compute(hidden_states)
            if aside:
                flights.launch()
            marker.in_backward(SHARED_EXPERT, shared)
        flights.run_experts(slot=self._call.num_slots)
        routed = flights.finish_combine()
        marker.now(ADD, self._call.landing)
        # A tensor of its own in any case: what decode made has the mark of decode.
        output = routed.view_as(routed) if shared is None else routed + shared
        marker.in_backward(BEGIN, output)
        marker.in_backward(ADD, output, self._call.landing)
        marker.now(END)
        return output, None
