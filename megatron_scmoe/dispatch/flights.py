"""The flights of one routing's tokens to their experts and back, one for each token chunk.

The stages of a flight are those of Core's token dispatcher, and its own code runs them on a copy of it, one for each
flight (Core's keeps its state on itself, so one object cannot carry two). Only the two stages that communicate are
ours: they are split in a start and a finish (``exchange.py``), so that other things run in between. What travels is
the cargo's business (``contracts.py``).
"""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.contracts import Cargo, Form, TransferName
from megatron_scmoe.dispatch.exchange import Exchange, ExchangeOrderError, Tag
from megatron_scmoe.overlap.plan import DECODE, ENCODE, EXPERTS, WAIT


class Flight:
    """One chunk of tokens on its way to the experts and back.

    Args:
        moe: the layer whose experts run.
        cargo: what flies, of which this flight has the chunk of its tag.
        blocking: wait for each exchange where it starts.
        aside: the dispatch is launched later than it is announced, and waits for nothing that was enqueued since.
        tag: whose flight it is, and which chunk; its name is replaced.
    """

    def __init__(self, moe: MoELayer, cargo: Cargo, tag: Tag, *, blocking: bool, aside: bool) -> None:
        self._moe = moe
        self._cargo = cargo
        self._dispatcher = cargo.dispatchers[tag.chunk]
        self._tag = tag
        self._blocking, self._aside = blocking, aside
        self._exchange: Exchange | None = None
        self._token: Tensor | None = None

    def announce_dispatch(self) -> None:
        """Pack the cargo; unless it has to know the counts for that, the host waits for nothing."""
        self._begin(ENCODE)
        packed = self._cargo.pack(self._tag.chunk)
        self._begins_backward(ENCODE, packed[0])
        self._announce("dispatch", packed, aside=self._aside)

    def launch_dispatch(self) -> None:
        """Send the cargo off; the host waits for the counts of all chunks before the first one."""
        if self._tag.chunk == 0:
            self._begin(WAIT)
        send_rows, receive_rows = self._cargo.counts.split_rows(self._tag.chunk)
        self._flying.launch(send_rows, receive_rows)

    def run_experts(self) -> None:
        """Wait for the rows of this rank's experts, run these, and send their outputs back."""
        arrived = self._cargo.unpack(self._finish())
        self._cargo.counts.tell(self._dispatcher, self._tag.chunk)
        rows, rows_per_expert, weights = self._dispatcher.dispatch_postprocess(*arrived)
        self._begin(EXPERTS)
        output, bias = self._moe.experts(rows, rows_per_expert, weights)
        assert bias is None  # refused: experts with a bias of their own
        output = self._dispatcher.combine_preprocess(output)
        self._begins_backward(EXPERTS, output)
        receive_rows, send_rows = self._cargo.counts.split_rows(self._tag.chunk)
        self._announce("combine", (output,), aside=False)
        self._flying.launch(send_rows, receive_rows)

    def finish_combine(self) -> Tensor:
        """Wait for the outputs of this chunk; returns what the cargo delivers of them."""
        (outputs,) = self._finish()
        self._begin(DECODE)
        output = self._cargo.deliver(self._tag.chunk, outputs)
        self._begins_backward(DECODE, output)
        return output

    def _begin(self, step: str) -> None:
        self._tag.marker.now(step, self._tag.chunk, call=self._tag.call)

    def _begins_backward(self, step: str, output: Tensor) -> None:
        self._tag.marker.in_backward(step, output, self._tag.chunk, call=self._tag.call)

    def _announce(self, name: str, tensors: tuple[Tensor, ...], *, aside: bool) -> None:
        if self._exchange is not None:
            raise ExchangeOrderError(f"{name} starts while this flight's last exchange is not finished")
        self._exchange = Exchange(
            tag=self._tag._replace(name=name),
            group=self._moe.ep_group,
            blocking=self._blocking,
            apart=self._cargo.apart,
            aside=aside,
            forms=self._forms_of(name),
        )
        self._token = self._exchange.announce(*tensors)

    def _forms_of(self, name: str) -> tuple[Form | None, Form | None]:
        forms = self._cargo.forms
        forward, backward = (TransferName.of(name, backward=backward) for backward in (False, True))
        return forms.get(forward), forms.get(backward)

    @property
    def _flying(self) -> Exchange:
        if self._exchange is None:
            raise ExchangeOrderError("a flight's exchange is launched or finished before it was announced")
        return self._exchange

    def _finish(self) -> tuple[Tensor, ...]:
        exchange, token = self._flying, self._token
        assert token is not None  # an exchange was announced
        self._exchange = self._token = None
        return exchange.finish(token)


class Flights:
    """All tokens of one routing, in the chunks of a plan; they are announced when this is made.

    Routing, and capacity with it, precede the cut into chunks, so the number of chunks changes rounding only.

    Args:
        moe: the layer whose router decided and whose experts run.
        cargo: of all tokens.
        slots: of each chunk's experts.
        blocking: wait for every collective where it starts.
        aside: they take off when ``launch`` is called; else at once, each as soon as it is packed.
        tag: whose flights they are; its name and chunk are replaced.
        at_home: what zero experts made of the tokens, which did not travel, [s, b, h]; None where there are none.
    """

    def __init__(
        self,
        moe: MoELayer,
        cargo: Cargo,
        *,
        slots: tuple[int, ...],
        blocking: bool,
        aside: bool,
        tag: Tag,
        at_home: Tensor | None = None,
    ) -> None:
        self._slots, self._cargo, self._at_home = slots, cargo, at_home
        self._flights = [
            Flight(moe, cargo, tag._replace(chunk=chunk), blocking=blocking, aside=aside) for chunk in range(len(slots))
        ]
        for flight in self._flights:
            flight.announce_dispatch()
            if not aside:
                flight.launch_dispatch()

    def launch(self) -> None:
        """Send off what was only announced: by now the host has enqueued the op at the tap, or its projections."""
        for flight in self._flights:
            flight.launch_dispatch()

    def run_experts(self, slot: int) -> None:
        """Run the experts of the chunks whose slot this is."""
        for flight, its_slot in zip(self._flights, self._slots, strict=True):
            if its_slot == slot:
                flight.run_experts()

    def finish_combine(self) -> Tensor:
        """Wait for the outputs of every chunk; [s, b, h]."""
        routed = self._cargo.join([flight.finish_combine() for flight in self._flights])
        return routed if self._at_home is None else routed + self._at_home
