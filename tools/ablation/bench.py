"""Measuring, on the ranks of one job: all arms by turns, step by step, on one link rate after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from ablation.analysis import KINDS
from ablation.arms import CARRIES, COST_MODEL, MODELS, Arm, Model, cost_model
from megatron_scmoe.codec.rate import adjust_rates
from megatron_scmoe.config import Combine, Position, ScMoEConfig, Shortcut
from megatron_scmoe.layers.group import GroupBlock
from megatron_scmoe.layers.pipelined import PipelinedMoELayer
from megatron_scmoe.layers.span import GroupSpan
from megatron_scmoe.models.gpt import ScMoEGPTModelBuilder, ScMoEGPTModelConfig, with_chunks, with_shortcut
from megatron_scmoe.overlap import observe
from megatron_scmoe.overlap.costs import GroupPass, costs_of, mean_costs, pass_costs_of, passes_of
from megatron_scmoe.overlap.kept import Plans
from megatron_scmoe.overlap.plan import sequential_plan
from megatron_scmoe.overlap.recording import Recording
from megatron_scmoe.overlap.solver import PassCosts, SpanCosts
from megatron_scmoe.overlap.spans import communication_s

COST_STEPS = 3
VOCAB_SIZE = 512
RATE_STEPS = 20
"""Steps in which the codec finds the level of its target rate, before anything is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The model of every arm.

    Attributes:
        hidden: width.
        ffn: width of dense MLP, shared expert and each expert.
        heads: of attention.
        experts: of each MoE layer, over all ranks.
        layers: blocks.
        tokens: of one sequence, which is what a rank computes in a step.
    """

    hidden: int = 512
    ffn: int = 2048
    heads: int = 8
    experts: int = 8
    layers: int = 4
    tokens: int = 512


def _transformer(model: Model, sizes: Sizes, **split: Any) -> TransformerConfig:
    config = partial(
        TransformerConfig,
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        ffn_hidden_size=sizes.ffn,
        moe_ffn_hidden_size=sizes.ffn,
        moe_shared_expert_intermediate_size=sizes.ffn if model.shared_expert else None,
        num_moe_experts=sizes.experts,
        moe_router_topk=model.topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_layer_freq=([0] * (model.moe_every - 1) + [1]) * (sizes.layers // model.moe_every),
        moe_router_force_load_balancing=True,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
    )
    return config(**split)


def builder(model: Model, sizes: Sizes, **split: Any) -> GPTModelBuilder:
    """What builds the model on this rank, as the training script would.

    Args:
        model: which.
        sizes: of it.
        split: fields of ``TransformerConfig`` that say how it is split; by default its experts alone are.
    """
    settings: dict[str, Any] = {
        "transformer": _transformer(model, sizes, **split),
        "vocab_size": VOCAB_SIZE,
        "seq_length": sizes.tokens,
        "position_embedding_type": "rope",
    }
    codec = CARRIES[model.carries]
    if model.shortcut == "none":
        config = GPTModelConfig(**settings)
        if model.pipelined:
            with_chunks(config, ScMoEConfig(overlap_chunks=2, **codec))
        return GPTModelBuilder(config)
    scmoe = ScMoEConfig(
        shortcut=Shortcut(model.shortcut),
        shortcut_position=(Position(model.position),),
        shortcut_combine=Combine.ADD if model.shortcut == "scmoe" else Combine.CG1,
        moe_every=model.moe_every,
        shortcut_span=model.span,
        shortcut_landing=int(model.span > 1),
        **codec,
    )
    return ScMoEGPTModelBuilder(with_shortcut(ScMoEGPTModelConfig(**settings), scmoe))


class Bench:
    """All models of the arms on this rank, and how they are run.

    Args:
        arms: what will be timed.
        sizes: of the models.
        seed: of parameters and tokens.
    """

    def __init__(self, arms: list[Arm], sizes: Sizes, seed: int) -> None:
        self.sizes = sizes
        model_parallel_cuda_manual_seed(seed)
        torch.manual_seed(seed)
        names = {name for arm in arms for name in (arm.model, cost_model(arm.model))} | {COST_MODEL}
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        groups = ProcessGroupCollection.use_mpu_process_groups()
        built = {name: builder(MODELS[name], sizes).build_model(groups) for name in MODELS if name in names}
        self._models = {name: module.to(device) for name, module in built.items()}
        generator = torch.Generator().manual_seed(seed + dist.get_rank())
        ids = torch.randint(VOCAB_SIZE, (1, sizes.tokens + 1), generator=generator).to(device)
        self._tokens, self._labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self._positions = torch.arange(sizes.tokens, device=device).unsqueeze(0)

    def _groups(self, model: str) -> list[GroupBlock | PipelinedMoELayer]:
        """The parts of a model whose tokens travel as we let them."""
        return [part for part in self._models[model].modules() if isinstance(part, GroupBlock | PipelinedMoELayer)]

    def planned(self, model: str) -> dict[int, GroupSpan | PipelinedMoELayer]:
        """What of a model has a plan, by the index of its first group."""
        parts = (part.span if isinstance(part, GroupBlock) else part for part in self._groups(model))
        return {part.group_index: part for part in parts if part is not None}

    def set_plans(self, model: str, plans: dict[int, Plans]) -> None:
        """Give what has a plan its plans."""
        for index, part in self.planned(model).items():
            part.plan, part.forward_plan = plans[index].training, plans[index].forward

    def set_routing(self, model: str, routing: str) -> None:
        """Force balanced routing, or let the router choose."""
        for module in self._models[model].modules():
            if isinstance(module, TopKRouter):
                module.config.moe_router_force_load_balancing = routing == "balanced"

    def find_rates(self) -> None:
        """Let the codecs send the part of the rows that they are to send; what they found then stays."""
        world = dist.group.WORLD
        assert world is not None
        for name in self._models:
            controls = [group.cargo_maker.rate_control for group in self._groups(name)]
            found = [control for control in controls if control is not None]
            for _ in range(RATE_STEPS if found else 0):
                self.step(name, "training")
                adjust_rates(found, world)

    def step(self, model: str, kind: str) -> float:
        """One step between two barriers; its seconds on the slowest rank.

        A training step is forward and backward of one micro-batch. The reduction of gradients and the optimizer are
        left out: they are the same in every arm, and accumulation makes them rare.
        """
        module = self._models[model].train(kind == "training")
        _settle()
        began = time.perf_counter()
        with contextlib.nullcontext() if kind == "training" else torch.no_grad():
            loss = module(self._tokens, self._positions, None, labels=self._labels)
        if kind == "training":
            loss.mean().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = torch.tensor([time.perf_counter() - began], device=self._tokens.device)
        for parameter in module.parameters():
            parameter.grad = None
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    @contextlib.contextmanager
    def routed_tokens(self, model: str) -> Iterator[Tensor]:
        """The tokens of this rank that each expert gets while a ``with`` block runs, all layers together."""
        counts = torch.zeros(self.sizes.experts, device=self._tokens.device)
        routers = [module for module in self._models[model].modules() if isinstance(module, TopKRouter)]

        def count(_module: torch.nn.Module, _inputs: Any, routing: tuple[Tensor, ...]) -> None:
            counts.add_(routing[1].sum(dim=0))

        handles = [router.register_forward_hook(count) for router in routers]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()

    def recorded_step(self, model: str, kind: str) -> tuple[float, Recording]:
        """One step with marks."""
        with observe.recording() as recording:
            seconds = self.step(model, kind)
        return seconds, recording

    def _run_in_sequence(self, model: str, chunks: int = 1) -> dict[int, GroupSpan | PipelinedMoELayer]:
        """Let all that flies be waited for at once; returns what has a plan."""
        parts = self.planned(model)
        plans = {index: sequential_plan(part.shape, chunks) for index, part in parts.items()}
        self.set_plans(model, {index: Plans(plan, plan) for index, plan in plans.items()})
        return parts

    def costs(self, model: str, chunks: int, kind: str = "training") -> dict[int, SpanCosts]:
        """What each planned part of a model costs, in sequence, as a mean over the ranks.

        Of forward alone nothing runs backward; what that would cost is left at what forward costs.
        """
        parts = self._run_in_sequence(model, chunks)
        self.step(model, kind)
        passes: list[GroupPass] = []
        for _ in range(COST_STEPS):
            passes += passes_of(self.recorded_step(model, kind)[1])
        result = {}
        for index, part in parts.items():
            mine = [one for one in passes if one.group == index]
            if kind == "training":
                costs = costs_of(mine, part.shape, chunks)
            else:
                forward = pass_costs_of(mine, part.shape, chunks)
                costs = SpanCosts(forward=forward, backward=forward)
            result[index] = mean_costs(gathered(costs))
        return result

    def rest_s(self, model: str) -> dict[str, float]:
        """Seconds of a step outside its groups, by kind: embedding, leading blocks of the stock model, output, loss."""
        self._run_in_sequence(model)
        rest: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for kind in KINDS * COST_STEPS:
            seconds, recording = self.recorded_step(model, kind)
            groups_s = max(gathered(sum(one.total_s for one in passes_of(recording))))
            rest[kind].append(max(seconds - groups_s, 0.0))
        return {kind: median(values) for kind, values in rest.items()}

    def step_share(self) -> float:
        """The all-to-all's part of the top-2 baseline's whole training step."""
        self._run_in_sequence(COST_MODEL)
        shares = []
        for _ in range(COST_STEPS):
            seconds, recording = self.recorded_step(COST_MODEL, "training")
            communication = sum(communication_s(one.spans) for one in passes_of(recording))
            shares.append(fmean(gathered(communication)) / seconds)
        return median(shares)

    def share(self) -> float:
        """The all-to-all's part of the top-2 baseline's forward MoE time, route to decode."""
        forward = [costs.forward for costs in self.costs(COST_MODEL, 1).values()]
        communication = sum(call.dispatch + call.combine for costs in forward for call in costs.calls)
        return communication / (communication + sum(map(compute_s, forward)))


def compute_s(costs: PassCosts) -> float:
    """What the compute ops of an MoE layer take, route to decode."""
    return sum(call.route + call.encode + call.wait + call.experts + call.decode for call in costs.calls)


def gathered(mine: Any) -> list[Any]:
    """What every rank has, on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
