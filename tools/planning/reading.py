"""From Megatron's validated namespace to what a step computes: the ops of each pipeline stage."""
# ruff: noqa: PLC0415 - Megatron takes seconds to import, for which a refusal of this tool's need not wait

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from command_line import UserError

from megatron_scmoe.config import Overlap, ScMoEConfig, Shortcut
from megatron_scmoe.config.groups import MOE, Group, layers_of_pattern, predicted_by_pattern
from megatron_scmoe.contracts import Plan, RoutedCall, SpanShape
from planning import sending
from planning.running import training
from planning.workload import (
    Attention,
    DenseOp,
    Embedding,
    GroupEnd,
    Layout,
    Mamba,
    Mlp,
    Moe,
    Op,
    Output,
    Span,
    Stage,
    Workload,
)


def workload(args: Namespace, scmoe: ScMoEConfig, layers_of_stages: Sequence[Sequence[int]]) -> Workload:
    """What a step of a run computes.

    Args:
        args: Megatron's namespace, validated.
        scmoe: our settings in it.
        layers_of_stages: of each pipeline stage, its virtual stages one behind the other, from 0 over the whole model.

    Raises:
        UserError: for what the model of time has no price for.
    """
    layers = _Layers(args, scmoe)
    stages = [layers.of_stage(numbers) for numbers in layers_of_stages]
    stages[0] = (Embedding(), *stages[0])
    stages[-1] = (*stages[-1], *layers.behind_all())
    return Workload(
        stages=tuple(stages),
        hidden=args.hidden_size,
        vocabulary=args.padded_vocab_size,
        seq_length=args.seq_length,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        layout=Layout(
            gpus=args.world_size,
            tp=args.tensor_model_parallel_size,
            pp=args.pipeline_model_parallel_size,
            vp=args.virtual_pipeline_model_parallel_size or 1,
            cp=args.context_parallel_size,
            ep=args.expert_model_parallel_size,
            etp=args.expert_tensor_parallel_size,
        ),
        training=training(args, layers.num_layers),
        tied=not args.untie_embeddings_and_output_weights,
    )


def with_calls(stage: Stage, **changes: Any) -> Stage:
    """``stage`` with other values in every :class:`Moe` of it."""
    return tuple(
        replace(op, **changes)
        if isinstance(op, Moe)
        else replace(op, calls=tuple(replace(call, **changes) for call in op.calls))
        if isinstance(op, Span)
        else op
        for op in stage
    )


class _Layers:
    """The layers of a model, which a stage holds some of."""

    def __init__(self, args: Namespace, scmoe: ScMoEConfig) -> None:
        self.args, self.scmoe = args, scmoe
        self.pattern = args.hybrid_layer_pattern or ""
        self.symbols = layers_of_pattern(self.pattern)
        self.num_layers = len(self.symbols) or args.num_layers
        self.groups = scmoe.groups(self.num_layers, self.pattern) if scmoe.enabled else ()
        self._group_of = {layer: number for number, group in enumerate(self.groups) for layer in group.layers}

    def of_stage(self, layers: Sequence[int]) -> Stage:
        """Ops of ``layers``, those of groups span by span."""
        ops: list[Op] = []
        for layer in layers:
            number = self._group_of.get(layer)
            if number is None:
                ops += self._stock(layer)
            elif layer == self.groups[number].layers[0] and number % self.scmoe.shortcut_span == 0:
                ops.append(self._span(number))
        return tuple(ops)

    def behind_all(self) -> Iterator[Op]:
        """What the last stage has behind its layers: the output layer, and prediction layers with one of their own."""
        yield Output()
        patterns = predicted_by_pattern(self.pattern)
        for symbols in patterns or ["*E" if self.args.num_experts else "*-"] * (self.args.mtp_num_layers or 0):
            for symbol in symbols:
                yield self._of_symbol(symbol)
            yield Output(own=False)

    def _stock(self, layer: int) -> Iterator[Op]:
        """The ops of a layer that no group has."""
        if self.symbols:
            yield self._pipelined() if self._has_chunks(layer) else self._of_symbol(self.symbols[layer])
            return
        yield self._attention(layer)
        if not self._is_moe(layer):
            yield self._mlp()
        else:
            yield self._pipelined() if self.scmoe.replaces_stock_moe else self._moe(shared=True)

    def _has_chunks(self, layer: int) -> bool:
        return self.symbols[layer] == MOE and self.scmoe.replaces_stock_moe

    def _is_moe(self, layer: int) -> bool:
        every = self.args.moe_layer_freq
        if not self.args.num_experts:
            return False
        return bool(every[layer]) if isinstance(every, list) else layer % every == 0

    def _of_symbol(self, symbol: str) -> Attention | Mamba | Mlp | Moe:
        ops: dict[str, Callable[[], Attention | Mamba | Mlp]] = {
            "*": self._attention,
            "+": self._attention,
            "M": self._mamba,
            "-": self._mlp,
        }
        if symbol == MOE:
            return self._moe(shared=True)
        if symbol not in ops:
            raise UserError(f"the model of time has no price for the layer {symbol} of {self.pattern}; plan without it")
        return ops[symbol]()

    def _attention(self, layer: int = 0) -> Attention:
        from megatron.core.transformer.utils import is_layer_window_attention

        args = self.args
        if args.multi_latent_attention:
            return Attention(
                heads=args.num_attention_heads,
                kv_heads=args.num_attention_heads,
                head_dim=args.qk_head_dim,
                value_dim=args.v_head_dim,
                q_latent=args.q_lora_rank or 0,
                kv_latent=args.kv_lora_rank,
                rope_dim=args.qk_pos_emb_head_dim,
                fused=self._fused,
            )
        in_window = is_layer_window_attention(args.window_size, args.window_attn_skip_freq, layer + 1)
        return Attention(
            heads=args.num_attention_heads,
            kv_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            head_dim=args.kv_channels,
            window=args.window_size[0] + 1 if in_window else 0,
            gated=args.attention_output_gate,
            fused=self._fused,
        )

    @property
    def _fused(self) -> bool:
        """Flash and cuDNN's attention are priced alike; Core's own (--transformer-impl local) writes its scores."""
        backend = self.args.attention_backend.name
        return self.args.transformer_impl == "transformer_engine" and backend not in ("unfused", "local")

    def _mamba(self) -> Mamba:
        args = self.args
        return Mamba(
            heads=args.mamba_num_heads or 2 * args.hidden_size // args.mamba_head_dim,  # Core's expansion is 2
            head_dim=args.mamba_head_dim,
            state=args.mamba_state_dim,
            groups=args.mamba_num_groups,
        )

    @property
    def _gated(self) -> bool:
        return self.args.swiglu or self.args.quick_geglu

    def _mlp(self) -> Mlp:
        return Mlp(width=self.args.ffn_hidden_size, gated=self._gated)

    def _shared(self, owners: int = 1) -> Mlp | None:
        width = self.args.moe_shared_expert_intermediate_size
        return Mlp(width=width, gated=self._gated, owners=owners) if width else None

    def _moe(self, *, shared: bool, owners: int = 1) -> Moe:
        args, zero = self.args, self.scmoe.zero_experts
        each_gate = 2 if self.scmoe.shortcut is Shortcut.DGMOE else 1  # --moe-router-topk 2 stands for one of each
        return Moe(
            experts=args.num_experts,
            top_k=args.moe_router_topk / each_gate * args.num_experts / (args.num_experts + zero),
            width=args.moe_ffn_hidden_size,
            gated=self._gated,
            latent=args.moe_latent_size or 0,
            limited=args.moe_router_group_topk / args.moe_router_num_groups if args.moe_router_group_topk else 1.0,
            bias=args.add_bias_linear,
            shared=self._shared() if shared else None,
            owners=owners,
            **sending.of_rows(args, self.scmoe),
        )

    def _span(self, first: int) -> Span:
        """The groups from ``first`` on that run as one."""
        groups = self.groups[first : first + self.scmoe.shortcut_span]
        sizes = [group.num_ops for group in groups]
        shape = self.scmoe.span_shape(first, sizes)
        owners = self.scmoe.moe_share_groups * len(shape.calls) // len(groups)
        return Span(
            ops=tuple(op for group in groups for op in self._ops_of_group(group)),
            calls=(self._moe(shared=False, owners=owners),) * len(shape.calls),
            shape=replace(shape, waits_to_pack=self._waits_to_pack),
            overlap=self.scmoe.overlap,
            chunks=self._chunks,
            plan=self.scmoe.plan(first, sizes) if self.scmoe.overlap is Overlap.FIXED else None,
        )

    def _ops_of_group(self, group: Group) -> Iterator[DenseOp]:
        """The residual ops before its MoE, the shared expert, and its end."""
        for layer in group.layers:
            if self.symbols:
                if self.symbols[layer] != MOE:
                    yield self._of_symbol(self.symbols[layer])  # type: ignore[misc] # no MoE
                continue
            yield self._attention(layer)
            if layer != group.layers[-1]:
                yield self._mlp()
        if self.scmoe.shortcut is Shortcut.SCMOE and (shared := self._shared(self.scmoe.moe_share_groups)):
            yield shared
        yield GroupEnd()

    def _pipelined(self) -> Span:
        """A stock MoE layer in chunks, as ``layers/pipelined.py`` runs it."""
        shared = self._shared()
        end = int(shared is not None)
        return Span(
            ops=(*filter(None, [shared]), GroupEnd()),
            calls=(self._moe(shared=False),),
            shape=SpanShape(end + 1, (RoutedCall(0, end),), self._waits_to_pack),
            overlap=self.scmoe.overlap,
            chunks=self._chunks,
            plan=Plan(((end + 1,) * self.scmoe.overlap_chunks,)) if self.scmoe.overlap is Overlap.FIXED else None,
        )

    @property
    def _chunks(self) -> tuple[int, ...]:
        most = self.scmoe.overlap_chunks
        if self.scmoe.overlap is not Overlap.ADAPTIVE:
            return (most,)
        return tuple(1 << power for power in range(most.bit_length()))

    @property
    def _waits_to_pack(self) -> bool:
        keeps_some = bool(self.scmoe.zero_experts) or self.args.moe_expert_capacity_factor is not None
        return self.scmoe.sends_once or keeps_some
