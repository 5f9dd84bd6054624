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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_scmoe import mcore, observe
from megatron_scmoe.config import Combine, Overlap, ScMoEConfig, Shortcut
from megatron_scmoe.dispatch import Flight
from megatron_scmoe.gating import CoefficientGate
from megatron_scmoe.plan import CURRENT, Plan
from megatron_scmoe.router import Routing

ATTENTION = "attention"
MLP = "MLP"
SHARED_EXPERT = "shared expert"


@dataclass(frozen=True, slots=True)
class DenseOp:
    """One residual op of the dense stream: ``run(hidden, norm(hidden), inputs)`` is the next hidden state."""

    name: str
    norm: Callable[[Tensor], Tensor]
    run: Callable[[Tensor, Tensor, mcore.AttentionInputs], Tensor]


def _block_ops(block: TransformerLayer) -> list[DenseOp]:
    return [
        DenseOp(ATTENTION, partial(mcore.attention_norm, block), partial(mcore.attention_residual, block)),
        DenseOp(MLP, partial(mcore.mlp_norm, block), partial(mcore.mlp_residual, block)),
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
        self._group_index = (self.layer_number - 1) // scmoe.moe_every
        self.tap = scmoe.tap(self._group_index)
        self.plan = Plan(slot=1, blocking=True)
        if scmoe.overlap is Overlap.FIXED:
            self.plan = Plan(slot=scmoe.slot(self._group_index), blocking=False)
        if scmoe.shortcut_combine is Combine.CG2:
            self.combine_gate = CoefficientGate(config)
        self._dense_ops: tuple[DenseOp, ...] = ()
        self._moe_holder = (self.mlp,)  # in a tuple, so that a borrowed MoE stays its owner's alone

    @property
    def expert_index(self) -> int:
        """Index in the dense stream of the op before which the experts run; its length where they run behind all."""
        return self.tap + self.plan.slot - 1

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
        if self.scmoe.borrows_moe(self._group_index):
            assert preceding is not None
            self._moe_holder = preceding._moe_holder
        ops = [op for block in (*leading, self) for op in _block_ops(block)]
        # In the MoE's own block the shared expert stands where the dense MLP would; its residual is added at the end.
        shared_expert = DenseOp(SHARED_EXPERT, ops[-1].norm, partial(mcore.shared_expert, self))
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
            raise ValueError("packed sequences do not reach the routers of a group: train without packing")
        inputs = mcore.AttentionInputs(**attention_inputs)
        padding_mask = mcore.sequence_first(padding_mask)
        residual = hidden_states

        for index, op in enumerate(self._dense_ops):
            residual = hidden_states
            normed = op.norm(residual)
            if index == self.tap:
                routing = self.moe.router(normed, padding_mask)
                flight = Flight(self.moe, self.plan)
                flight.start_dispatch(normed, routing[0], routing[1])
            if index == self.expert_index:
                _run_experts(flight)
            observe.mark(op.name)
            hidden_states = op.run(residual, normed, inputs)

        if self.scmoe.shortcut is Shortcut.DGMOE:
            return self._add_second_gate(hidden_states, flight, routing, padding_mask), context
        if self.expert_index == len(self._dense_ops):
            _run_experts(flight)
        shared, routed = hidden_states, flight.finish_combine()
        combined = self._combine(normed, shared, routed)
        return mcore.add_mlp_output(self, residual, (combined, None)), context

    def _add_second_gate(
        self, residual: Tensor, preceding: Flight, routing: Routing, padding_mask: Tensor | None
    ) -> Tensor:
        """End of a DGMoE group: the current layer's tokens fly as well, and the experts of both are added."""
        normed = mcore.mlp_norm(self, residual)
        current_routing = self.moe.router(normed, padding_mask, preceding=routing)
        current = Flight(self.moe, self.plan, CURRENT)
        current.start_dispatch(normed, current_routing.probs, current_routing.routing_map)
        if self.expert_index == len(self._dense_ops):
            _run_experts(preceding)
        _run_experts(current)
        routed = preceding.finish_combine() + current.finish_combine()
        return mcore.add_mlp_output(self, residual, (routed, None))

    def _combine(self, shared_input: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        if self.scmoe.shortcut_combine is Combine.CG2:
            return self.combine_gate(shared_input, shared, routed)
        return routed + shared  # cg1's gate is inside Core's shared expert


def _run_experts(flight: Flight) -> None:
    arrived = flight.finish_dispatch()
    output = flight.experts(*arrived)
    flight.start_combine(output)
