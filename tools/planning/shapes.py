"""Shapes of published models, from their public configurations (config.json on Hugging Face), and of their stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planning.workload import Attention, Embedding, Mamba, Mlp, Moe, Op, Output, Stage

Layer = tuple[Op, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model.

    Attributes:
        size: parameters that its name or its authors state, without prediction layers.
        hidden: width.
        vocabulary: size.
        layers: ops of each layer.
        predicting: ops of each layer that predicts a further token, the output layer once more included.
    """

    size: float
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    predicting: tuple[Layer, ...] = ()


def _pattern(pattern: str, **ops: Op) -> tuple[Layer, ...]:
    names = {"M": "mamba", "E": "moe", "*": "attention"}
    return tuple((ops[names[letter]],) for letter in pattern)


def _deepseek_v3() -> Shape:
    attention = Attention(heads=128, kv_heads=128, head_dim=128, q_latent=1536, kv_latent=512, rope_dim=64)
    moe = Moe(experts=256, top_k=8, width=2048, shared=Mlp(width=2048), limited=0.5)
    layers = ((attention, Mlp(width=18432)),) * 3 + ((attention, moe),) * 58
    return Shape(
        size=671e9, hidden=7168, vocabulary=129280, layers=layers, predicting=((attention, moe, Output(own=False)),)
    )


def _deepseek_v4_flash() -> Shape:
    """Hyper-connections, compression of keys and the indexer are left out; queries see a window and what is chosen."""

    def layer(window: int) -> Layer:
        attention = Attention(
            heads=64, kv_heads=1, head_dim=512, q_latent=1024, out_latent=1024, out_groups=8, window=window,
            shared_kv=True,
        )  # fmt: skip
        return (attention, Moe(experts=256, top_k=6, width=2048, shared=Mlp(width=2048)))

    compressed = (layer(128 + 512), layer(128 + 16))
    layers = (layer(128),) * 2 + compressed * 20 + compressed[:1]
    return Shape(
        size=284e9, hidden=4096, vocabulary=129280, layers=layers, predicting=((*layer(128), Output(own=False)),)
    )


def _gpt_oss_120b() -> Shape:
    def layer(window: int) -> Layer:
        attention = Attention(heads=64, kv_heads=8, head_dim=64, window=window)
        return (attention, Moe(experts=128, top_k=4, width=2880, bias=True))

    return Shape(size=117e9, hidden=2880, vocabulary=201088, layers=(layer(128), layer(0)) * 18)


def _qwen3(size: float, hidden: int, layers: int, heads: int, width: int) -> Shape:
    layer = (Attention(heads=heads, kv_heads=4, head_dim=128), Moe(experts=128, top_k=8, width=width))
    return Shape(size=size, hidden=hidden, vocabulary=151936, layers=(layer,) * layers)


def _nemotron_3_nano() -> Shape:
    layers = _pattern(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        mamba=Mamba(heads=64, head_dim=64, state=128, groups=8),
        attention=Attention(heads=32, kv_heads=2, head_dim=128),
        moe=Moe(experts=128, top_k=6, width=1856, gated=False, shared=Mlp(width=3712, gated=False)),
    )
    return Shape(size=31.6e9, hidden=2688, vocabulary=131072, layers=layers)


def _latent_nemotron_3(size: float, scale: int, width: int, pattern: str) -> Shape:
    """Super, and Ultra at twice its width."""
    attention = Attention(heads=32 * scale, kv_heads=2, head_dim=128)
    moe = Moe(
        experts=512, top_k=22, width=width, gated=False, latent=1024 * scale, shared=Mlp(width=2 * width, gated=False)
    )
    layers = _pattern(
        pattern, mamba=Mamba(heads=128 * scale, head_dim=64, state=128, groups=8), attention=attention, moe=moe
    )
    twice = ((attention, moe, Output(own=False)),) * 2
    return Shape(size=size, hidden=4096 * scale, vocabulary=131072, layers=layers, predicting=twice)


SHAPES = {
    "DeepSeekV3": _deepseek_v3(),
    "DeepSeekV4 Flash": _deepseek_v4_flash(),
    "GPT OSS 120B": _gpt_oss_120b(),
    "Nemotron_3_Nano": _nemotron_3_nano(),
    "Nemotron_3_Super": _latent_nemotron_3(
        120e9, 1, 2688,
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    ),
    "Nemotron_3_Ultra": _latent_nemotron_3(
        550e9, 2, 5120,
        "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
        "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    ),
    "Qwen3_235B_a22B": _qwen3(235e9, 4096, 94, 64, 1536),
    "Qwen3_30B_a3B": _qwen3(30.5e9, 2048, 48, 32, 768),
}  # fmt: skip
"""By the name in the published tables."""


def stages(shape: Shape, pp: int, vp: int, *, predicting: bool) -> tuple[Stage, ...]:
    """A model on pipeline stages.

    Layers are spread evenly over the virtual stages. Where that cannot be, embedding, output and prediction layers
    count as a layer each, as the recipes have it, and the last virtual stages get what is left.
    """
    further = shape.predicting if predicting else ()
    virtual = pp * vp
    if len(shape.layers) % virtual:
        units: list[Layer] = [(Embedding(),), *shape.layers, *further, (Output(),)]
        each = -(-len(units) // virtual)
        cut: Sequence[Sequence[Layer]] = [units[each * n : each * (n + 1)] for n in range(virtual)]
    else:
        each = len(shape.layers) // virtual
        cut = [shape.layers[each * n : each * (n + 1)] for n in range(virtual)]
        cut = [[(Embedding(),), *cut[0]], *cut[1:]]
        cut = [*cut[:-1], [*cut[-1], *further, (Output(),)]]
    return tuple(tuple(op for part in cut[stage::pp] for layer in part for op in layer) for stage in range(pp))
