"""One group in Core's module tree, and the ops and routed calls that it gives to its span.

A group is a run of Core's layers, the last of which carries the MoE: blocks of a GPT model, or layers of a hybrid one,
which are an op each. In the module tree they stay Core's own numbered layers, with the parameter names and checkpoint
keys of the stock model. Only who runs them changes: the last layer of a span runs all of it (``span.py``), the others
pass their input through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_scmoe.codec.maker import CargoMaker, residual_map_of
from megatron_scmoe.config import Combine, Group, Norms, Position, ScMoEConfig, Shortcut
from megatron_scmoe.config.groups import group_that_ends_with
from megatron_scmoe.contracts import DenseOp, Stream
from megatron_scmoe.layers.gating import CoefficientGate
from megatron_scmoe.layers.span import GroupSpan
from megatron_scmoe.mcore import blocks
from megatron_scmoe.mcore.padding import mask_of_rank
from megatron_scmoe.overlap.plan import ADD, ATTENTION, MAMBA, SHARED_EXPERT
from megatron_scmoe.overlap.plan import MLP as MLP_OP


class LeadingBlock(TransformerLayer):
    """A layer of a group before its last one: owns its parameters, and leaves running them to the last one.

    Attributes:
        in_group: whether it is in a group; behind the last MoE of a hybrid model's stage it runs by itself.
    """

    in_group = False

    def forward(
        self, hidden_states: Tensor, *args: Any, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the input as it is."""
        if self.in_group:
            return hidden_states, context
        return super().forward(hidden_states, *args, context=context, **kwargs)


class LeadingMamba(MambaLayer):
    """A Mamba layer of a hybrid model; see ``LeadingBlock``."""

    in_group = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the input as it is."""
        return hidden_states if self.in_group else super().forward(hidden_states, *args, **kwargs)


type Leading = LeadingBlock | LeadingMamba


class GroupBlock(TransformerLayer):
    """The last layer of a group: carries the MoE. That of the last group in a span runs the span.

    Args:
        scmoe: the architecture and the overlap.
        groups: of the whole model. The other arguments are those of Core's layer.

    Attributes:
        group_index: of this group, over the whole model.
        group: its layers.
        span: the span that this block runs; None where a later block runs it.
        ops: of the group, in order; ``link`` makes them.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, scmoe: ScMoEConfig, groups: Sequence[Group], **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.scmoe = scmoe
        self.group_index = group_that_ends_with(groups, self.layer_number - 1)
        self.group = groups[self.group_index]
        self.residual_map = residual_map_of(scmoe, config, self.group_index)
        self.cargo_maker = CargoMaker(scmoe, config, self.group_index, self.residual_map)
        if scmoe.shortcut_combine is Combine.CG2:
            self.combine_gate = CoefficientGate(config)
        if scmoe.shortcut_norms is Norms.UPSTREAM:
            self.shortcut_pre_mlp_layernorm = blocks.another_mlp_norm(self)
            self.shortcut_post_norm = blocks.another_mlp_norm(self)
        self.span: GroupSpan | None = None
        self.ops: tuple[DenseOp, ...] = ()
        self._moe_holder = (self.mlp,)  # in a tuple, so that a borrowed MoE stays its owner's alone
        if isinstance(self.mlp, MoELayer):
            blocks.let_experts_run_repeatedly(self.mlp)
            self.cargo_maker.prepare(self.mlp)

    @property
    def moe(self) -> MoELayer:
        """The MoE that serves this group: its own, or that of the group it shares one with."""
        return self._moe_holder[0]

    def link(self, leading: Sequence[Leading], preceding: GroupBlock | None) -> None:
        """Take the layers before this one into the group; the model builder calls it once.

        Args:
            leading: those layers. They are held in a tuple of functions, which ``torch.nn.Module`` does not search for
                parameters: each layer owns its own.
            preceding: the group before this one, whose MoE it uses where groups share one.
        """
        assert len(leading) == len(self.group.layers) - 1
        for layer in leading:
            layer.in_group = True
        if self.scmoe.borrows_moe(self.group_index):
            assert preceding is not None
            self._moe_holder = preceding._moe_holder
        ops = [op for layer in (*leading, self) for op in _residual_ops(layer)]
        assert len(ops) == self.group.num_ops
        if self._reads_entry:
            (op,) = ops  # farskip's groups have no other
            ops = [dataclasses.replace(op, run=partial(_run_and_keep_entry, op))]
        # In the MoE's own block the shared expert stands where the dense MLP would. dgmoe has none: there the second
        # gate reads what a shared expert would, at the end of the group.
        read = partial(_norm_of_entry if self._reads_entry else _norm, blocks.mlp_norm, self)
        if self.scmoe.shortcut is Shortcut.SCMOE:
            ops.append(DenseOp(SHARED_EXPERT, read, self._run_shared_expert))
        self.ops = (*ops, DenseOp(ADD, read if self.scmoe.shortcut is Shortcut.DGMOE else None, self._add))

    def run(self, groups: Sequence[GroupBlock]) -> None:
        """Let this block run the span of ``groups``, of which it is the last one."""
        self.span = GroupSpan(groups, self.scmoe)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **attention_inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the span on ``hidden_states`` [s, b, h], if it is this block's; returns its output and ``context``.

        Raises:
            ValueError: for a padding mask that Core would read wrongly.
        """
        if self.span is None:
            return hidden_states, context
        inputs = blocks.AttentionInputs(**attention_inputs)
        plan = self.span.plan if self.training else self.span.forward_plan
        mask = mask_of_rank(padding_mask, hidden_states, self.moe.router)
        if mask is not None:
            mask = blocks.by_sample(mask, inputs.packed_seq_params)
        return self.span.run(hidden_states, inputs, mask, plan), context

    def read(self, op: DenseOp, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """What routed experts of the group read at ``op``, [s, b, h], and what the op reads; None if not known yet."""
        assert op.norm is not None
        if self.scmoe.shortcut_norms is Norms.UPSTREAM:
            return self.shortcut_pre_mlp_layernorm(stream.hidden if stream.entry is None else stream.entry), None
        normed = op.norm(stream)
        return normed, normed

    def land(self, stream: Stream, routed: Sequence[Tensor]) -> Stream:
        """Add outputs of this group's calls that land behind its end."""
        output = _sum(routed)
        if stream.late_weight is not None:
            output = stream.late_weight * output
        entry = None if stream.entry is None else stream.entry + output
        hidden = blocks.add_mlp_output(self, stream.hidden, (output, None))  # in evaluation it overwrites the output
        return stream._replace(hidden=hidden, entry=entry, late_weight=None)

    @property
    def _reads_entry(self) -> bool:
        return self.scmoe.position(self.group_index) is Position.FARSKIP

    def _run_shared_expert(self, stream: Stream, normed: Tensor, _inputs: Any) -> Stream:
        return stream._replace(shared_input=normed, shared=blocks.shared_expert(self.moe, normed))

    def _add(self, stream: Stream, _normed: Tensor | None, _inputs: Any) -> Stream:
        """The end of the group: add the shared expert's output, and the routed ones that are there."""
        outputs, late_weight = list(stream.routed), None
        if stream.shared is not None:
            shared = stream.shared
            if self.scmoe.shortcut_combine is Combine.CG2:
                shared_weight, routed_weight = self.combine_gate(stream.shared_input)
                shared = shared_weight * shared
                outputs = [routed_weight * routed for routed in outputs]
                late_weight = None if outputs else routed_weight
            outputs.append(shared)  # cg1's gate is inside Core's shared expert
        if not outputs:  # all of it lands late; a tensor of its own, whose gradient marks this op and no other
            return Stream(stream.hidden.view_as(stream.hidden))
        total = _sum(outputs)
        if self.scmoe.shortcut_norms is Norms.UPSTREAM:
            total = self.shortcut_post_norm(total)
        return Stream(blocks.add_mlp_output(self, stream.hidden, (total, None)), late_weight=late_weight)


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    total = outputs[0]
    for output in outputs[1:]:
        total = total + output
    return total


type _Normed = Callable[[Any, Tensor], Tensor]


def _norm(norm: _Normed, layer: Any, stream: Stream) -> Tensor:
    return norm(layer, stream.hidden)


def _norm_of_entry(norm: _Normed, layer: Any, stream: Stream) -> Tensor:
    assert stream.entry is not None
    return norm(layer, stream.entry)


def _residual_ops(layer: TransformerLayer | MambaLayer) -> list[DenseOp]:
    """The ops of one of Core's layers: attention and MLP of a block, or the one of a hybrid model's layer."""
    if isinstance(layer, MambaLayer):
        return [DenseOp(MAMBA, partial(_norm, blocks.mamba_norm, layer), partial(_run, blocks.mamba_residual, layer))]
    ops = []
    if not isinstance(layer.self_attention, IdentityOp):
        run = partial(_run, blocks.attention_residual, layer)
        cut = partial(blocks.at_core_attention, layer)
        ops.append(DenseOp(ATTENTION, partial(_norm, blocks.attention_norm, layer), run, cut))
    if isinstance(layer.mlp, MLP):
        run = partial(_run, blocks.mlp_residual, layer)
        ops.append(DenseOp(MLP_OP, partial(_norm, blocks.mlp_norm, layer), run))
    return ops


def _run(residual: Callable[..., Tensor], layer: Any, stream: Stream, normed: Tensor, inputs: Any) -> Stream:
    return stream._replace(hidden=residual(layer, stream.hidden, normed, inputs))


def _run_and_keep_entry(op: DenseOp, stream: Stream, normed: Tensor, inputs: Any) -> Stream:
    return op.run(stream, normed, inputs)._replace(entry=stream.hidden)


def passes_through(layer: Any) -> bool:
    """Whether ``layer`` leaves its ops to a later layer."""
    if isinstance(layer, GroupBlock):
        return layer.span is None
    return isinstance(layer, LeadingBlock | LeadingMamba) and layer.in_group


def link(layers: Sequence[Any], scmoe: ScMoEConfig) -> None:
    """Give the layers of one (virtual) pipeline stage to their groups, and these to their spans.

    Args:
        layers: of the stage, in order.
        scmoe: the groups' settings.
    """
    groups: list[GroupBlock] = []
    for index, layer in enumerate(layers):
        if isinstance(layer, GroupBlock):
            layer.link(layers[index - len(layer.group.layers) + 1 : index], groups[-1] if groups else None)
            groups.append(layer)
    for first in range(0, len(groups), scmoe.shortcut_span):
        span = groups[first : first + scmoe.shortcut_span]
        span[-1].run(span)
