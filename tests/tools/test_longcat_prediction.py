"""LongCat-Flash's ``model.mtp`` in and out: the same numbers both ways, and what transformers' parts make of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import ranks
import torch
import training
from test_longcat import (  # noqa: F401  (fixtures among them)
    ROOT,
    SIZES,
    continued,
    convert,
    hf_folder,
    hf_model,
    is_unused,
    tensors_of,
    tokens,
)

TOLERANCE = 1e-5
MTP = "model.mtp."
LAYER = f"{MTP}layers.0."
COPY = f"{MTP}embed_tokens.weight"
HIDDEN, WIDTH = SIZES["hidden_size"], SIZES["ffn_hidden_size"]


def further_tensors(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one layer, named and shaped as vLLM reads them; random."""
    heads, nope, turning = (SIZES[name] for name in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    q_rank, kv_rank, value = (SIZES[name] for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim"))
    shapes = {
        **{f"{LAYER}eh_proj.weight": (HIDDEN, 2 * HIDDEN)},
        **{f"{LAYER}{name}.weight": (HIDDEN,) for name in ("enorm.m", "hnorm.m")},
        **{f"{LAYER}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")},
        f"{LAYER}self_attn.q_a_proj.weight": (q_rank, HIDDEN),
        f"{LAYER}self_attn.q_a_layernorm.weight": (q_rank,),
        f"{LAYER}self_attn.q_b_proj.weight": (heads * (nope + turning), q_rank),
        f"{LAYER}self_attn.kv_a_proj_with_mqa.weight": (kv_rank + turning, HIDDEN),
        f"{LAYER}self_attn.kv_a_layernorm.weight": (kv_rank,),
        f"{LAYER}self_attn.kv_b_proj.weight": (heads * (nope + value), kv_rank),
        f"{LAYER}self_attn.o_proj.weight": (HIDDEN, heads * value),
        **{f"{LAYER}transformer_layer.mlp.{name}_proj.weight": (WIDTH, HIDDEN) for name in ("gate", "up")},
        f"{LAYER}transformer_layer.mlp.down_proj.weight": (HIDDEN, WIDTH),
        f"{MTP}norm.weight": (HIDDEN,),
    }
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, shape in shapes.items():
        value = 0.1 * torch.randn(shape, generator=generator)
        found[name] = value + 1 if "norm" in name else value
    return {COPY: embedding.clone(), **found}


def write(source: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """``source`` as it is published, with a prediction layer; ``changes`` of its tensors, None for one that is gone."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: value for name, value in tensors_of(source).items() if not is_unused(name)}
    tensors |= further_tensors(tensors["model.embed_tokens.weight"])
    tensors |= {name: value for name, value in changes.items() if value is not None}
    for name in (name for name, value in changes.items() if value is None):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def published(hf_folder, tmp_path_factory) -> Path:  # noqa: F811
    return write(hf_folder, tmp_path_factory.mktemp("predicting") / "hf")


@pytest.fixture(scope="module")
def megatron(published, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predicting") / "megatron"
    done = convert("hf-longcat", "megatron", published, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys() and sum(name.startswith(MTP) for name in ours) == 17
    for name, value in ours.items():
        assert value.dtype is theirs[name].dtype and torch.equal(value, theirs[name]), name


def test_there_and_back_bit_for_bit(published, megatron, tmp_path):
    """The copy of the embedding too, which has no place in between; the receipt says so."""
    receipt = json.loads((megatron / "conversion.json").read_text())
    assert [one["names"] for one in receipt["dropped"] if "number for number" in one["reason"]] == [[COPY]]
    done = convert("megatron", "hf-longcat", megatron, tmp_path / "hf", "--verify")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(tmp_path / "hf", published)


def test_trained_in_another_layout_it_comes_back(published, megatron, tmp_path):
    """Loaded by a run on two tensor-parallel ranks, whose log has the loss, and saved without a step of learning."""
    flags = ("--save", str(tmp_path / "save"), "--save-interval", "1", "--no-save-optim")
    flags += ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1")
    still = ("--train-iters", "1", "--lr", "0", "--moe-router-bias-update-rate", "0")
    continued(megatron, 2, *flags, *still, "--tensorboard-dir", str(tmp_path / "log"))
    assert 0 < training.scalars(tmp_path / "log", "mtp_1 loss")["mtp_1 loss"][1] < 20
    done = convert("megatron", "hf-longcat", tmp_path / "save", tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(tmp_path / "hf", published)


def expected_loss(model, tensors: dict[str, torch.Tensor]) -> float:
    """Mean cross entropy of the token after the next, by transformers' attention, MLP and norms."""
    from transformers.models.longcat_flash import modeling_longcat_flash as theirs

    def part(module: torch.nn.Module, name: str) -> torch.nn.Module:
        module.load_state_dict({key[len(name) :]: tensors[key] for key in tensors if key.startswith(name)})
        return module.eval()

    def norm(name: str) -> torch.nn.Module:
        return part(theirs.LongcatFlashRMSNorm(HIDDEN, eps=model.config.rms_norm_eps), f"{name}.")

    ids = tokens()
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    embedded = model.model.embed_tokens(ids[:, 1:])
    both = torch.cat([norm(f"{LAYER}enorm.m")(embedded), norm(f"{LAYER}hnorm.m")(hidden)], dim=-1)
    mixed = both @ tensors[f"{LAYER}eh_proj.weight"].T
    length = mixed.shape[1]
    mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
    attention = part(theirs.LongcatFlashMLA(model.config, layer_idx=0), f"{LAYER}self_attn.")
    turned = model.model.rotary_emb(mixed, torch.arange(length)[None])
    mixed = mixed + attention(norm(f"{LAYER}input_layernorm")(mixed), turned, mask)[0]
    mlp = part(theirs.LongcatFlashMLP(model.config), f"{LAYER}transformer_layer.mlp.")
    mixed = mixed + mlp(norm(f"{LAYER}post_attention_layernorm")(mixed))
    logits = model.lm_head(norm(f"{MTP}norm")(mixed))
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 2:].flatten()).item()


def our_loss(folder: Path) -> float:
    """What Megatron logs for the same tokens, in a model that has the prediction layer of the checkpoint."""
    sys.path.insert(0, str(ROOT / "tools"))
    from checkpoints.disk.torch_dist import MegatronCheckpoint
    from checkpoints.running import megatron_model
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    source = MegatronCheckpoint(folder)
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    layout = dict.fromkeys((*names, "expert_tensor_parallel_size"), 1)
    args, scmoe = megatron_model.arguments(source, layout, torch.float32)
    for name in ("mtp_num_layers", "hybrid_layer_pattern"):
        setattr(args, name, getattr(source.args, name, None))
    parallel_state.initialize_model_parallel(**layout)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = megatron_model._built(args, scmoe)
    megatron_model._load_weights(model, source, args)
    ids = tokens()
    labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], dim=1)
    mask = torch.ones(ids.shape)
    mask[:, -1] = 0
    model.train()
    model(ids, torch.arange(ids.shape[1]).expand_as(ids), None, labels=labels, loss_mask=mask)
    return MTPLossLoggingHelper.tracker["loss_values"].item()


def test_it_is_the_layer_of_transformers_parts(hf_model, published, megatron):  # noqa: F811
    """And with norms or halves of the projection exchanged it is not (negative controls)."""
    tensors = tensors_of(published)
    with torch.no_grad():
        expected = expected_loss(hf_model, tensors)
        exchanged = dict(tensors)
        exchanged[f"{LAYER}enorm.m.weight"] = tensors[f"{LAYER}hnorm.m.weight"]
        exchanged[f"{LAYER}hnorm.m.weight"] = tensors[f"{LAYER}enorm.m.weight"]
        halves = tensors[f"{LAYER}eh_proj.weight"].chunk(2, dim=1)
        turned = {**tensors, f"{LAYER}eh_proj.weight": torch.cat(halves[::-1], dim=1)}
        wrong = [expected_loss(hf_model, other) for other in (exchanged, turned)]
    (found,) = ranks.run(our_loss, 1, megatron)
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert all(found != pytest.approx(one, rel=10 * TOLERANCE) for one in wrong)


def test_a_hybrid_model_has_it_too(published, megatron, tmp_path):
    """Behind the / of its pattern: the same loss, and the same folder of it."""
    done = convert("hf-longcat", "megatron", published, tmp_path / "hybrid", "--container", "hybrid")
    assert done.returncode == 0, done.stderr[-2000:]
    settings = json.loads((tmp_path / "hybrid" / "conversion.json").read_text())["options"]
    assert settings["container"] == "hybrid"
    losses = [ranks.run(our_loss, 1, folder) for folder in (megatron, tmp_path / "hybrid")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    done = convert("megatron", "hf-longcat", tmp_path / "hybrid", tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(tmp_path / "hf", published)


CHANGED = {
    "an embedding of its own": ({COPY: torch.zeros(SIZES["vocab_size"], HIDDEN)}, "is another one"),
    "scales of a quantization": ({f"{LAYER}eh_proj.weight_scale_inv": torch.ones(1)}, "has model.mtp.layers.0.eh_proj"),
    "a norm that is gone": ({f"{MTP}norm.weight": None}, f"lacks {MTP}norm.weight"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_has_no_place_is_left_out_and_named(hf_folder, tmp_path, name):  # noqa: F811
    """All of ``model.mtp`` then, and in one line; the rest comes in."""
    changes, words = CHANGED[name]
    folder = write(hf_folder, tmp_path / "hf", **changes)
    done = convert("hf-longcat", "megatron", folder, tmp_path / "megatron")
    assert done.returncode == 0, done.stderr[-2000:]
    receipt = json.loads((tmp_path / "megatron/conversion.json").read_text())
    ((reason, names),) = [(one["reason"], one["names"]) for one in receipt["dropped"] if words in one["reason"]]
    assert set(names) == {name for name in tensors_of(folder) if name.startswith(MTP)} and reason in done.stdout
