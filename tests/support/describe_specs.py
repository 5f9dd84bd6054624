"""Print the block specs of every tapped op as JSON, by class names; run as a process of its own by test_specs.py.

    python describe_specs.py {local,transformer_engine}

With transformer_engine, the fake of fake_transformer_engine.py stands in where the package is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import fake_transformer_engine

CASES = [("pos1", 1), ("pos1", 2), ("pos2", 2), ("pos3", 2), ("pos2", 4)]


def name_of(thing: object) -> str:
    return getattr(thing, "__name__", str(thing))


def by_name(spec) -> dict[str, object]:
    submodules = spec.submodules
    return {
        "layer": spec.module.__name__,
        "input_layernorm": name_of(submodules.input_layernorm),
        "linear_qkv": name_of(submodules.self_attention.submodules.linear_qkv),
        "core_attention": name_of(submodules.self_attention.submodules.core_attention),
        "pre_mlp_layernorm": name_of(submodules.pre_mlp_layernorm),
        "linear_fc1": name_of(getattr(submodules.mlp.keywords["submodules"], "linear_fc1", None)),
        "keys": submodules.sharded_state_dict_keys_map,
    }


def describe(implementation: str, position: str, moe_every: int) -> dict[str, list[dict[str, object]]]:
    """The layer specs of one group, ours and Core's; and what is in a prediction layer behind it."""
    import models
    from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

    from megatron_scmoe.config import Position, ScMoEConfig, Shortcut
    from megatron_scmoe.models.specs import shortcut_block_spec

    case = models.Case(position=(position,), moe_every=moe_every, num_groups=1, predictions=1)
    transformer = models.transformer_config(case)
    transformer.transformer_impl = implementation
    config = GPTModelConfig(transformer=transformer, vocab_size=8, position_embedding_type="rope")
    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, shortcut_position=(Position(position),), moe_every=moe_every)
    return {
        "ours": [by_name(spec) for spec in shortcut_block_spec(config, None, scmoe=scmoe).layer_specs],
        "stock": [by_name(spec) for spec in default_layer_spec(config, None).layer_specs],
        "predictions": {router: prediction(config, router) for router in ("core", "longcat")},
    }


def prediction(config, router: str) -> dict[str, object]:
    from megatron.training.models.gpt import default_layer_spec, mtp_block_spec

    from megatron_scmoe.config import Router, ScMoEConfig, Shortcut
    from megatron_scmoe.models.specs import prediction_spec

    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, router=Router(router))
    stock = mtp_block_spec(config, default_layer_spec(config, None))
    (layer,) = prediction_spec(stock, model_config=config, scmoe=scmoe).layer_specs
    return by_name(layer.submodules.mtp_model_layer)


def main() -> None:
    implementation = sys.argv[1]
    if implementation == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        fake_transformer_engine.install()
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    print(json.dumps({f"{position} {every}": describe(implementation, position, every) for position, every in CASES}))


if __name__ == "__main__":
    main()
