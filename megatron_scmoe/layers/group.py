"""How one group runs. This is the file to read: ``GroupBlock.forward`` shows the whole data flow.

A group is ``moe_every`` consecutive blocks, the last of which carries the MoE. Its residual ops form the dense
stream; for two blocks and position pos2 (ScMoE, arXiv 2404.05019, section 3)::

                          tap                                                                  output
    dense stream   attention | MLP ---------- attention -------- shared expert ---------------- + -->
    routed experts           | route, dispatch ~~~~~~~> experts, combine ~~~~~~~~~~~~~~~~~~~~~> |

Nothing in the dense stream waits for the routed experts, so what is drawn with ~ is hidden behind it, and in backward,
where everything runs mirrored, again.

In the module tree the blocks stay Core's own numbered layers, with the parameter names and checkpoint keys of the stock
model. Only who runs them changes: the leading blocks of a group pass their input through, the last one runs them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_scmoe.codec.maker import CargoMaker, residual_map_of
from megatron_scmoe.config import Combine, ScMoEConfig, Shortcut
from megatron_scmoe.contracts import DenseOp, GroupShape, Plan, RoutedCall
from megatron_scmoe.dispatch.exchange import Tag
from megatron_scmoe.dispatch.flights import Flights
from megatron_scmoe.layers.gating import CoefficientGate
from megatron_scmoe.layers.router import Routing, ZeroRouting
from megatron_scmoe.mcore import blocks
from megatron_scmoe.overlap.observe import BEGIN, END, Marker
from megatron_scmoe.overlap.plan import ATTENTION, CURRENT, MLP, ROUTE, SHARED_EXPERT, TAIL

_PACKED = "packed sequences do not reach the routers of a group: call the model without packed_seq_params"


def _block_ops(block: TransformerLayer) -> list[DenseOp]:
    return [
        DenseOp(ATTENTION, partial(blocks.attention_norm, block), partial(blocks.attention_residual, block)),
        DenseOp(MLP, partial(blocks.mlp_norm, block), partial(blocks.mlp_residual, block)),
    ]


class LeadingBlock(TransformerLayer):
    """A block of a group before its last one: owns its parameters, and leaves running them to the last one."""

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """Return the input as it is."""
        return hidden_states, context


class GroupBlock(TransformerLayer):
    """The last block of a group: carries the MoE and runs the whole group.

    Args:
        scmoe: the architecture and the overlap. The other arguments are those of Core's layer.
    """

    def __init__(self, config: TransformerConfig, *args: Any, scmoe: ScMoEConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.scmoe = scmoe
        self.group_index = (self.layer_number - 1) // scmoe.moe_every
        self.shape = GroupShape(
            tap=scmoe.tap(self.group_index),
            num_dense_ops=scmoe.num_dense_ops,
            second_gate=scmoe.shortcut is Shortcut.DGMOE,
        )
        self.plan = self.forward_plan = scmoe.plan(self.group_index)
        self._marker = Marker(self.group_index)
        self.residual_map = residual_map_of(scmoe, config, self.group_index)
        self.cargo_maker = CargoMaker(scmoe, config.hidden_size, self.group_index, self.residual_map)
        if scmoe.shortcut_combine is Combine.CG2:
            self.combine_gate = CoefficientGate(config)
        self._dense_ops: tuple[DenseOp, ...] = ()
        self._moe_holder = (self.mlp,)  # in a tuple, so that a borrowed MoE stays its owner's alone
        if isinstance(self.mlp, MoELayer):
            blocks.let_experts_run_repeatedly(self.mlp)

    @property
    def moe(self) -> MoELayer:
        """The MoE that serves this group: its own, or that of the group it shares one with."""
        return self._moe_holder[0]

    def link(self, leading: Sequence[LeadingBlock], preceding: GroupBlock | None) -> None:
        """Take the ``moe_every - 1`` blocks before this one into the group; the model builder calls it once.

        Args:
            leading: those blocks. They are held in a tuple of functions, which ``torch.nn.Module`` does not search for
                parameters: each block owns its own.
            preceding: the group before this one, whose MoE it uses where groups share one.
        """
        assert len(leading) == self.scmoe.moe_every - 1
        if self.scmoe.borrows_moe(self.group_index):
            assert preceding is not None
            self._moe_holder = preceding._moe_holder
        ops = [op for block in (*leading, self) for op in _block_ops(block)]
        # In the MoE's own block the shared expert stands where the dense MLP would; its residual is added at the end.
        shared_expert = DenseOp(SHARED_EXPERT, ops[-1].norm, partial(blocks.shared_expert, self))
        self._dense_ops = (*ops[:-1], shared_expert)[: self.scmoe.num_dense_ops]

    @property
    def dense_op_names(self) -> list[str]:
        """Names of the dense stream's ops in order, the shared expert last."""
        return [op.name for op in self._dense_ops]

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: None = None,
        **attention_inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the group on ``hidden_states`` [s, b, h]; returns its output, [s, b, h], and ``context`` as it is.

        Raises:
            ValueError: for packed sequences, whose boundaries the routers of a group do not see.
        """
        if packed_seq_params is not None:
            raise ValueError(_PACKED)
        inputs = blocks.AttentionInputs(**attention_inputs)
        padding_mask = blocks.sequence_first(padding_mask)
        plan, tap = self.plan if self.training else self.forward_plan, self.shape.tap
        begin, begin_backward = self._marker.now, self._marker.in_backward
        begin(BEGIN)
        begin_backward(END, hidden_states)

        for index, op in enumerate(self._dense_ops):
            residual = hidden_states
            if index == tap:
                begin(ROUTE)
                normed = op.norm(residual)
                routing = self.moe.router(normed, padding_mask)
                flights = self._take_off(normed, routing, plan)
            if index >= tap:
                flights.run_experts(slot=index - tap + 1)
            begin(op.name, index)
            if index != tap:
                normed = op.norm(residual)
            hidden_states = op.run(residual, normed, inputs)
            begin_backward(op.name, hidden_states, index)

        if self.shape.second_gate:
            residual = hidden_states
            routed = self._run_second_gate(residual, flights, routing, padding_mask, plan)
        else:
            flights.run_experts(slot=self.shape.num_slots)
            routed = self._combine(normed, hidden_states, flights.finish_combine())
        begin(TAIL)
        output = blocks.add_mlp_output(self, residual, (routed, None))
        begin_backward(TAIL, output)
        begin(END)
        return output, context

    def _take_off(self, source: Tensor, routing: tuple[Tensor, ...], plan: Plan, prefix: str = "") -> RoutedCall:
        probs, routing_map = routing[:2]
        self._marker.in_backward(prefix + ROUTE, probs)
        at_home = routing.at_home(source) if isinstance(routing, ZeroRouting) else None
        self._marker.load(probs, routing_map, self.moe.router.topk if at_home is None else None)
        tag = Tag(self._marker, prefix=prefix)
        cargo = self.cargo_maker.cargo(self.moe, source, probs, routing_map, chunks=plan.chunks, tag=tag)
        return Flights(self.moe, cargo, plan=plan, tag=tag, at_home=at_home)

    def _run_second_gate(
        self,
        residual: Tensor,
        preceding: RoutedCall,
        routing: Routing,
        padding_mask: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        """End of a DGMoE group: the current layer's tokens fly as well; the sum of both flights' outputs."""
        self._marker.now(CURRENT + ROUTE)
        normed = blocks.mlp_norm(self, residual)
        current_routing = self.moe.router(normed, padding_mask, preceding=routing)
        current = self._take_off(normed, current_routing, plan, CURRENT)
        preceding.run_experts(slot=self.shape.num_slots)
        current.run_experts()
        return preceding.finish_combine() + current.finish_combine()

    def _combine(self, shared_input: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        if self.scmoe.shortcut_combine is Combine.CG2:
            return self.combine_gate(shared_input, shared, routed)
        return routed + shared  # cg1's gate is inside Core's shared expert
