"""LongCat-Flash in and out: a random LongcatFlash of transformers, converted, computes the same and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import numpy
import pytest
import ranks
import torch
import training
from cases import cases

ROOT = Path(__file__).resolve().parents[2]
CONVERT = ROOT / "tools/convert_checkpoint.py"
sys.path.insert(0, str(CONVERT.parent))
import score  # noqa: E402

TOLERANCE = 1e-4
VOCAB, LENGTH = 96, 24
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 144,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 8,
    "zero_expert_num": 4,
    "moe_topk": 3,
    "routed_scaling_factor": 6.0,
    "q_lora_rank": 48,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def hf_model():
    """Random, with norms that are not all ones and a correction bias that changes choices."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    torch.manual_seed(0)
    model = LongcatFlashForCausalLM(LongcatFlashConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(0.2 * torch.randn_like(value))
            if name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight")):
                value[: SIZES["kv_lora_rank"]].mul_(0.01)  # latents so small that their norms' epsilon matters
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.05 * torch.randn_like(value))
    return model


@pytest.fixture(scope="module")
def hf_folder(hf_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("longcat") / "hf"
    hf_model.save_pretrained(folder)
    return folder


def convert(source: str, target: str, load: Path, save: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return commands.run(CONVERT, "--from", source, "--to", target, "--load", load, "--save", save, *more, timeout_s=300)


@pytest.fixture(scope="module")
def megatron_folder(hf_folder, tmp_path_factory):
    """As a user converts it, on a command line."""
    folder = tmp_path_factory.mktemp("longcat") / "megatron"
    command = [
        sys.executable,
        CONVERT,
        "--from",
        "hf-longcat",
        "--to",
        "megatron",
        "--load",
        hf_folder,
        "--save",
        folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def hf_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def our_logits(folder: Path, **layout: int) -> torch.Tensor | None:
    """Of ``tokens`` on every rank; None where this rank has none."""
    sys.path.insert(0, str(ROOT / "tools"))
    from checkpoints.running import model

    loaded = model.load(folder, dtype=torch.float32, **layout)
    scores = loaded.score(tokens().unsqueeze(1), tokens().unsqueeze(1), with_logits=True)
    return torch.cat([one.logits for one in scores]) if loaded.collects else None


LAYOUTS = {
    "one rank": (1, {}),
    "ep2": (2, {"expert": 2, "expert_tensor": 1}),
    "tp2": (2, {"tensor": 2, "expert_tensor": 1}),
    "tp2 ep2": (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    "pp2": (2, {"pipeline": 2, "expert_tensor": 1}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_transformers(hf_model, megatron_folder, layout):
    num_ranks, sizes = LAYOUTS[layout]
    expected = hf_logits(hf_model)
    found = [logits for logits in ranks.run(our_logits, num_ranks, megatron_folder, **sizes) if logits is not None]
    assert found
    for logits in found:
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("wrong", ["bias", "scaling", "latent epsilon", "latent scale"])
def test_what_others_got_wrong_is_noticed(hf_model, megatron_folder, wrong):
    """Negative controls: with this mistake in the model of transformers, logits differ."""
    import copy

    model = copy.deepcopy(hf_model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if wrong == "bias" and name.endswith("router"):
                module.e_score_correction_bias.zero_()
            if wrong == "scaling" and name.endswith("router"):
                module.routed_scaling_factor = 1.0
            if wrong == "latent epsilon" and name.endswith("_a_layernorm"):
                module.variance_epsilon = 1e-5
            if wrong == "latent scale" and name.rpartition(".")[0].endswith("self_attn"):
                module.mla_scale_q_lora = 1.0
    (found,) = ranks.run(our_logits, 1, megatron_folder)
    assert (found - hf_logits(model)).abs().max() > 10 * TOLERANCE


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Bit for bit; what transformers saves for experts without parameters is there, with zeros in it."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys() and any(map(is_unused, theirs))
    for name, value in ours.items():
        assert value.dtype is theirs[name].dtype and value.shape == theirs[name].shape
        assert is_unused(name) or torch.equal(value, theirs[name]), name


PREDICTION = "model.mtp.layers.0.weight"  # of a layer that predicts further tokens
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def is_unused(name: str) -> bool:
    return any(f".mlp.experts.{expert}." in name for expert in range(8, 12))


@pytest.fixture(scope="module")
def published_folder(hf_folder, tmp_path_factory):
    """As LongCat-Flash is published: no tensors of zero experts, a layer that predicts, and code of its own."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("longcat") / "published"
    folder.mkdir()
    config = json.loads((hf_folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_longcat_flash.LongcatFlashForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in COMPANIONS:
        (folder / name).write_text(f'{{"of": "{name}"}}')
    (folder / "modeling_longcat_flash.py").write_text("raise SystemExit('code of the folder has run')\n")
    tensors = {name: value for name, value in load_file(hf_folder / "model.safetensors").items() if not is_unused(name)}
    tensors[PREDICTION] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("verify", cases(["", "--verify"], [""]))
def test_published_checkpoints_have_no_tensors_of_zero_experts(published_folder, tmp_path, verify):
    """They come in and go out, and the way back writes none either; in the full test compared on both ways."""
    done = convert("hf-longcat", "megatron", published_folder, tmp_path / "megatron", *verify.split())
    assert done.returncode == 0, done.stderr[-2000:]
    receipt = json.loads((tmp_path / "megatron/conversion.json").read_text())
    if verify:
        assert receipt["verified"]["passed"] and receipt["verified"]["largest_difference"] < TOLERANCE
    assert [entry["names"] for entry in receipt["dropped"] if "predict further tokens" in entry["reason"]] == [
        [PREDICTION]
    ]
    done = convert("megatron", "hf-longcat", tmp_path / "megatron", tmp_path / "again", *verify.split())
    assert done.returncode == 0, done.stderr[-2000:]
    again, tensors = tensors_of(tmp_path / "again"), tensors_of(published_folder)
    assert again.keys() == tensors.keys() - {PREDICTION}
    assert all(torch.equal(value, tensors[name]) for name, value in again.items())
    for name in COMPANIONS:
        assert (tmp_path / "again" / name).read_bytes() == (published_folder / name).read_bytes()


def scored(folder: Path, output: Path) -> dict:
    numpy.save(output.with_suffix(".npy"), tokens().numpy())
    words = ["--load", str(folder), "--output", str(output), "--input", str(output.with_suffix(".npy"))]
    assert score.main(words) == 0
    return json.loads((output / "summary.json").read_text())["total"]


def test_both_layouts_have_the_same_score(hf_folder, published_folder, tmp_path):
    assert scored(published_folder, tmp_path / "published") == scored(hf_folder, tmp_path / "saved")


def test_no_forward_pass_reads_what_published_checkpoints_lack(hf_model):
    """NaN in these rows of transformers' class, and not a bit of the logits changes."""
    import copy

    model = copy.deepcopy(hf_model)
    filled = 0
    for module in model.modules():
        if hasattr(module, "zero_expert_num"):
            module.gate_up_proj.data[module.num_routed_experts :] = torch.nan
            filled += 1
    assert filled == SIZES["num_layers"] and torch.equal(hf_logits(model), hf_logits(hf_model))
    next(module for module in model.modules() if hasattr(module, "zero_expert_num")).gate_up_proj.data[:] = torch.nan
    assert hf_logits(model).isnan().any()  # negative control


def test_back_again_bit_for_bit(hf_model, hf_folder, megatron_folder, tmp_path):
    """And transformers loads the result, which computes what it did."""
    from transformers import AutoModelForCausalLM

    done = convert("megatron", "hf-longcat", megatron_folder, tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_tensors(tmp_path / "hf", hf_folder)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not found["mismatched_keys"]
    assert torch.equal(hf_logits(again.eval()), hf_logits(hf_model))


def test_receipt_accounts_for_every_tensor(hf_folder, megatron_folder):
    receipt = json.loads((megatron_folder / "conversion.json").read_text())
    in_source = tensors_of(hf_folder)
    assert "transformers saves these and never reads them" in json.dumps(receipt)
    dropped = list(filter(is_unused, in_source))
    assert all(name in json.dumps(receipt) for name in dropped)


CONTINUE = """--use-checkpoint-args --finetune --micro-batch-size 2 --global-batch-size 8 --lr 3e-3 --train-iters 20
 --lr-decay-style constant --eval-iters 1 --eval-interval 1000 --log-interval 1 --mock-data --num-workers 0
 --tokenizer-type NullTokenizer --vocab-size 95 --make-vocab-size-divisible-by 96 --seq-length 16
 --no-create-attention-mask-in-dataloader --distributed-backend gloo --moe-router-bias-update-rate 0.01
 --moe-router-load-balancing-type none --transformer-impl local --moe-token-dispatcher-type alltoall"""


def train(flags: list[str]) -> str:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's rule for tensor parallelism
    return training.train(flags)


def continued(folder: Path, num_ranks: int, *more: str) -> dict[str, dict[int, float]]:
    flags = [*training.PLAIN.split(), *CONTINUE.split(), "--load", str(folder), *more]
    log = Path(more[more.index("--tensorboard-dir") + 1])
    printed = ranks.run(train, num_ranks, flags, timeout_s=240)
    assert "exit code" not in printed[0], printed[0][-3000:]
    return training.scalars(log, "lm loss", "grad-norm")


def test_training_goes_on(megatron_folder, tmp_path):
    """20 steps on two ranks: the loss falls, and the biases move by Megatron's rule."""
    save = tmp_path / "save"
    flags = (
        "--tensorboard-dir",
        str(tmp_path / "log"),
        "--save",
        str(save),
        "--save-interval",
        "20",
        "--no-save-optim",
    )
    losses = continued(megatron_folder, 2, "--expert-model-parallel-size", "2", *flags)["lm loss"]
    assert len(losses) == 20 and all(numpy.isfinite(list(losses.values())))
    assert losses[20] < losses[1] - 0.3
    (before,) = ranks.run(training.checkpoint_tensors, 1, megatron_folder)
    (after,) = ranks.run(training.checkpoint_tensors, 1, save, 20)
    for name in (name for name in after if name.endswith("expert_bias")):
        moved = (after[name] - before[name]) / 0.01
        assert moved.abs().max() <= 20 and torch.allclose(moved, moved.round(), atol=1e-2) and moved.any()


def test_trained_elsewhere_it_still_comes_back(published_folder, tmp_path):
    """A change of layout in between: saved on two ranks with tensor parallelism, without a step of learning.

    What the training does not know of the source comes back too: settings in config.json, and no zero experts' tensors.
    """
    done = convert("hf-longcat", "megatron", published_folder, tmp_path / "megatron")
    assert done.returncode == 0, done.stderr[-2000:]
    save = tmp_path / "save"
    flags = ("--save", str(save), "--save-interval", "1", "--no-save-optim", "--tensorboard-dir", str(tmp_path / "log"))
    flags += ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1")
    still = ("--train-iters", "1", "--lr", "0", "--moe-router-bias-update-rate", "0")
    continued(tmp_path / "megatron", 2, *flags, *still)
    done = convert("megatron", "hf-longcat", save, tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-2000:]
    found, tensors = tensors_of(tmp_path / "hf"), tensors_of(published_folder)
    assert found.keys() == tensors.keys() - {PREDICTION}
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (published_folder, tmp_path / "hf"))
    del before["auto_map"]
    assert before.items() <= after.items() and "initializer_range" in before


CHANGES = {
    "norm_topk_prob": (True, "weights are not made to sum to one"),
    "zero_expert_type": ("drop", "zero experts give a token back as it is"),
    "n_group": (4, "all experts are one group"),
    "model_type": ("llama", "seems to be hf-dense, and --from is hf-longcat; use --from hf-dense"),
    "ngram_vocab_size_ratio": (2, "no n-gram embeddings"),
    "moe_topk": (None, "moe_topk is None in"),
    "moe_topk ": (13, "a token has 12 experts to choose from"),
    "rms_norm_eps": (float("inf"), "rms_norm_eps is inf in"),
    "vocab_size": (96.0, "vocab_size is 96.0 in"),
    "num_layers ": (10**9, "num_layers is 1000000000 in"),
    "head_dim": (16, "make them equal"),
    "num_layers": (3, "tensors that the source lacks"),
    "hidden_size": (128, "has another shape than config.json says"),
    "rope_scaling": ({"type": "yarn", "factor": 4.0}, "rotary positions are not stretched"),
    "rope_theta": (10.5, "the rotary base is a whole number"),
    "rope_parameters": ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "rotary positions are not stretched"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_models_are_refused(hf_folder, tmp_path, name):
    value, words = CHANGES[name]
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in hf_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((hf_folder / "config.json").read_text()) | {name.strip(): value}
    if name == "rope_theta":
        config["rope_parameters"] = None  # where older ones have it
    (folder / "config.json").write_text(json.dumps(config))
    done = convert("hf-longcat", "megatron", folder, tmp_path / "megatron")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "megatron").exists()


def test_a_model_of_another_form_is_refused(tmp_path):
    flags = training.with_flags(training.SCMOE, "--train-iters 1", f"--save {tmp_path}/save", "--save-interval 1")
    (printed,) = ranks.run(training.train, 1, flags)
    assert "exit code" not in printed, printed[-3000:]
    done = convert("megatron", "hf-longcat", tmp_path / "save", tmp_path / "hf")
    assert done.returncode == 2 and "a LongcatFlash model has" in done.stderr, done.stderr
    assert "use --to hf-scmoe" in done.stderr


LOST = {
    **{"rotary_percent": 0.5, "mscale_all_dim": 1.0, "moe_router_num_groups": 2, "q_lora_rank": None},
    # what the other way out of Megatron refuses too
    **{"layernorm_zero_centered_gamma": True, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0},
    **{"moe_mlp_glu_interleave_size": 32, "softmax_type": "off-by-one", "use_mup": True},
    **{"moe_apply_probs_on_input": True, "window_size": (4, 0), "rotary_interleaved": True},
    **{"rotary_seq_len_interpolation_factor": 2, "no_rope_freq": [0, 1]},
    "moe_router_load_balancing_type": "sinkhorn",
}
FLAGS = {"layernorm_zero_centered_gamma": "apply_layernorm_1p"}  # of other names than their settings


@pytest.mark.parametrize("setting", LOST)
def test_settings_that_would_be_lost_are_refused(megatron_folder, setting):
    from checkpoints.disk.torch_dist import MegatronCheckpoint
    from checkpoints.mappings import longcat
    from checkpoints.tensors import CheckpointError

    source = MegatronCheckpoint(megatron_folder)
    vars(source.args)["moe_router_topk_scaling_factor"] = None  # Megatron's default
    config = json.loads(longcat.from_megatron(source).files["config.json"])
    assert config["routed_scaling_factor"] == 1.0 and "auto_map" not in config
    vars(source.args)[setting] = LOST[setting]
    with pytest.raises(CheckpointError) as refused:
        longcat.from_megatron(source)
    message = str(refused.value)
    assert FLAGS.get(setting, setting) in message.replace("-", "_") and "\n" not in message
