"""Checkpoints of ours as Hugging Face folders: the same logits, the same bits on the way back, nothing of us in it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import ranks
import torch
import training
from cases import cases
from models import parameter
from training import ROOT, SCMOE, STOCK_SHARED_EXPERT, with_flags, without_flag

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import convert_checkpoint  # noqa: E402
from checkpoints.disk.hf_folder import HFFolder  # noqa: E402
from checkpoints.disk.torch_dist import MegatronCheckpoint  # noqa: E402
from checkpoints.mappings import longcat, megatron_settings, scmoe_settings  # noqa: E402
from checkpoints.mappings.megatron_settings import complete  # noqa: E402
from checkpoints.mappings.norms import norm_names  # noqa: E402
from checkpoints.mappings.scmoe_names import from_megatron, to_megatron  # noqa: E402
from checkpoints.plan import check  # noqa: E402
from checkpoints.tensors import CheckpointError, TensorInfo  # noqa: E402

TOLERANCE = 1e-4
TOKENS = torch.randint(63, (2, 12), generator=torch.Generator().manual_seed(3))

UNTIED = "--untie-embeddings-and-output-weights"
DGMOE = [*without_flag(SCMOE, "--moe-shared-expert-intermediate-size"), "--moe-router-topk", "2"]
LATENT = [
    "--multi-latent-attention",
    *("--qk-head-dim 8", "--qk-pos-emb-head-dim 4", "--v-head-dim 6", "--kv-lora-rank 12"),
]
PLAIN_MLP = [flag for flag in SCMOE if flag != "--swiglu"]
SIGMOID = ["--moe-router-score-function sigmoid", "--moe-router-enable-expert-bias", "--moe-router-topk 2"]

CASES = {
    "pos1": with_flags(SCMOE, "--shortcut-position pos1"),
    "pos2": with_flags(SCMOE, UNTIED),
    "pos3 add top-2": with_flags(SCMOE, "--shortcut-position pos3", "--shortcut-combine add", "--moe-router-topk 2"),
    "each group its own": with_flags(SCMOE, "--shortcut-position pos3 pos1", "--shortcut-combine cg2"),
    "moe-every 1": with_flags(SCMOE, "--shortcut-position pos1", "--moe-every 1", "--moe-router-topk 2"),
    "moe-every 3": with_flags(SCMOE, "--num-layers 6", "--moe-every 3", "--shortcut-combine cg2"),
    "dgmoe": with_flags(DGMOE, "--shortcut dgmoe"),
    "dgmoe pos3 share": with_flags(DGMOE, "--shortcut dgmoe", "--moe-share-groups 2", "--shortcut-position pos3"),
    "sigmoid": with_flags(SCMOE, *SIGMOID, "--moe-router-topk-scaling-factor 2.5", "--moe-router-dtype fp32"),
    "dgmoe sigmoid": with_flags(DGMOE, "--shortcut dgmoe", *SIGMOID),
    "router groups": with_flags(
        SCMOE,
        *("--num-experts 8", "--moe-router-topk 2", "--moe-router-num-groups 2", "--moe-router-group-topk 1"),
        "--moe-router-score-function sqrtsoftplus",
    ),
    "latent": with_flags(SCMOE, *LATENT, "--q-lora-rank 16", "--qk-layernorm", "--rope-type rope"),
    "latent yarn": with_flags(SCMOE, *LATENT, "--rotary-scaling-factor 8", "--mscale 0.7", "--mscale-all-dim 0.4"),
    "longcat": with_flags(
        SCMOE,
        *(*LATENT, "--q-lora-rank 16", "--qk-layernorm", "--rope-type rope", "--latent-scaling longcat"),
        *("--router longcat", "--zero-experts 3", "--moe-router-topk 3", "--moe-router-topk-scaling-factor 6.0"),
        *("--shortcut-combine add", UNTIED),
    ),
    "grouped queries": with_flags(
        PLAIN_MLP,
        *("--squared-relu", "--num-attention-heads 4", "--group-query-attention", "--num-query-groups 2"),
        *("--kv-channels 16", "--add-qkv-bias", "--qk-layernorm", "--rotary-percent 0.5", "--rotary-base 500"),
    ),
    "llama3 rope": with_flags(SCMOE, *("--use-rope-scaling", "--rotary-base 50000", "--shortcut-position pos1")),
    "layer norm": with_flags(
        PLAIN_MLP,
        *("--normalization LayerNorm", "--position-embedding-type learned_absolute", "--norm-epsilon 1e-3"),
        *("--qk-layernorm", "--shortcut-position pos1"),
    ),
    "stock": with_flags(
        [flag for flag in STOCK_SHARED_EXPERT if flag != "--moe-router-pre-softmax"], "--moe-router-topk 2"
    ),
    "stock every block": with_flags(
        without_flag(training.STOCK, "--moe-shared-expert-intermediate-size"), "--moe-router-topk 2"
    ),
    "bf16": with_flags(SCMOE, *SIGMOID, "--bf16"),
    "lowrank codec": with_flags(
        SCMOE, "--shortcut-position pos1", "--a2a-codec lsh", "--lsh-compensation lowrank", "--lsh-hashes 1"
    ),
}
EXACT = [name for name in CASES if name not in ("bf16", "lowrank codec")]


def build_and_save(flags: list[str], folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """On one rank: the model that ``flags`` describe, with the parameters of ``models.parameter``, saved by Core.

    Returns its logits, [b, s, v].
    """
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    from megatron_scmoe.models.container import model_config_from_args
    from megatron_scmoe.training.arguments import parse_and_validate_args

    with contextlib.redirect_stdout(io.StringIO()):
        args, scmoe, _ = parse_and_validate_args()
    config = model_config_from_args(args, scmoe)
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    model = model.to(args.params_dtype).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(parameter(name, tuple(value.shape)))
        for name, value in model.named_buffers():
            if name.endswith("expert_bias"):
                value.data = 0.2 * parameter(name, tuple(value.shape))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = model(tokens, positions, None)
    metadata = _build_sharded_state_dict_metadata(args)
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": model.sharded_state_dict(metadata=metadata),
    }
    (folder / "iter_0000001").mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        dist_checkpointing.save(state, str(folder / "iter_0000001"))
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return logits


def assembled(target, source) -> dict[str, torch.Tensor]:
    """Every tensor that the pieces of a target make, and that the account balances."""
    assert check(target.conversion, source.infos).balanced
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for piece in target.conversion.pieces:
        made = piece.make(*(source.read(*read) for read in piece.reads))
        assert TensorInfo(tuple(made.shape), made.dtype) == piece.info and made.is_contiguous(), piece.name
        parts.setdefault(piece.name, []).append((piece.row, made))
    return {
        name: made[0][1] if len(made) == 1 else torch.cat([part for _, part in sorted(made, key=lambda one: one[0])])
        for name, made in parts.items()
    }


def write(target, source, folder: Path) -> None:
    """A Hugging Face folder of one file."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(assembled(target, source), folder / "model.safetensors", metadata={"format": "pt"})
    for name, data in target.files.items():
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function of the name of a case: its checkpoint, the Hugging Face folder made of it, and the former's logits."""

    @functools.cache
    def make(case: str) -> tuple[MegatronCheckpoint, Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp("case")
        (logits,) = ranks.run(build_and_save, 1, CASES[case], folder / "megatron", TOKENS, layout={})
        source = MegatronCheckpoint(folder / "megatron")
        write(from_megatron(source), source, folder / "hf")
        return source, folder / "hf", logits

    return make


def loaded(folder: Path, **changes: object):
    """The model of a folder, with some settings changed."""
    from checkpoints.mappings.hf_scmoe.configuration_scmoe import ScMoEConfig
    from checkpoints.mappings.hf_scmoe.modeling_scmoe import ScMoEForCausalLM

    config = ScMoEConfig.from_pretrained(folder)
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    model, report = ScMoEForCausalLM.from_pretrained(folder, config=config, dtype="auto", output_loading_info=True)
    if not changes:
        assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens: torch.Tensor = TOKENS, **inputs: object) -> torch.Tensor:
    return model(tokens, **inputs).logits


# --- the same function ---


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", EXACT)
def test_logits_are_those_of_megatron(exported, case, attention):
    _, folder, expected = exported(case)
    model = loaded(folder)
    model.set_attn_implementation(attention)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=TOLERANCE)


CONTROLS = [
    ("pos1", {"shortcut_position": ["pos2"]}),
    ("pos2", {"shortcut_position": ["pos3"]}),
    ("pos2", {"shortcut_combine": "add"}),
    ("pos2", {"shortcut": "none", "moe_layer_pattern": [0, 1, 0, 1]}),
    ("pos2", {"router_pre_softmax": False}),
    ("each group its own", {"shortcut_position": ["pos1", "pos3"]}),
    ("each group its own", {"shortcut_combine": "add"}),
    ("moe-every 3", {"shortcut_position": ["pos1"]}),
    ("dgmoe", {"shortcut_position": ["pos1"]}),
    ("dgmoe pos3 share", {"shortcut_position": ["pos2"]}),
    ("sigmoid", {"routed_scaling_factor": 1.0}),
    ("sigmoid", {"router_score_function": "sqrtsoftplus"}),
    ("sigmoid", {"router_expert_bias": False}),
    ("router groups", {"router_group_topk": None}),
    ("latent", {"qk_norm": False}),
    ("latent", {"latent_scaling": "longcat"}),
    ("latent yarn", {"softmax_scale": None}),
    ("latent yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("longcat", {"latent_scaling": "none"}),
    ("longcat", {"routed_scaling_factor": 1.0}),
    ("grouped queries", {"qk_norm": False}),
    ("grouped queries", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("grouped queries", {"activation": "gelu"}),
    ("llama3 rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    ("layer norm", {"norm_eps": 1e-5}),
    ("stock", {"router_pre_softmax": True}),
]


@pytest.mark.parametrize(("case", "changes"), CONTROLS)
def test_a_wrong_setting_is_another_function(exported, case, changes):
    """The comparison above can fail: every setting in turn."""
    _, folder, expected = exported(case)
    assert (logits_of(loaded(folder, **changes)) - expected).abs().max() > 10 * TOLERANCE


def test_gates_of_dgmoe_take_different_experts(exported):
    _, folder, expected = exported("dgmoe")
    model = loaded(folder)
    for layer in model.model.layers:
        if layer.moe is not None:
            choose = layer.moe.router.forward
            layer.moe.router.forward = lambda tokens, taken=None, choose=choose: choose(tokens)
    assert (logits_of(model) - expected).abs().max() > 10 * TOLERANCE


def test_zero_experts_give_tokens_back(exported):
    _, folder, expected = exported("longcat")
    model = loaded(folder)
    for layer in model.model.layers:
        if layer.moe is not None:
            layer.moe.zero_experts = 0
    assert (logits_of(model) - expected).abs().max() > 10 * TOLERANCE


def test_bf16_keeps_biases_of_the_router_wide(exported):
    _, folder, expected = exported("bf16")
    model = loaded(folder)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    biases = {name for name in dtypes if name.endswith("expert_bias")}
    assert len(biases) == 2 and {dtypes[name] for name in biases} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in biases} == {torch.bfloat16}
    infos = HFFolder(folder).infos
    assert {name: infos[name].dtype for name in infos} == {name: dtypes[name] for name in infos}
    # Two ways of bf16 differ by roundings, and where these change a choice, by more.
    difference = (logits_of(model).float() - expected.float()).abs()
    assert difference.median() < 0.05 and expected.float().abs().max() > 1


# --- the way back ---


@pytest.mark.parametrize("case", [name for name in CASES if name != "lowrank codec"])
def test_round_trip_is_bit_equal(exported, case):
    """Tensors, and settings as far as the model depends on them."""
    source, folder, _ = exported(case)
    there = HFFolder(folder)
    target = to_megatron(there)
    back = assembled(target, there)
    assert back.keys() == source.infos.keys()
    for name, tensor in back.items():
        original = source.read(name)
        assert tensor.dtype == original.dtype and torch.equal(tensor, original), name
    args = megatron_settings.complete(source.args)
    restored = megatron_settings.complete(Namespace(**target.args))
    assert scmoe_settings.config_of(restored) == scmoe_settings.config_of(args)
    same_meaning = {"rope_type", "params_dtype", "num_query_groups", "moe_layer_freq"}
    for name, value in target.args.items():
        if name not in same_meaning:
            assert getattr(args, name) == value, name
    assert not {"load", "save", "tokenizer_model", "data_path"} & target.args.keys()


def test_round_trip_sees_a_changed_bit(exported, tmp_path):
    source, folder, _ = exported("pos2")
    tensors = assembled(from_megatron(source), source)
    tensors["model.layers.1.moe.experts.2.up_proj.weight"][3, 4] += 1
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    there = HFFolder(tmp_path)
    back = assembled(to_megatron(there), there)
    changed = {name: (back[name] != source.read(name)).nonzero().tolist() for name in back}
    assert {name: where for name, where in changed.items() if where} == {
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight": [[2, 24 + 3, 4]]
    }


def test_what_transformers_saves_comes_back(exported, tmp_path):
    """After training on in transformers; a setting that config.json lacks has its default."""
    source, folder, _ = exported("grouped queries")
    loaded(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config.pop(name) for name in ("router", "zero_experts", "latent_scaling")] == ["core", 0, "none"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    there = HFFolder(tmp_path)
    target = to_megatron(there)
    back = assembled(target, there)
    assert all(torch.equal(back[name], source.read(name)) for name in source.infos)
    config = scmoe_settings.config_of(megatron_settings.complete(Namespace(**target.args)))
    assert config == scmoe_settings.config_of(megatron_settings.complete(source.args))


def test_command_converts_both_ways(exported, tmp_path):
    source, _, expected = exported("pos2")
    for ways, load, save in (
        (("--from", "megatron", "--to", "hf-scmoe"), source.folder, tmp_path / "hf"),
        (("--from", "hf-scmoe", "--to", "megatron"), tmp_path / "hf", tmp_path / "back"),
    ):
        assert convert_checkpoint.main([*ways, "--load", str(load), "--save", str(save), "--shard-size", "50KB"]) == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits_of(loaded(tmp_path / "hf")), expected, rtol=0, atol=TOLERANCE)
    back = MegatronCheckpoint(tmp_path / "back")
    assert back.infos == source.infos
    assert all(torch.equal(back.read(name), source.read(name)) for name in source.infos)


class InMemory:
    """What a mapping makes of a source, as a source."""

    def __init__(self, target, source) -> None:
        self._tensors = assembled(target, source)
        self.infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self.folder, self.args, self.others = source.folder, Namespace(**target.args), {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._tensors[name][start:stop]


def test_longcat_is_the_model_of_transformers(tmp_path):
    """LongCat-Flash by way of Megatron's names, against the model that transformers has of its own."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    torch.manual_seed(5)
    config = LongcatFlashConfig(
        **{"vocab_size": 96, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 40},
        **{"expert_ffn_hidden_size": 24, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 3},
        **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4},
        **{"v_head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3},
    )
    theirs = LongcatFlashForCausalLM(config).eval()
    for name, bias in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(0.1 * torch.randn(bias.shape))
    theirs.save_pretrained(tmp_path / "longcat")
    there = HFFolder(tmp_path / "longcat")
    checkpoint = InMemory(longcat.to_megatron(there), there)
    write(from_megatron(checkpoint), checkpoint, tmp_path / "hf")
    expected = logits_of(theirs)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(loaded(tmp_path / "hf")), expected, rtol=0, atol=TOLERANCE)


class Renamed:
    """A checkpoint whose norms have the names of the other spec."""

    def __init__(self, source: MegatronCheckpoint, spec: str) -> None:
        names = {}
        for block in range(source.args.num_layers):
            then, now = (norm_names(source.args, one, block) for one in (source.args.transformer_impl, spec))
            prefix = f"decoder.layers.{block}."
            names |= {prefix + now[n] + part: prefix + then[n] + part for n in now for part in ("weight", "bias")}
        renamed = {old: new for new, old in names.items()}
        self._source, self._names = source, names
        self.infos = {renamed.get(name, name): info for name, info in source.infos.items()}
        self.folder, self.others = source.folder, source.others
        self.args = copy.copy(source.args)
        self.args.transformer_impl = spec

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._source.read(self._names.get(name, name), start, stop)


@pytest.mark.parametrize("case", ["pos2", "latent", "longcat", "layer norm", "dgmoe pos3 share", "stock"])
def test_checkpoints_of_transformer_engine_become_the_same_model(exported, case):
    source, folder, _ = exported(case)
    renamed = Renamed(source, "transformer_engine")
    assert renamed.infos.keys() != source.infos.keys()
    made, there = assembled(from_megatron(renamed), renamed), HFFolder(folder)
    assert made.keys() == there.infos.keys()
    assert all(torch.equal(tensor, there.read(name)) for name, tensor in made.items())
    config = json.loads((folder / "config.json").read_text())
    config["megatron"]["transformer_impl"] = "transformer_engine"
    there.config = config
    assert to_megatron(there).conversion.expected.keys() == renamed.infos.keys()


def test_the_codecs_own_parameters_stay_behind(exported):
    source, folder, _ = exported("lowrank codec")
    target = from_megatron(source)
    maps = {name for name in source.infos if "residual_map" in name}
    assert len(maps) == 4 and maps <= target.conversion.dropped.keys()
    assert any("codec" in note for note in target.conversion.notes)
    there = HFFolder(folder)
    back = to_megatron(there)
    assert "a2a_codec" not in back.args and back.conversion.expected.keys() == source.infos.keys() - maps
    _, twin, _ = exported("pos1")  # the same parameters, and no codec
    assert torch.equal(logits_of(loaded(folder)), logits_of(loaded(twin)))


# --- generation ---


@pytest.mark.parametrize(
    "case", ["pos2", "moe-every 3", "dgmoe pos3 share", "latent yarn", "longcat", "layer norm", "stock"]
)
def test_generation_with_a_cache_is_greedy_decoding_without(exported, case):
    _, folder, _ = exported(case)
    tokens = greedily_decoded(loaded(folder), 7, TOLERANCE)
    assert tokens.shape == (2, 12)


def greedily_decoded(model, num_tokens: int, tolerance: float) -> torch.Tensor:
    """With its cache, which is what is decoded without."""
    settings = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(TOKENS[:, :5], output_logits=True, return_dict_in_generate=True, **settings)
    tokens = TOKENS[:, :5]
    for step in found.logits:
        expected = logits_of(model, tokens, use_cache=False)[:, -1]
        torch.testing.assert_close(step, expected, rtol=0, atol=tolerance)
        tokens = torch.cat((tokens, expected.argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(found.sequences, tokens)
    return tokens


@pytest.mark.parametrize("case", ["pos2", "longcat", "layer norm"])
def test_padding_on_the_left_changes_nothing(exported, case):
    _, folder, _ = exported(case)
    model = loaded(folder)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), TOKENS), dim=1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    positions = (torch.arange(15) - 3).clamp(min=0).expand(2, -1)
    found = logits_of(model, padded, attention_mask=mask, position_ids=positions)[:, 3:]
    torch.testing.assert_close(found, logits_of(model), rtol=0, atol=TOLERANCE)


def test_loss_and_hidden_states(exported):
    _, folder, expected = exported("pos2")
    model = loaded(folder)
    with torch.no_grad():
        output = model(TOKENS, labels=TOKENS, output_hidden_states=True, logits_to_keep=0)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)
    assert len(output.hidden_states) == 5  # the embedding and four blocks
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    with torch.no_grad():
        assert torch.equal(model(TOKENS, logits_to_keep=2).logits, output.logits[:, -2:])


def test_gradients_reach_every_parameter(exported):
    _, folder, _ = exported("longcat")
    model = loaded(folder)
    model(TOKENS, labels=TOKENS).loss.backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert not without or all(".experts." in name for name in without)  # an expert may have got no token


ALONE = """
import json, sys
repository, folder, tokens = sys.argv[1:]
hidden = tuple(f"{repository}/{name}" for name in ("megatron_scmoe", "tools", "tests"))
sys.path = [path for path in sys.path if path != repository and not path.startswith(hidden)]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
ids = torch.tensor(json.loads(tokens))
with torch.no_grad():
    logits = model(ids).logits
generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
result = {"logits": logits.tolist(), "generated": generated.tolist(), "class": type(model).__module__}
if "with a tokenizer" in (texts := json.load(sys.stdin)):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    result |= {"ids": encoded, "texts": [tokenizer.decode(ids) for ids in encoded], "eos": tokenizer.eos_token_id}
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
assert not [file for file in files if file.startswith(hidden)]
assert not {"megatron", "megatron_scmoe", "checkpoints"} & {name.split(".")[0] for name in sys.modules}
print(json.dumps(result))
"""

TEXTS = ["with a tokenizer", "def f(x):\n\treturn x  # two  spaces\n", "  leading, \u00e9 and \u2581 too </s>", "a"]


def run_alone(folder: Path, home: Path, texts: list[str]) -> dict:
    """What a process without this repository makes of a folder."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(ROOT), str(folder), json.dumps(TOKENS.tolist())],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TOOLS)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", cases(["pos2", "longcat"], ["longcat"]))
def test_folder_needs_transformers_alone(exported, tmp_path, case):
    _, folder, expected = exported(case)
    result = run_alone(folder, tmp_path, [])
    torch.testing.assert_close(torch.tensor(result["logits"]), expected, rtol=0, atol=TOLERANCE)
    assert result["class"].startswith("transformers_modules.")
    assert len(result["generated"][0]) == TOKENS.shape[1] + 3


# --- the tokenizer ---


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    """A SentencePiece model as tools/preprocess_data.py trains them."""
    import sentencepiece
    from preprocessing.encoding import _keep_u2581

    model = io.BytesIO()
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n", "\t"],
        pad_id=3,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(_keep_u2581(model.getvalue()))
    return path


def with_tokenizer(source: MegatronCheckpoint, kind: str, model: object):
    other = copy.copy(source)
    other.args = copy.copy(source.args)
    other.args.tokenizer_type, other.args.tokenizer_model = kind, str(model)
    return other


def test_sentencepiece_models_travel(exported, tokenizer_model, tmp_path):
    import sentencepiece

    source = with_tokenizer(exported("pos2")[0], "SentencePieceTokenizer", tokenizer_model)
    target = from_megatron(source)
    assert not target.conversion.notes
    write(target, source, tmp_path / "hf")
    result = run_alone(tmp_path / "hf", tmp_path, TEXTS)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    # transformers takes the text of a special token for that token; SentencePiece does not.
    expected = []
    for text in TEXTS:
        ids = [(*model.encode(part), model.eos_id()) for part in text.split("</s>")]
        expected.append(list(itertools.chain.from_iterable(ids))[:-1])
    assert result["ids"] == expected
    assert result["texts"] == TEXTS
    assert result["eos"] == model.eos_id() == json.loads(target.files["config.json"])["eos_token_id"]


def test_sentencepiece_models_come_back(exported, tokenizer_model, tmp_path):
    """What an export wrote, and what was changed there since, goes through a checkpoint of Megatron's and out again."""
    source = with_tokenizer(exported("pos2")[0], "SentencePieceTokenizer", tokenizer_model)
    write(from_megatron(source), source, tmp_path / "hf")
    changed = json.loads((tmp_path / "hf/tokenizer_config.json").read_text()) | {"chat_template": "mine"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(changed))
    for one, other, load, save in (("hf-scmoe", "megatron", "hf", "back"), ("megatron", "hf-scmoe", "back", "again")):
        printed = io.StringIO()
        command = ["--from", one, "--to", other, "--load", str(tmp_path / load), "--save", str(tmp_path / save)]
        with contextlib.redirect_stdout(printed):
            assert convert_checkpoint.main(command) == 0
        if other == "megatron":
            flags = "--tokenizer-type SentencePieceTokenizer --tokenizer-model SAVED/tokenizer/tokenizer.model"
            assert flags in printed.getvalue()
    for name in ("tokenizer.model", "tokenizer_config.json", "tokenization_scmoe.py", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


def test_a_tokenizer_that_is_gone_is_a_note(exported, tmp_path):
    source, _, _ = exported("pos2")
    secret = tmp_path / "secret"
    secret.write_text("no SentencePiece model")
    for kind, model, said in (
        ("SentencePieceTokenizer", tmp_path / "none.model", "gone"),
        ("SentencePieceTokenizer", secret, "no SentencePiece model"),
        ("HuggingFaceTokenizer", "somebody/something", "AutoTokenizer"),
        ("NullTokenizer", None, "NullTokenizer"),
    ):
        target = from_megatron(with_tokenizer(source, kind, model))
        assert [said in note for note in target.conversion.notes] == [True]
        # Where the model may be put there later, what makes a tokenizer of it is there.
        later = {"tokenizer_config.json", "tokenization_scmoe.py"} if said == "gone" else set()
        assert set(target.files) == {"config.json", "configuration_scmoe.py", "modeling_scmoe.py"} | later


def test_hugging_face_tokenizers_are_copied(exported, tmp_path):
    source, _, _ = exported("pos2")
    for name in ("tokenizer.json", "tokenizer_config.json", "evil.py", "model.safetensors"):
        (tmp_path / name).write_text(f'{{"name": "{name}"}}')
    target = from_megatron(with_tokenizer(source, "HuggingFaceTokenizer", tmp_path))
    assert not target.conversion.notes
    assert target.files["tokenizer.json"] == b'{"name": "tokenizer.json"}'
    assert not {"evil.py", "model.safetensors"} & target.files.keys()


# --- refusals ---


def refusal(convert, source) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


REFUSED = [
    ("add_bias_linear", True, "--disable-bias-linear"),
    ("layernorm_zero_centered_gamma", True, "--apply-layernorm-1p"),
    ("mtp_num_layers", 1, "--mtp-num-layers"),
    ("attention_output_gate", True, "--attention-output-gate"),
    ("position_embedding_type", "mrope", "--position-embedding-type"),
    ("rotary_interleaved", True, "--rotary-interleaved"),
    ("window_size", (4, 0), "--window-size"),
    ("moe_latent_size", 8, "--moe-latent-size"),
    ("moe_router_load_balancing_type", "sinkhorn", "sinkhorn"),
    ("moe_router_load_balancing_type", ["quantile_balancing"], "quantile_balancing"),
    ("transformer_impl", "inference_optimized", "inference_optimized"),
    ("use_mup", True, "--use-mup"),
    ("rope_scaling_factor", 32.0, "--rope-scaling-factor"),
    ("shortcut_landing", 1, "--shortcut-landing 1"),
    ("shortcut_position", ["farskip", "farskip"], "--shortcut-position farskip"),
    ("moe_share_groups", 2, "--moe-share-groups 2"),
]


@pytest.mark.parametrize(("name", "value", "said"), REFUSED)
def test_unknown_settings_are_refused(exported, name, value, said):
    source = copy.copy(exported("pos2")[0])
    source.args = copy.copy(source.args)
    setattr(source.args, name, value)
    assert said in refusal(from_megatron, source)


def test_every_setting_is_one_that_megatron_saves(exported):
    """A misspelt name would never be refused, or always have its default."""
    saved = vars(exported("latent")[0].args)
    assert scmoe_settings._REFUSED.keys() <= saved.keys()
    assert megatron_settings.DEFAULTS.keys() - saved.keys() == {
        *("original_max_position_embeddings", "beta_fast", "beta_slow"),  # of Core's configuration, without a flag
    }


OTHER_VALUES = {
    **{"overlap": "adaptive", "overlap_chunks": 4, "expert_slot": ["1,3"], "a2a_weights_apart_above": 2.5},
    **{"overlap_interval": 7, "overlap_report": "/home/somebody/report", "a2a_codec": "lsh", "a2a_unique": "rank"},
    **{"lsh_kind": "spherical", "lsh_hashes": 5, "lsh_width": 3, "lsh_refinement": "lloyd", "lsh_seed": 99},
    "fp8_transfers": ["combine-forward"],
    **{"lsh_compensation": "paper", "lsh_rank": 3, "lsh_target_rate": 0.3, "lsh_evaluation": "centroids"},
}


def test_every_setting_of_overlap_and_codec_comes_back(exported):
    """But for the report's folder, a path of somebody's machine."""
    from checkpoints.mappings.hf_scmoe.configuration_scmoe import ScMoEConfig

    from megatron_scmoe.config.codec import CodecConfig
    from megatron_scmoe.config.overlap import OverlapConfig

    defaults = vars(OverlapConfig()) | vars(CodecConfig())
    assert OTHER_VALUES.keys() == defaults.keys(), "a new setting: does it come back?"
    assert not [name for name, value in OTHER_VALUES.items() if value == defaults[name]]
    for values in (OTHER_VALUES, OTHER_VALUES | {"a2a_weights_apart_above": math.inf}):  # which JSON does not have
        args = complete(Namespace(**(vars(exported("pos2")[0].args) | values)))
        written = json.dumps(scmoe_settings.config_of(args), allow_nan=False)
        back = scmoe_settings.args_of(ScMoEConfig(**json.loads(written)), torch.float32)
        assert {name for name, value in values.items() if back.get(name) != value} == {"overlap_report"}
        assert "somebody" not in written


def test_capacity_is_a_note(exported):
    source = copy.copy(exported("pos2")[0])
    source.args = copy.copy(source.args)
    source.args.moe_expert_capacity_factor = 1.25
    assert any("--moe-expert-capacity-factor 1.25" in note for note in from_megatron(source).conversion.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shortcut": "other"}, "shortcut is one of"),
        ({"num_hidden_layers": 5}, "every group is whole"),
        ({"hidden_size": 24}, "another shape"),
        ({"num_experts": 5}, ""),
    ],
)
def test_other_folders_are_refused(exported, changes, said):
    there = HFFolder(exported("pos2")[1])
    there.config = {**there.config, **changes}

    def convert(source):
        check(to_megatron(source).conversion, source.infos)

    assert said in refusal(convert, there)


def test_tensors_of_another_shape_or_too_many_are_refused(exported):
    source = copy.copy(exported("pos2")[0])
    infos = dict(source.infos)
    name = "decoder.layers.1.mlp.router.weight"
    source.infos = infos | {name: TensorInfo((3, 32), torch.float32)}
    assert "(3, 32)" in refusal(from_megatron, source) and name in refusal(from_megatron, source)
    source.infos = infos | {"decoder.layers.1.mlp.router.more": TensorInfo((3,), torch.float32)}
    target = from_megatron(source)
    assert "router.more" in refusal(lambda one: check(target.conversion, one.infos), source)
    source.infos = {key: info for key, info in infos.items() if key != name}
    target = from_megatron(source)
    assert name in refusal(lambda one: check(target.conversion, one.infos), source)
