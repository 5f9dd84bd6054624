"""Where the two specs keep their norms: the same parameters under other names.

Transformer Engine fuses a norm into the linear behind it and names it after that. Core's local spec keeps the same
names, except where it does not: the norm before an MoE, and all norms of multi-latent attention. Layers of a hybrid
model have one set of names, whichever spec they are of.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from checkpoints.mappings.layers import carries_moe, layers_of, pattern_of

SPECS = ("local", "transformer_engine")
HYBRID = "hybrid"
"""What ``norm_names`` calls the names in a hybrid model."""


def norm_names(args: Namespace, spec: str, block: int) -> Mapping[str, str]:
    """The prefix, inside block number ``block``, of each norm's parameters in a checkpoint of ``spec``, by its module.

    A prefix and ``weight`` or ``bias`` make a name. In a hybrid model a block is a layer, which has some of them.
    """
    spec = HYBRID if pattern_of(args) else spec
    latent = args.multi_latent_attention
    names = {
        "input_layernorm": "input_layernorm." if latent else "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_",
    }
    if latent if spec == "local" else carries_moe(args, block):
        names["pre_mlp_layernorm"] = "pre_mlp_layernorm."
    if latent and args.qk_layernorm:
        fused_latents = spec == "transformer_engine" and getattr(args, "latent_scaling", "none") == "none"
        for latent_of in ("q", "kv") if args.q_lora_rank else ("kv",):
            alone, in_linear = f"{latent_of}_layernorm.", f"linear_{latent_of}_up_proj.layer_norm_"
            names[f"{latent_of}_layernorm"] = "self_attention." + (in_linear if fused_latents else alone)
    return names


def renamed_norms(then: Namespace, now: Namespace) -> dict[str, str]:
    """Names of all norms' parameters with the arguments ``now``, by those with the arguments ``then``.

    The two, ``complete``, have the same blocks, whose MLPs and specs may differ.
    """
    names: dict[str, str] = {}
    for layers in zip(layers_of(then), layers_of(now), strict=True):
        old, new = (norm_names(layer.args, layer.args.transformer_impl, layer.number) for layer in layers)
        for part in ("weight", "bias"):
            prefix = layers[0].ours
            names |= {f"{prefix}{old[module]}{part}": f"{prefix}{new[module]}{part}" for module in old}
    return names
