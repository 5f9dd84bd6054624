"""The flights of one routing's tokens to their experts and back, one for each token chunk.

The stages of a flight are those of Core's token dispatcher, and its own code runs them on a copy of it, one for each
flight (Core's keeps its state on itself, so one object cannot carry two). Only the two stages that communicate are
ours: they are split in a start and a finish (``exchange.py``), so that other things run in between.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe import mcore
from megatron_scmoe.exchange import Exchange, ExchangeOrderError, Rows, Tag
from megatron_scmoe.observe import Marker
from megatron_scmoe.plan import DECODE, ENCODE, EXPERTS, Plan


class Flight:
    """One chunk of tokens on its way to the experts and back.

    Args:
        moe: the layer whose router decided and whose experts run.
        probs: gate weights of this chunk's tokens, [n, experts].
        routing_map: which expert gets which token, bool, [n, experts]. The counts of all ranks are exchanged here.
        plan: blocking or not, and how many chunks there are; where the experts run is the caller's business.
        tag: whose flight it is; its name is replaced.
    """

    def __init__(self, moe: MoELayer, probs: Tensor, routing_map: Tensor, plan: Plan, tag: Tag) -> None:
        self._moe = moe
        self._probs = probs
        self._routing_map = routing_map
        self._tag = tag
        self._blocking = plan.blocking
        self._dispatcher = mcore.dispatcher_for_one_flight(moe, routing_map, one_of_many=plan.chunks > 1)
        self._exchange: Exchange | None = None
        self._token: Tensor | None = None

    def start_dispatch(self, hidden_states: Tensor) -> None:
        """Permute the tokens by expert and send them off.

        Args:
            hidden_states: what the experts read, [..., h], n tokens in the order of the gate weights.
        """
        self._begin(ENCODE)
        dispatcher = self._dispatcher
        tokens, token_probs = dispatcher.dispatch_preprocess(hidden_states, self._routing_map, self._probs)
        self._tag.marker.in_backward(self._tag.prefix + ENCODE, tokens, self._tag.chunk)
        send_rows, receive_rows = mcore.split_rows(dispatcher)
        self._start("dispatch", (tokens, token_probs), send_rows, receive_rows)

    def run_experts(self) -> None:
        """Wait for the tokens of this rank's experts, run these, and send their outputs back."""
        tokens, tokens_per_expert, token_probs = self._dispatcher.dispatch_postprocess(*self._finish())
        self._begin(EXPERTS)
        output, bias = self._moe.experts(tokens, tokens_per_expert, token_probs)
        assert bias is None  # refused: experts with a bias of their own
        output = self._dispatcher.combine_preprocess(output)
        self._tag.marker.in_backward(self._tag.prefix + EXPERTS, output, self._tag.chunk)
        receive_rows, send_rows = mcore.split_rows(self._dispatcher)
        self._start("combine", (output,), send_rows, receive_rows)

    def finish_combine(self) -> Tensor:
        """Wait for the outputs and put them in token order, [..., h]: the sum over each token's experts."""
        (tokens,) = self._finish()
        self._begin(DECODE)
        output = self._dispatcher.combine_postprocess(tokens)
        self._tag.marker.in_backward(self._tag.prefix + DECODE, output, self._tag.chunk)
        return output

    def _begin(self, step: str) -> None:
        self._tag.marker.now(self._tag.prefix + step, self._tag.chunk)

    def _start(self, name: str, tensors: tuple[Tensor, ...], send_rows: Rows, receive_rows: Rows) -> None:
        if self._exchange is not None:
            raise ExchangeOrderError(f"{name} starts while this flight's last exchange is not finished")
        self._exchange = Exchange(
            tag=self._tag._replace(name=name),
            group=self._moe.ep_group,
            send_rows=send_rows,
            receive_rows=receive_rows,
            blocking=self._blocking,
        )
        self._token = self._exchange.start(*tensors)

    def _finish(self) -> tuple[Tensor, ...]:
        if self._exchange is None or self._token is None:
            raise ExchangeOrderError("a flight's exchange is finished before it was started")
        exchange, token = self._exchange, self._token
        self._exchange = self._token = None
        return exchange.finish(token)


class Flights:
    """All tokens of one routing, in the chunks of a plan; they take off when this is made.

    Routing, and capacity with it, precede the cut into chunks, so the number of chunks changes rounding only.

    Args:
        moe: the layer whose router decided and whose experts run.
        hidden_states: what the experts read, [s, b, h].
        probs: gate weights, [s b, experts].
        routing_map: which expert gets which token, bool, [s b, experts].
        plan: chunks, the slots of their experts, and whether collectives are waited for where they start.
        marker: of the group.
        prefix: whose flights they are, where a layer has several.
    """

    def __init__(
        self,
        moe: MoELayer,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        plan: Plan,
        marker: Marker,
        prefix: str = "",
    ) -> None:
        self._plan = plan
        self._shape = hidden_states.shape
        if plan.chunks == 1:
            parts = [(hidden_states, probs, routing_map)]
        else:
            rows = hidden_states.view(-1, hidden_states.shape[-1])
            parts = list(zip(*(x.tensor_split(plan.chunks) for x in (rows, probs, routing_map)), strict=True))
        # The counts of every chunk are exchanged before the first payload flies, behind which they would queue.
        self._flights = [
            Flight(moe, part_probs, part_map, plan, Tag(marker, "", prefix, chunk))
            for chunk, (_, part_probs, part_map) in enumerate(parts)
        ]
        for flight, (tokens, _, _) in zip(self._flights, parts, strict=True):
            flight.start_dispatch(tokens)

    def run_experts(self, slot: int | None = None) -> None:
        """Run the experts of the chunks whose slot this is; of all chunks for None."""
        for chunk in range(self._plan.chunks) if slot is None else self._plan.chunks_at(slot):
            self._flights[chunk].run_experts()

    def finish_combine(self) -> Tensor:
        """Wait for the outputs of every chunk; [s, b, h]."""
        outputs = [flight.finish_combine() for flight in self._flights]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs).view(self._shape)
