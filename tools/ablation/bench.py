"""Measuring, on the ranks of one job: all arms by turns, step by step, on one link rate after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from ablation.arms import COST_MODEL, MODELS, Arm, Model
from megatron_scmoe import observe
from megatron_scmoe.adaptive import Plans
from megatron_scmoe.config import Combine, Position, ScMoEConfig, Shortcut
from megatron_scmoe.costs import GroupPass, costs_of, mean_costs, pass_costs_of, passes_of
from megatron_scmoe.layer import GroupBlock
from megatron_scmoe.model import ScMoEGPTModelBuilder, ScMoEGPTModelConfig, with_chunks, with_shortcut
from megatron_scmoe.pipelined import PipelinedMoELayer
from megatron_scmoe.plan import Plan
from megatron_scmoe.solver import GroupCosts, limit_s, predicted_s, solve
from megatron_scmoe.spans import communication_s, exposed_s

KINDS = ("training", "forward")
CHUNKS = (1, 2, 4)
COST_STEPS = 4
VOCAB_SIZE = 512
SHARE_TOLERANCE = 0.015


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


def build(model: Model, sizes: Sizes) -> torch.nn.Module:
    """The model on this rank, as the training script would build it."""
    transformer = TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        ffn_hidden_size=sizes.ffn,
        moe_ffn_hidden_size=sizes.ffn,
        moe_shared_expert_intermediate_size=sizes.ffn if model.shared_expert else None,
        moe_shared_expert_gate=False,
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
        activation_func=torch.nn.functional.gelu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        transformer_impl="local",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    settings: dict[str, Any] = {
        "transformer": transformer,
        "vocab_size": VOCAB_SIZE,
        "seq_length": sizes.tokens,
        "position_embedding_type": "rope",
    }
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if model.shortcut == "none":
        config = GPTModelConfig(**settings)
        if model.pipelined:
            with_chunks(config, ScMoEConfig(overlap_chunks=2))
        return GPTModelBuilder(config).build_model(groups)
    scmoe = ScMoEConfig(
        shortcut=Shortcut(model.shortcut),
        shortcut_position=(Position(model.position),),
        shortcut_combine=Combine.ADD if model.shortcut == "scmoe" else Combine.CG1,
        moe_every=model.moe_every,
    )
    return ScMoEGPTModelBuilder(with_shortcut(ScMoEGPTModelConfig(**settings), scmoe)).build_model(groups)


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
        names = {arm.model for arm in arms} | {COST_MODEL}
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._models = {name: build(MODELS[name], sizes).to(device) for name in MODELS if name in names}
        generator = torch.Generator().manual_seed(seed + dist.get_rank())
        ids = torch.randint(VOCAB_SIZE, (1, sizes.tokens + 1), generator=generator).to(device)
        self._tokens, self._labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self._positions = torch.arange(sizes.tokens, device=device).unsqueeze(0)

    def groups(self, model: str) -> dict[int, GroupBlock | PipelinedMoELayer]:
        """The parts of a model that have a plan, by their index."""
        parts = self._models[model].modules()
        return {part.group_index: part for part in parts if isinstance(part, GroupBlock | PipelinedMoELayer)}

    def set_plans(self, model: str, plans: dict[int, Plans]) -> None:
        """Give every group of a model its plans."""
        for index, group in self.groups(model).items():
            group.plan, group.forward_plan = plans[index].training, plans[index].forward

    def set_routing(self, model: str, routing: str) -> None:
        """Force balanced routing, or let the router choose."""
        for module in self._models[model].modules():
            if isinstance(module, TopKRouter):
                module.config.moe_router_force_load_balancing = routing == "balanced"

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

    def recorded_step(self, model: str, kind: str) -> tuple[float, observe.Recording]:
        """One step with marks."""
        with observe.recording() as recording:
            seconds = self.step(model, kind)
        return seconds, recording

    def costs(self, model: str, chunks: int) -> dict[int, GroupCosts]:
        """What each group of a model costs, in sequence, as a mean over the ranks."""
        plan = Plan((1,) * chunks, blocking=True)
        groups = self.groups(model)
        self.set_plans(model, dict.fromkeys(groups, Plans(plan, plan)))
        self.step(model, "training")
        passes: list[GroupPass] = []
        for _ in range(COST_STEPS):
            passes += passes_of(self.recorded_step(model, "training")[1])
        result = {}
        for index, group in groups.items():
            mine = costs_of([one for one in passes if one.group == index], group.shape, chunks)
            result[index] = mean_costs(_gathered(mine))
        return result

    def forward_costs(self, model: str, chunks: int) -> dict[int, GroupCosts]:
        """The same without gradients; as nothing runs backward, what it would cost is left at that of forward."""
        plan = Plan((1,) * chunks, blocking=True)
        groups = self.groups(model)
        self.set_plans(model, dict.fromkeys(groups, Plans(plan, plan)))
        self.step(model, "forward")
        passes: list[GroupPass] = []
        for _ in range(COST_STEPS):
            passes += passes_of(self.recorded_step(model, "forward")[1])
        result = {}
        for index, group in groups.items():
            mine = pass_costs_of([one for one in passes if one.group == index], group.shape, chunks)
            result[index] = mean_costs(_gathered(GroupCosts(forward=mine, backward=mine)))
        return result

    def rest_s(self, model: str) -> dict[str, float]:
        """Seconds of a step outside its groups, by kind: embedding, leading blocks of the stock model, output, loss."""
        plan = Plan((1,), blocking=True)
        self.set_plans(model, dict.fromkeys(self.groups(model), Plans(plan, plan)))
        rest: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(COST_STEPS):
            for kind in KINDS:
                seconds, recording = self.recorded_step(model, kind)
                groups_s = max(_gathered(sum(one.total_s for one in passes_of(recording))))
                rest[kind].append(max(seconds - groups_s, 0.0))
        return {kind: median(values) for kind, values in rest.items()}

    def share(self) -> float:
        """The all-to-all's part of the top-2 baseline's forward MoE time, route to decode."""
        forward = [costs.forward for costs in self.costs(COST_MODEL, 1).values()]
        communication = sum(costs.dispatch + costs.combine for costs in forward)
        compute = sum(costs.route + costs.encode + costs.experts + costs.decode for costs in forward)
        return communication / (communication + compute)


def _gathered(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


@dataclass(slots=True)
class ArmResult:
    """What one arm did at one link rate; lists hold one value for each repetition.

    Attributes:
        arm: what was timed.
        plans: by group: slots for training and forward, and whether they block; empty for Megatron's own layers.
        seconds: of the slowest rank, by kind.
        limit_s: what no plan beats, by kind: the step without its groups, and the groups' limits. None for stock.
        predicted_s: the same with the solver's prediction for its plans, in the place of the limits.
        communication_s, exposed_s: a step's, on the rank where more is exposed, by kind.
        sent_bytes: a step's, from the interface counters (None without slow_link), summed over ranks, by kind.
        tokens_max_over_mean: load of the busiest expert in the recorded steps.
        timeline: spans of one group's passes on rank 0, by kind.
    """

    arm: Arm
    plans: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    limit_s: dict[str, float] | None = None
    predicted_s: dict[str, float] | None = None
    communication_s: dict[str, float] = field(default_factory=dict)
    exposed_s: dict[str, float] = field(default_factory=dict)
    sent_bytes: dict[str, float | None] = field(default_factory=dict)
    tensor_bytes: dict[str, float] = field(default_factory=dict)
    tokens_max_over_mean: float | None = None
    timeline: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Link:
    """The network between the ranks: under slow_link its rate can be set and its bytes counted, elsewhere neither."""

    def __init__(self, control: Any) -> None:
        self._control = control

    @property
    def adjustable(self) -> bool:
        """Whether rates can be set."""
        return self._control is not None

    def set_rate(self, rate: str) -> None:
        """Give every link a rate; rank 0 asks while all wait."""
        dist.barrier()
        if dist.get_rank() == 0:
            self._control.set_rate(rate)
        dist.barrier()

    def bytes_sent(self) -> int | None:
        """Bytes that all ranks have put on the wire so far, on rank 0; None where nobody counts."""
        dist.barrier()
        sent = sum(self._control.bytes_sent()) if self._control and dist.get_rank() == 0 else None
        dist.barrier()
        return sent


def find_rate(bench: Bench, link: Link, share: float, say: Callable[[str], None]) -> tuple[str, float]:
    """The link rate at which the all-to-all takes ``share`` of the baseline's forward MoE time.

    Returns:
        The rate and the share that was measured at it.

    Raises:
        ValueError: where links without a limit take a larger share already.
    """
    link.set_rate("unlimited")
    free = bench.share()
    if free > share + SHARE_TOLERANCE:
        raise ValueError(f"a share of {share:g} is out of reach: without any limit it is {free:.3f} already")
    # A first guess by arithmetic: half of top-2's tokens leave a rank of two, there and back.
    costs = next(iter(bench.costs(COST_MODEL, 1).values())).forward
    compute_s = costs.route + costs.encode + costs.experts + costs.decode
    ranks = dist.get_world_size()
    sent_bits = 2 * 2 * bench.sizes.tokens * (ranks - 1) / ranks * (bench.sizes.hidden * 4 + 4) * 8
    rate = sent_bits / (compute_s * share / (1 - share))
    for _ in range(8):
        words = f"{max(round(rate / 1e3), 64)}kbit"
        link.set_rate(words)
        measured = bench.share()
        say(f"looking for a share of {share:g}: {measured:.3f} at {rate / 1e6:.1f} Mbit/s")
        if abs(measured - share) <= SHARE_TOLERANCE:
            return words, measured
        rate *= (measured / (1 - measured)) / (share / (1 - share))
    raise ValueError(f"a share of {share:g} was not found: {measured:.3f} at {rate / 1e6:.1f} Mbit/s was the last try")


def measure(
    bench: Bench, link: Link, results: list[ArmResult], *, repetitions: int, say: Callable[[str], None]
) -> Iterator[None]:
    """Time the arms of ``results`` at the rate that the link has, and fill these; yields after each round of work."""
    plans: dict[str, dict[int, Plans]] = {}
    for name in dict.fromkeys(result.arm.model for result in results):
        if bench.groups(name):
            say(f"measuring what the ops of {name} cost")
            _solve(bench, name, [result for result in results if result.arm.model == name], plans)
            yield
    for repetition in range(-1, repetitions):
        # Each round begins with another arm, so that none is always behind the same one; round -1 warms up.
        first = repetition % len(results)
        turned = results[first:] + results[:first]
        for result in turned:
            _prepare(bench, result.arm, plans)
            for kind in KINDS:
                if result.arm.recorded:
                    seconds, _ = bench.recorded_step(result.arm.model, kind)
                else:
                    seconds = bench.step(result.arm.model, kind)
                if repetition >= 0:
                    result.seconds[kind].append(seconds)
        yield
    for result in results:
        _prepare(bench, result.arm, plans)
        _observe(bench, link, result)


def _prepare(bench: Bench, arm: Arm, plans: dict[str, dict[int, Plans]]) -> None:
    bench.set_routing(arm.model, arm.routing)
    if bench.groups(arm.model):
        bench.set_plans(arm.model, plans[arm.name])


def _solve(bench: Bench, model: str, results: list[ArmResult], plans: dict[str, dict[int, Plans]]) -> None:
    """Measure a model's ops, and from them the plans, predictions and limits of its arms."""
    bench.set_routing(model, "balanced")
    groups = bench.groups(model)
    costs = {chunks: bench.costs(model, chunks) for chunks in CHUNKS}
    forward = {chunks: bench.forward_costs(model, chunks) for chunks in CHUNKS}
    rest_s = bench.rest_s(model)
    for result in results:
        arm = result.arm
        mine: dict[int, Plans] = {}
        predicted = dict(rest_s)
        for index, group in groups.items():
            by_chunks = {chunks: costs[chunks][index] for chunks in CHUNKS}
            forward_by_chunks = {chunks: forward[chunks][index] for chunks in CHUNKS}
            counts = CHUNKS if arm.mode == "adaptive chunks" else (1,)
            if arm.adaptive:
                best = solve(group.shape, {chunks: by_chunks[chunks] for chunks in counts})
                best_forward = solve(
                    group.shape, {chunks: forward_by_chunks[chunks] for chunks in counts}, forward_only=True
                )
                mine[index] = Plans(best.plan, best_forward.plan)
            else:
                plan = _fixed_plan(arm.mode, group.shape.num_slots)
                mine[index] = Plans(plan, plan)
            predicted["training"] += predicted_s(
                group.shape, by_chunks[mine[index].training.chunks], mine[index].training
            )
            predicted["forward"] += predicted_s(
                group.shape, forward_by_chunks[mine[index].forward.chunks], mine[index].forward, forward_only=True
            )
        plans[arm.name] = mine
        result.plans = {
            index: {
                "training": list(one.training.slots),
                "forward": list(one.forward.slots),
                "blocking": one.training.blocking,
            }
            for index, one in mine.items()
        }
        result.predicted_s = predicted
        result.limit_s = {
            "training": rest_s["training"] + sum(limit_s(groups[i].shape, costs[1][i]) for i in groups),
            "forward": rest_s["forward"]
            + sum(limit_s(groups[i].shape, forward[1][i], forward_only=True) for i in groups),
        }


def _fixed_plan(mode: str, num_slots: int) -> Plan:
    word, _, number = mode.partition(" ")
    if word == "off":
        return Plan((1,), blocking=True)
    if word == "slot":
        return Plan((int(number),))
    return Plan((num_slots,) * int(number))  # chunks: the shared expert runs while the first one travels


def _observe(bench: Bench, link: Link, result: ArmResult) -> None:
    """One recorded step of each kind: exposed time, bytes, load, a timeline."""
    for kind in KINDS:
        before = link.bytes_sent()
        _, recording = bench.recorded_step(result.arm.model, kind)
        after = link.bytes_sent()
        passes = passes_of(recording)
        if before is not None and after is not None:
            result.sent_bytes[kind] = after - before
        if not passes:
            continue
        tokens = sum((load.tokens_per_expert for load in recording.loads), start=torch.zeros(bench.sizes.experts))
        summary = {
            "communication_s": sum(communication_s(one.spans) for one in passes),
            "exposed_s": sum(exposed_s(one.spans) for one in passes),
            "tensor_bytes": sum(one.sent_bytes for one in passes),
            "tokens": tokens.tolist(),
        }
        ranks = _gathered(summary)
        slowest = max(ranks, key=lambda rank: rank["exposed_s"])
        result.communication_s[kind], result.exposed_s[kind] = slowest["communication_s"], slowest["exposed_s"]
        result.tensor_bytes[kind] = sum(rank["tensor_bytes"] for rank in ranks)
        if kind == "training":
            totals = [sum(counts) for counts in zip(*(rank["tokens"] for rank in ranks), strict=True)]
            result.tokens_max_over_mean = max(totals) * len(totals) / sum(totals)
        first = passes[0].group
        result.timeline[kind] = [asdict(span) for one in passes if one.group == first for span in one.spans]
