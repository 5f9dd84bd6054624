"""Small models of ours on the rank pool, with parameters and data that depend on their names alone.

Every rank fills its part of a parameter from the parameter's global name, so any expert-parallel layout starts from the
same model without a checkpoint, and the single-process reference can be given the very same tensors.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from dataclasses import dataclass

import reference
import reference_prediction
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scmoe.contracts import Launch

VOCAB_SIZE = 31
SEQ_LENGTH = 6
BATCH_SIZE = 4
ROUTED_SCALING = 2.5  # of LongCat-Flash's router; its own is 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One architecture, in the words of the command line."""

    shortcut: str = "scmoe"
    position: tuple[str, ...] = ("pos2",)
    combine: str = "cg1"
    topk: int = 1
    moe_every: int = 2
    num_groups: int = 2
    span: int = 1
    landing: int = 0
    share_groups: int = 1
    norms: str = "none"
    overlap: str = "fixed"
    expert_slot: tuple[int | str, ...] = ()
    chunks: int = 1
    dtype: torch.dtype = torch.float32
    recompute: str | None = None  # None, "full" or a module of selective recompute
    recompute_method: str = "uniform"  # of full recompute, in units of that many blocks
    recompute_blocks: int = 1
    codec: str = "none"
    transfers: tuple[str, ...] = ("dispatch-forward", "combine-backward")  # of the codec fp8
    hashes: int = 1
    width: int = 2
    compensation: str = "paper"
    refinement: str = "none"
    evaluation: str = "tokens"
    router: str = "core"
    zero_experts: int = 0
    capacity: float | None = None
    padded: bool = False
    latent: int | None = None
    weights_apart_above: float = 8.0
    unique: str = "none"
    predictions: int = 0

    @property
    def num_layers(self) -> int:
        return self.num_groups * self.moe_every

    def reference_config(self) -> reference.ReferenceConfig:
        positions = self.position if len(self.position) > 1 else self.position * self.num_groups
        return reference.ReferenceConfig(
            num_layers=self.num_layers,
            hidden_size=16,
            num_attention_heads=2,
            ffn_hidden_size=24,
            moe_ffn_hidden_size=12,
            shared_ffn_hidden_size=None if self.shortcut == "dgmoe" else 20,
            num_experts=4,
            topk=self.topk,
            moe_every=self.moe_every,
            positions=positions,
            combine="add" if self.shortcut == "dgmoe" else self.combine,
            arch=self.shortcut,
            span=self.span,
            landing=self.landing,
            share_groups=self.share_groups,
            upstream_norms=self.norms == "upstream",
            swiglu=True,
            normalization="RMSNorm",
            rotary=True,
            zero_experts=self.zero_experts,
            router_biases=self.router_biases() if self.router == "longcat" else (),
            routed_scaling=ROUTED_SCALING,
            latent_size=self.latent,
            rounded=self.transfers if self.codec == "fp8" else (),
        )

    def router_bias(self, group: int) -> Tensor:
        """Of LongCat-Flash's router: about as large as the differences between scores."""
        return 0.3 * parameter(f"bias of group {group}", (4 + self.zero_experts,))

    def router_biases(self) -> tuple[Tensor, ...]:
        """For each group that of the router that serves it."""
        owners = (group // self.share_groups * self.share_groups for group in range(self.num_groups))
        return tuple(map(self.router_bias, owners))

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)


def parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of a parameter, from its global name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    scale = 1.0 if "embedding" in name else 0.25
    offset = 1.0 if "norm" in name else 0.0
    return torch.randn(shape, generator=generator) * scale + offset


def batch() -> tuple[Tensor, Tensor]:
    """Token and label ids of the whole batch, [b, s]."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQ_LENGTH + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def reference_parameters(config: reference.ReferenceConfig, predictions: int = 0) -> dict[str, Tensor]:
    shapes = reference.parameter_shapes(config, vocab_size=VOCAB_SIZE, max_sequence_length=SEQ_LENGTH)
    shapes |= reference_prediction.parameter_shapes(config, predictions)
    return {name: parameter(name, shape) for name, shape in shapes.items()}


def settings(case: Case):
    """Our settings of ``case``."""
    from megatron_scmoe.config import Codec, Combine, Norms, Overlap, Position, Router, ScMoEConfig, Shortcut, Unique

    return ScMoEConfig(
        shortcut=Shortcut(case.shortcut),
        shortcut_position=tuple(Position(position) for position in case.position),
        shortcut_combine=Combine(case.combine),
        moe_every=case.moe_every,
        shortcut_span=case.span,
        shortcut_landing=case.landing,
        moe_share_groups=case.share_groups,
        shortcut_norms=Norms(case.norms),
        overlap=Overlap(case.overlap),
        expert_slot=tuple(map(str, case.expert_slot)),
        overlap_chunks=case.chunks,
        a2a_weights_apart_above=case.weights_apart_above,
        a2a_codec=Codec(case.codec),
        a2a_unique=Unique(case.unique),
        router=Router(case.router),
        zero_experts=case.zero_experts,
        **codec_settings(case),
    )


def build(case: Case):
    """The model of ``case`` on this rank, with the parameters of ``parameter``."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_scmoe.models.gpt import ScMoEGPTModelBuilder, ScMoEGPTModelConfig, with_shortcut

    scmoe = settings(case)
    scmoe.validate(case.num_layers)
    config = ScMoEGPTModelConfig(
        transformer=transformer_config(case),
        vocab_size=VOCAB_SIZE,
        seq_length=SEQ_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model = ScMoEGPTModelBuilder(with_shortcut(config, scmoe)).build_model(
        ProcessGroupCollection.use_mpu_process_groups()
    )
    model = model.to(DEVICE, case.dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(parameter(global_name(name), tuple(value.shape)))
        for name, value in model.named_buffers():
            if name.endswith("expert_bias"):
                value.copy_(case.router_bias(int(name.split(".")[2]) // case.moe_every))
    return model


def codec_settings(case: Case) -> dict[str, object]:
    from megatron_scmoe.config import Compensation, Evaluation, Refinement
    from megatron_scmoe.contracts import TransferName

    if case.codec == "fp8":
        return {"fp8_transfers": tuple(map(TransferName, case.transfers))}
    if case.codec != "lsh":
        return {}
    return {
        "lsh_hashes": case.hashes,
        "lsh_width": case.width,
        "lsh_compensation": Compensation(case.compensation),
        "lsh_refinement": Refinement(case.refinement),
        "lsh_evaluation": Evaluation(case.evaluation),
    }


def transformer_config(case: Case):
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = case.reference_config()
    selective = case.recompute not in (None, "full")
    return TransformerConfig(
        num_layers=case.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        ffn_hidden_size=sizes.ffn_hidden_size,
        moe_ffn_hidden_size=sizes.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=sizes.shared_ffn_hidden_size,
        moe_shared_expert_gate=sizes.combine == "cg1",
        num_moe_experts=sizes.num_experts,
        moe_router_topk=2 if case.shortcut == "dgmoe" else case.topk,  # one for each gate
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=ROUTED_SCALING if case.router == "longcat" else None,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=case.capacity,
        moe_pad_expert_input_to_capacity=case.padded,
        moe_latent_size=case.latent,
        mtp_num_layers=case.predictions or None,
        moe_layer_freq=([0] * (case.moe_every - 1) + [1]) * case.num_groups,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=case.dtype,
        normalization="RMSNorm",
        layernorm_epsilon=sizes.layernorm_epsilon,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=case.dtype is torch.bfloat16,
        params_dtype=case.dtype,
        autocast_dtype=case.dtype,
        transformer_impl="local",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        recompute_granularity=None if case.recompute is None else "selective" if selective else "full",
        recompute_method=case.recompute_method if case.recompute == "full" else None,
        recompute_num_layers=case.recompute_blocks if case.recompute == "full" else None,
        recompute_modules=[case.recompute] if selective else None,
    )


def global_name(local_name: str) -> str:
    """The name that a parameter of this expert-parallel rank has in a single-rank model."""
    from megatron.core import parallel_state

    match = re.search(r"local_experts\.(\d+)\.", local_name)
    if match is None:
        return local_name
    num_local = 4 // parallel_state.get_expert_model_parallel_world_size()
    expert = int(match[1]) + num_local * parallel_state.get_expert_model_parallel_rank()
    return local_name.replace(match[0], f"local_experts.{expert}.")


def my_batch(num_micro_batches: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    """This data-parallel rank's part of the batch, as micro-batches of tokens, labels and positions."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tokens, labels = (ids.chunk(size)[rank].to(DEVICE).contiguous() for ids in batch())
    positions = torch.arange(SEQ_LENGTH, device=DEVICE).expand_as(tokens)
    parts = [part.chunk(num_micro_batches) for part in (tokens, labels, positions)]
    return list(zip(*parts, strict=True))


def launch_at(model: torch.nn.Module, launch: Launch) -> None:
    """Let everything in ``model`` that has a plan launch its dispatches there."""
    for module in model.modules():
        planned = getattr(module, "span", None) or module
        if hasattr(planned, "forward_plan"):
            planned.plan = planned.forward_plan = dataclasses.replace(planned.plan, launch=launch)
            assert planned.shape.has(planned.plan)


def losses_and_gradients(
    case: Case, *, num_micro_batches: int = 1, launch: Launch = Launch.BEFORE
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of ``case`` on the ranks of an expert-parallel group.

    Args:
        case: what is built.
        num_micro_batches: that the step has.
        launch: where dispatches are launched by the ops at their taps.

    Returns:
        The loss of every token of this rank's part of the batch, [b, s], and every gradient of the mean loss over the
        whole batch, by global name; experts that live elsewhere are missing.
    """
    model = build(case)
    launch_at(model, launch)
    losses = [
        model(tokens, positions, None, labels=labels) for tokens, labels, positions in my_batch(num_micro_batches)
    ]
    # All forwards before the first backward: as many flights of one layer are open as there are micro-batches.
    for loss in losses:
        (loss.sum() / (BATCH_SIZE * SEQ_LENGTH)).backward()
    gradients = {}
    for name, value in model.named_parameters():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        if "local_experts" not in name:
            dist.all_reduce(gradient)  # what data parallelism does with dense parameters
        gradients[global_name(name)] = gradient
    return torch.cat([loss.detach() for loss in losses]), gradients
