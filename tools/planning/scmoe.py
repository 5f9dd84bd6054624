"""The speed-ups that the ScMoE paper publishes (arXiv 2404.05019: tables 1, 2 and 4, and what it says of figure 8).

The paper gives no rate of a link and no batch of a language model. It says what part of an MoE layer's time the
all-to-all takes on each machine; the link has the rate at which the top-2 layer of the same model has that part
(:func:`machine_of`), in which none of the speed-ups takes part. Language models get ``SEQUENCES`` of 2048 tokens on
each GPU. Attention writes its scores to memory, as Fairseq's and Swin's does. Baselines wait for each all-to-all;
ScMoE has the solver's plan.

Experts compute, and ranks send, whole buffers of [experts, capacity]. Vision has Tutel's MoE layer, whose capacity is
top-k x factor x tokens / experts (``tutel/impls/fast_dispatch.py``, ``extract_critical``), with the paper's factor of
1.25: a quarter more than is routed. Language models have Fairseq's gates, whose top-2 capacity is the constant
2 x tokens / experts (``fairseq/modules/moe/top2gate.py``), which the paper's factor of 2.00 is taken for: as much as is
routed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_scmoe.config import Overlap, Position, ScMoEConfig, Shortcut
from megatron_scmoe.contracts import RoutedCall, SpanShape
from planning.hardware import HARDWARE, Constants, Machine
from planning.judging import Judged
from planning.prediction import Prediction
from planning.step import predict
from planning.training import Training
from planning.workload import Attention, Embedding, GroupEnd, Layout, Mlp, Moe, Op, Output, Span, Workload

SEQUENCES = 4
"""Of a language model on each GPU: an assumption, the paper has none."""
SHARES = {"A30-PCIe": 0.60, "A800-NVLink": 0.15, "2 x A800-NVLink": 0.50}
"""Part of the top-2 MoE layer's forward time that the all-to-all takes (section 4.1)."""
GPUS = {"A30-PCIe": 8, "A800-NVLink": 8, "2 x A800-NVLink": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """Layers of one width.

    Attributes:
        hidden: width.
        tokens: of a sequence, an image's for vision.
        sequences: on each GPU.
        attention: of every block.
        mlp: of blocks without an MoE.
        pairs: of a block with an MLP and one with an MoE; of blocks with an MoE where ``every`` is 1.
        every: blocks of a group.
        dense: further blocks without an MoE.
        shortcut: whether its MoE gets one.
        experts: of an MoE.
        vocabulary: of the output layer; 0: none.
        capacity: rows that are sent and computed for each routed one.
    """

    hidden: int
    tokens: int
    sequences: int
    attention: Attention
    mlp: Mlp
    pairs: int
    every: int = 2
    dense: int = 0
    shortcut: bool = True
    experts: int = 8
    vocabulary: int = 0
    capacity: float = 1.0


def _swin(experts: int, hidden: int, tokens: int, *, pairs: int = 0, dense: int = 0, shortcut: bool = False) -> Net:
    """A stage of SwinV2-MoE-S: 1024 images of 192 x 192 on all GPUs, windows of 12 x 12, one expert on a GPU."""
    return Net(
        hidden=hidden, tokens=tokens, sequences=1024 // experts,
        attention=Attention(
            heads=hidden // 32, kv_heads=hidden // 32, head_dim=32, window=min(144, tokens), fused=False
        ),
        mlp=Mlp(width=4 * hidden, gated=False), pairs=pairs, dense=dense, shortcut=shortcut, experts=experts,
        capacity=1.25,
    )  # fmt: skip


def _language(hidden: int, heads: int, experts: int, **more: Any) -> Net:
    """24 layers of GPT-2's vocabulary and MLPs, an MoE in every other one, but for ``more``."""
    attention = Attention(heads=heads, kv_heads=heads, head_dim=hidden // heads, fused=False)
    told: dict[str, Any] = {
        "attention": attention,
        "mlp": Mlp(width=4 * hidden, gated=False),
        "pairs": 12,
        "vocabulary": 50257,
    }
    return Net(hidden=hidden, tokens=2048, sequences=SEQUENCES, experts=experts, **(told | more))


def swin_s(experts: int) -> tuple[Net, ...]:
    """SwinV2-MoE-S on as many GPUs as experts."""
    return (
        _swin(experts, 96, 2304, dense=2),
        _swin(experts, 192, 576, dense=2),
        _swin(experts, 384, 144, pairs=9, shortcut=True),
        _swin(experts, 768, 36, pairs=1),
    )


SWIN = swin_s(8)
GPT2_MEDIUM = (_language(1024, 16, 16),)
GPT3_XL = (_language(2048, 32, 8),)
_GROUPED = Attention(heads=16, kv_heads=4, head_dim=128, fused=False)
_LLAMA_MLP = Mlp(width=5461)  # the width that gives the stated 6.7B parameters
LLAMA2 = (_language(2048, 16, 8, attention=_GROUPED, mlp=_LLAMA_MLP, pairs=24, every=1, vocabulary=32000),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How the MoE of a model is wired and run.

    Attributes:
        top_k: routed experts of a token.
        shared: whether there is a shared expert.
        position: of the shortcut; None: none.
        chunks: of a pipelined layer.
    """

    top_k: int
    shared: bool = False
    position: Position | None = None
    chunks: int = 1


TOP1, TOP2, TOP3 = Method(top_k=1), Method(top_k=2), Method(top_k=3)
SHARED = Method(top_k=1, shared=True)
POS1, POS2, POS3 = (Method(top_k=1, shared=True, position=at) for at in (Position.POS1, Position.POS2, Position.POS3))
SCMOE_2 = replace(POS2, top_k=2)


def _span(net: Net, method: Method) -> Span:
    """A group with its MoE, whatever the method: without a shortcut the layer alone waits, or flies in chunks."""
    moe = Moe(experts=net.experts, top_k=method.top_k, width=net.mlp.width, gated=net.mlp.gated)
    block = (net.attention, net.mlp) * (net.every - 1) + (net.attention,)
    shared = (net.mlp,) if method.shared else ()
    ops = (*block, *shared, GroupEnd())
    if method.position is None or not net.shortcut:
        shape = SpanShape(len(ops), (RoutedCall(tap=len(block), landing=len(ops) - 1),))
        overlap = Overlap.OFF if method.chunks == 1 else Overlap.FIXED
        return Span(ops=ops, calls=(moe,), shape=shape, overlap=overlap, chunks=(method.chunks,))
    config = ScMoEConfig(shortcut=Shortcut.SCMOE, shortcut_position=(method.position,), moe_every=net.every)
    return Span(ops=ops, calls=(moe,), shape=config.span_shape(0, [len(block)]), chunks=(1, 2, 4))


def workload(net: Net, method: Method, gpus: int) -> Workload:
    """Layers of one width, by one method."""
    ops: list[Op] = [net.attention, net.mlp] * net.dense
    ops += [_span(net, method)] * net.pairs
    if net.vocabulary:
        ops = [Embedding(), *ops, Output()]
    return Workload(
        stages=(tuple(ops),),
        hidden=net.hidden,
        vocabulary=net.vocabulary,
        seq_length=net.tokens,
        micro_batch=net.sequences,
        global_batch=net.sequences * gpus,
        layout=Layout(gpus=gpus, ep=min(gpus, net.experts)),
        training=Training(expert_rows=net.capacity),
    )


def steps(nets: Iterable[Net], method: Method, where: Machine, gpus: int, *, training: bool) -> list[Prediction]:
    """A step of all layers, by their width."""
    return [predict(workload(net, method, gpus), where, forward_only=not training) for net in nets]


def step_s(nets: Iterable[Net], method: Method, where: Machine, gpus: int, *, training: bool) -> float:
    """Its seconds."""
    return sum(step.step_s for step in steps(nets, method, where, gpus, training=training))


def machine_of(place: str, nets: tuple[Net, ...], constants: Constants) -> Machine:
    """The machine of a scenario, whose links are such that the all-to-all has its stated share of the top-2 layer.

    Args:
        place: key of ``SHARES``.
        nets: the model; of several widths, those with a shortcut count.
        constants: of kernels.
    """
    hardware = replace(HARDWARE[place.removeprefix("2 x ")], link=1e12, network=1e12)
    tried = Machine(hardware=hardware, constants=constants)
    communication_s, layer_s = _parts_of_layer(place, nets, tried)
    computing_s = layer_s - communication_s
    wanted_s = SHARES[place] / (1 - SHARES[place]) * computing_s
    slower = communication_s / wanted_s
    return replace(tried, hardware=replace(tried.hardware, link=1e12 * slower, network=1e12 * slower))


def _parts_of_layer(place: str, nets: tuple[Net, ...], where: Machine) -> tuple[float, float]:
    """Seconds of the all-to-all, and of the whole top-2 layer from routing to the sum, forward."""
    net = next(net for net in nets if net.shortcut)
    (span,) = predict(_group_alone(net, GPUS[place]), where, forward_only=True).spans
    (call,) = span.costs[1].forward.calls
    communication_s = call.dispatch + call.combine
    return communication_s, communication_s + call.route + call.encode + call.experts + call.decode


def _group_alone(net: Net, gpus: int) -> Workload:
    """A workload of one top-2 group alone."""
    return replace(workload(net, TOP2, gpus), stages=((_span(net, TOP2),),))


def judged(constants: Constants) -> tuple[Judged, ...]:
    """Every stated speed-up beside the predicted one, by constants of kernels."""
    figures: list[Judged] = []
    for table, place, nets, methods in TABLES:
        where, gpus = machine_of(place, nets, constants), GPUS[place]
        for number, kind in enumerate(("training", "inference")):
            base_s = step_s(nets, TOP2, where, gpus, training=not number)
            for name, method, published in methods:
                seconds = step_s(nets, method, where, gpus, training=not number)
                figures.append(
                    Judged(
                        what=f"{table}: {name}, {kind}",
                        measured=published[number],
                        predicted=base_s / seconds,
                        group=table,
                    )
                )
    return (*figures, *_pairs(constants))


def _pairs(constants: Constants) -> list[Judged]:
    """Figure 8: times of a pair of blocks forward. What it calls x% faster takes x% less time, as beside table 1."""
    figures = []
    for place, experts, relations in FIGURE_8:
        nets = swin_s(experts)
        net = next(net for net in nets if net.shortcut)
        where = machine_of(place, nets, constants)

        of_method = partial(pair, replace(net, pairs=1), where, GPUS[place])
        scmoe = of_method(POS2)
        for name, method, less in relations:
            figures.append(
                Judged(
                    what=f"{place}: ScMoE over {name}",
                    measured=1 / (1 - less),
                    predicted=of_method(method).step_s / scmoe.step_s,
                    group="figure 8",
                )
            )
        figures.append(
            Judged(
                what=f"{place}: part of the communication that ScMoE hides",
                measured=HIDDEN[place],
                predicted=scmoe.spans[0].solution.hidden_share,
                group="figure 8",
            )
        )
    return figures


def pair(net: Net, where: Machine, gpus: int, method: Method) -> Prediction:
    """One pair of blocks forward."""
    return predict(workload(net, method, gpus), where, forward_only=True)


TABLES = (
    (
        "table 1", "A30-PCIe", SWIN,
        (
            ("top-1", TOP1, (1.27, 1.39)), ("shared-expert", SHARED, (1.24, 1.35)), ("pos1", POS1, (1.36, 1.54)),
            ("pos2", POS2, (1.43, 1.66)), ("pos3", POS3, (1.49, 1.82)),
        ),
    ),
    (
        "table 2, GPT2", "A800-NVLink", GPT2_MEDIUM,
        (("shared-expert", SHARED, (1.04, 1.06)), ("pos2", POS2, (1.12, 1.17))),
    ),
    ("table 2, LLaMA2", "A800-NVLink", LLAMA2, (("shared-expert", SHARED, (1.06, 1.11)), ("pos1", POS1, (1.14, 1.21)))),
    (
        "table 4", "A800-NVLink", GPT3_XL,
        (("pos2", POS2, (1.12, 1.18)), ("top-3", TOP3, (0.94, 0.92)), ("ScMoE-2", SCMOE_2, (1.05, 1.08))),
    ),
)  # fmt: skip
_PIPELINED = (replace(TOP2, chunks=2), replace(TOP1, chunks=2))
FIGURE_8 = (
    (
        "A30-PCIe", 8,
        (
            ("shared-expert", SHARED, 0.27), ("top-2 pipelined", _PIPELINED[0], 0.42),
            ("top-1 pipelined", _PIPELINED[1], 0.15),
        ),
    ),
    ("2 x A800-NVLink", 16, (("shared-expert", SHARED, 0.24), ("top-2 pipelined", _PIPELINED[0], 0.43))),
)  # fmt: skip
HIDDEN = {"A30-PCIe": 0.70, "2 x A800-NVLink": 1.0}
