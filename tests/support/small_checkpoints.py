"""A small checkpoint of every format that tools/convert_checkpoint.py reads, made of names and shapes alone."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from checkpoint_files import TOOLS, write_hf
from checkpoints.mappings import megatron_settings
from checkpoints.mappings.dense import dense_args
from checkpoints.mappings.links import Link, links
from checkpoints.mappings.longcat import longcat_links
from checkpoints.mappings.longcat_settings import megatron_args

assert TOOLS  # it makes them importable

DENSE = {
    **{"model_type": "llama", "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
    **{"tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10000.0, "torch_dtype": "float32"},
}
LONGCAT = {
    **{"model_type": "longcat_flash", "vocab_size": 24, "hidden_size": 16, "num_layers": 2, "ffn_hidden_size": 12},
    **{"num_attention_heads": 2, "expert_ffn_hidden_size": 8, "n_routed_experts": 4, "zero_expert_num": 2},
    **{"moe_topk": 3, "routed_scaling_factor": 6.0, "q_lora_rank": 8, "kv_lora_rank": 4, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 6, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
    **{"rope_theta": 10000.0, "tie_word_embeddings": False},
}
# How each is made of another one, by the tool.
MADE = {
    "megatron": ("hf-dense", "--experts", "4"),
    "hf-scmoe": ("megatron",),
    "megatron of longcat": ("hf-longcat",),
}


def _drawn(all_links: Iterable[Link]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {name: shape for link in all_links for name, shape in link.theirs}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def dense(folder: Path, **sizes: int) -> Path:
    """A Llama, of other sizes than ``DENSE`` where they are given."""
    config = DENSE | sizes
    args = megatron_settings.complete(Namespace(**dense_args(config, "here")))
    return write_hf(folder, _drawn(links(args)), config=config)


def longcat(folder: Path, **sizes: int) -> Path:
    """A LongCat-Flash, without tensors of zero experts, of other sizes than ``LONGCAT`` where they are given."""
    config = LONGCAT | sizes
    args = megatron_settings.complete(Namespace(**megatron_args(config)))
    return write_hf(folder, _drawn(longcat_links(args)), config=config)


def all_formats(home: Path, first: Callable[[Path], object] = lambda dense: None) -> dict[str, Path]:
    """Folders by format; that of ``megatron`` is an upcycled ScMoE. ``first`` is called with the dense model's."""
    import convert_checkpoint as tool

    made = {"hf-dense": dense(home / "hf-dense"), "hf-longcat": longcat(home / "hf-longcat")}
    first(made["hf-dense"])
    for name, (origin, *more) in MADE.items():
        words = ["--from", origin, "--to", name.split()[0], "--load", str(made[origin]), "--save", str(home / name)]
        assert tool.main([*words, *more, *(["--skip-change"] if more else [])]) == 0
        made[name] = home / name
    return made


def with_common_file(folder: Path) -> None:
    """Settings in a file of their own, as older versions of Megatron have them."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (key,) = (key for key in metadata.storage_data if key.fqn.startswith("common_state/"))
    place = metadata.storage_data.pop(key)
    del metadata.state_dict_metadata[key.fqn]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    data = (folder / place.relative_path).read_bytes()[place.offset :][: place.length]
    (state,) = torch.load(io.BytesIO(data), weights_only=False)
    torch.save(state, folder / "common.pt")
