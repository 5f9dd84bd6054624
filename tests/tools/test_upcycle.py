"""Dense models become ScMoE: the function at the first step is the formula's, and training goes on from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import reference
import torch
import training
from test_longcat import convert, our_logits, tokens
from training import PLAIN, TRAINING, with_flags

MODEL = """--num-layers 4 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 48 --swiglu --normalization RMSNorm
 --position-embedding-type rope --seq-length 32 --max-position-embeddings 32 --disable-bias-linear
 --untie-embeddings-and-output-weights --init-method-std 0.1"""
DENSE = with_flags(
    f"{PLAIN} {MODEL} {TRAINING}".split(), "--vocab-size 95", "--make-vocab-size-divisible-by 96", "--lr 1e-3"
)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "save"
    flags = with_flags(DENSE, "--train-iters 60", f"--save {folder}", "--save-interval 60", "--no-save-optim")
    flags = with_flags(flags, "--lr 1e-2")
    (printed,) = ranks.run(training.train, 1, flags)
    assert "exit code" not in printed, printed[-3000:]
    return folder


def dense_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """By block: Core saves those of equal blocks in one tensor."""
    (found,) = ranks.run(training.checkpoint_tensors, 1, folder, 60)
    tensors = {name: value for name, value in found.items() if not name.startswith("decoder.layers.")}
    for name in found.keys() - tensors.keys():
        for block, value in enumerate(found[name]):
            tensors[name.replace("decoder.layers.", f"decoder.layers.{block}.")] = value
    return tensors


def upcycle(load: Path, save: Path, *more: str, source: str = "megatron", measured: bool = False) -> dict:
    done = convert(source, "megatron", load, save, *more, *([] if measured else ["--skip-change"]))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((save / "conversion.json").read_text())


def reference_of(dense: dict[str, torch.Tensor], position: str) -> torch.Tensor:
    """Logits that the formula gives: shared expert and the only expert are the dense MLP of the MoE block."""
    config = reference.ReferenceConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=2,
        ffn_hidden_size=48,
        moe_ffn_hidden_size=48,
        shared_ffn_hidden_size=48,
        num_experts=1,
        topk=1,
        moe_every=2,
        positions=(position,) * 2,
        combine="add",
        swiglu=True,
        normalization="RMSNorm",
        rotary=True,
    )
    params = {}
    for name in reference.parameter_shapes(config, vocab_size=96, max_sequence_length=32):
        theirs = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        theirs = theirs.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        theirs = theirs.replace("mlp.shared_experts.", "mlp.").replace("mlp.experts.local_experts.0.", "mlp.")
        params[name] = torch.zeros(1, 32) if name.endswith("router.weight") else dense[theirs]
    return reference.model_loss(params, tokens(), tokens(), config)[1]


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_the_function_is_the_formulas(dense_folder, tmp_path, position):
    """One expert has a gate of exactly one."""
    upcycle(dense_folder, tmp_path / "scmoe", "--experts", "1", "--position", position, "--shortcut-combine", "add")
    dense = dense_tensors(dense_folder)
    (found,) = ranks.run(our_logits, 1, tmp_path / "scmoe")
    expected = reference_of(dense, position)
    assert (found - expected[..., : found.shape[-1]]).abs().max() < 1e-4
    other = reference_of(dense, "pos1" if position != "pos1" else "pos3")
    assert (found - other[..., : found.shape[-1]]).abs().max() > 1e-3  # negative control


@pytest.mark.full
def test_the_receipt_states_the_change_of_the_function(dense_folder, tmp_path):
    receipt = upcycle(dense_folder, tmp_path / "scmoe", "--experts", "4", measured=True)
    found = receipt["verified"]["function_change_at_step_0"]
    changes = {position: change["relative_difference"] for position, change in found.items()}
    assert set(changes) == {"pos1", "pos2", "pos3"}
    (source,), (target,) = (ranks.run(our_logits, 1, folder) for folder in (dense_folder, tmp_path / "scmoe"))
    expected = float((target - source).norm() / source.norm())
    assert 0 < changes["pos2"] == pytest.approx(expected, rel=0.5)  # other tokens than the tool's
    assert len({round(change, 6) for change in changes.values()}) == 3


def mlp_of(tensors: dict[str, torch.Tensor], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = f"decoder.layers.{block}.mlp.experts.experts.linear_fc"
    return tensors[f"{prefix}1.weight"], tensors[f"{prefix}2.weight"]


def test_noise_and_drop(dense_folder, tmp_path):
    dense = dense_tensors(dense_folder)
    made = {}
    for name, flags in {
        "copied": (),
        "noise": ("--expert-noise", "0.1"),
        "dropped": ("--drop-ratio", "0.25"),
        "dropped again": ("--drop-ratio", "0.25"),
        "another seed": ("--drop-ratio", "0.25", "--seed", "5"),
    }.items():
        upcycle(dense_folder, tmp_path / name, "--experts", "2", *flags)
        (tensors,) = ranks.run(training.checkpoint_tensors, 1, tmp_path / name)
        made[name] = mlp_of(tensors, 1)
    fc1, fc2 = (dense[f"decoder.layers.1.mlp.linear_fc{i}.weight"] for i in (1, 2))
    for expert in (0, 1):
        assert torch.equal(made["copied"][0][expert], fc1) and torch.equal(made["copied"][1][expert], fc2)
        noise = (made["noise"][0][expert] - fc1).std() / fc1.std()
        assert noise == pytest.approx(0.1, rel=0.1)
        gate, up = (
            half != whole for half, whole in zip(made["dropped"][0][expert].chunk(2), fc1.chunk(2), strict=True)
        )
        changed = gate.any(dim=1)
        assert changed.sum() == 12 and torch.equal(changed, up.any(dim=1))
        assert torch.equal(changed, (made["dropped"][1][expert] != fc2).any(dim=0))
    assert not torch.equal(*made["noise"][0]) and not torch.equal(*made["dropped"][0])
    assert all(torch.equal(a, b) for a, b in zip(made["dropped"], made["dropped again"], strict=True))
    assert not torch.equal(made["dropped"][0], made["another seed"][0])


def losses(folder: Path, log: Path, *flags: str) -> dict[int, float]:
    args = [*DENSE, "--load", str(folder), "--finetune", "--use-checkpoint-args"] if folder else DENSE
    args = with_flags(
        args, "--train-iters 50", f"--tensorboard-dir {log}", "--moe-token-dispatcher-type alltoall", *flags
    )
    (printed,) = ranks.run(training.train, 1, args, timeout_s=240)
    assert "exit code" not in printed, printed[-3000:]
    return training.scalars(log, "lm loss")["lm loss"]


@pytest.mark.full
def test_training_beats_a_start_from_scratch(dense_folder, tmp_path):
    upcycle(dense_folder, tmp_path / "scmoe", "--experts", "4", "--drop-ratio", "0.5")
    found = losses(tmp_path / "scmoe", tmp_path / "log")
    scratch = [
        *("--shortcut scmoe", "--num-experts 4", "--moe-router-topk 1", "--moe-router-pre-softmax"),
        *("--moe-ffn-hidden-size 48", "--moe-shared-expert-intermediate-size 48"),
    ]
    from_scratch = losses(Path(), tmp_path / "scratch", *scratch)
    last = range(41, 51)
    assert sum(found[i] for i in last) < sum(from_scratch[i] for i in last)


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3["original_max_position_embeddings"] = 8192
DENSE_MODELS = {
    # what transformers has: class, and what is special about it
    "llama 3.0": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama 3.1": ("Llama", {"rope_parameters": {**LLAMA3, "factor": 8.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
}


def dense_model(kind: str):
    """Random, with norms and biases that matter, and nothing but zeros from every MLP that becomes an MoE."""
    import transformers

    family, changes = DENSE_MODELS[kind]
    config = {
        **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 1024},
        **{"initializer_range": 0.2, **changes},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.2 * torch.randn_like(value))
        for block in model.model.layers[1::2]:
            block.mlp.down_proj.weight.zero_()
    return model


def long_ids() -> torch.Tensor:
    """So many that stretched positions differ from others."""
    return torch.randint(96, (1, 700), generator=torch.Generator().manual_seed(5))


def long_logits(folder: Path) -> torch.Tensor:
    from checkpoints.running import model

    loaded = model.load(folder, dtype=torch.float32)
    return loaded.score(long_ids().unsqueeze(1), long_ids().unsqueeze(1), with_logits=True)[0].logits


@pytest.mark.parametrize("kind", DENSE_MODELS)
def test_a_dense_model_becomes_scmoe(tmp_path, kind):
    """Names, settings, grouped queries and gate halves: with experts that give nothing it computes what it did."""
    model = dense_model(kind)
    model.save_pretrained(tmp_path / "hf")
    upcycle(tmp_path / "hf", tmp_path / "scmoe", "--experts", "4", source="hf-dense")
    (found,) = ranks.run(long_logits, 1, tmp_path / "scmoe")
    with torch.no_grad():
        expected = model(long_ids()).logits
    assert expected.abs().max() > 1 and (found - expected).abs().max() < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("kind", DENSE_MODELS)
def test_the_receipt_of_a_dense_model_states_no_change(tmp_path, kind):
    """As above, by the tool itself, which runs both models in processes of their own."""
    dense_model(kind).save_pretrained(tmp_path / "hf")
    receipt = upcycle(tmp_path / "hf", tmp_path / "scmoe", "--experts", "4", source="hf-dense", measured=True)
    assert receipt["verified"]["function_change_at_step_0"]["pos2"]["relative_difference"] < 1e-5


def test_stretched_positions_are_another_function():
    """Negative control of the test above: without them, logits differ."""
    logits = []
    for kind in ("llama 3.0", "llama 3.1"):
        with torch.no_grad():
            logits.append(dense_model(kind)(long_ids()).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


OTHER_DENSE = {
    "other constants": ("llama 3.1", {"rope_parameters": {**LLAMA3, "factor": 8.0, "low_freq_factor": 2.0}}),
    "another length": (
        "llama 3.1",
        {"rope_parameters": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 4096}},
    ),
    "no factor": ("llama 3.1", {"rope_parameters": LLAMA3}),
    "llama 3.2": ("llama 3.1", {"rope_parameters": {**LLAMA3, "factor": 32.0}}),
    "yarn": ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    "part of a head": ("llama 3.0", {"partial_rotary_factor": 0.5}),
    "a window": ("mistral", {"sliding_window": 64}),
    "the window that Mistral has where nothing is said": ("mistral", {"sliding_window": ...}),
    "a window of Qwen's": ("qwen3", {"use_sliding_window": True, "sliding_window": 64}),
}


@pytest.mark.parametrize("case", OTHER_DENSE)
def test_other_dense_models_are_refused(tmp_path, case):
    kind, changes = OTHER_DENSE[case]
    dense_model(kind).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    done = convert("hf-dense", "megatron", tmp_path / "hf", tmp_path / "scmoe", "--experts", "4", "--skip-change")
    name = next(iter(changes))
    words = {"rope_parameters": "Megatron-Core stretches", "rope_scaling": "stretched"}.get(name, name)
    words = "sliding_window" if name == "use_sliding_window" else words
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert words in done.stderr and "Error" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


WRONG = {
    "--moe-every 3": "groups must be whole",
    "--moe-every 1": "pos2 and pos3 read a block before the last one",
    "--topk 9": "a token has experts to choose from",
    "--drop-ratio 2": "is not a number from 0 to 1",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_ways(dense_folder, tmp_path, flags):
    done = convert("megatron", "megatron", dense_folder, tmp_path / "scmoe", "--experts", "8", *flags.split())
    assert done.returncode == 2 and WRONG[flags] in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_has_a_shortcut_already_is_refused(dense_folder, tmp_path):
    upcycle(dense_folder, tmp_path / "scmoe", "--experts", "2")
    done = convert("megatron", "megatron", tmp_path / "scmoe", tmp_path / "again", "--experts", "2")
    assert done.returncode == 2 and "has a shortcut already" in done.stderr


def test_a_dense_model_that_predicts_further_tokens_is_refused(dense_folder):
    """Its prediction layer is a block with an MLP, and Megatron's would be one with experts."""
    from checkpoints.disk.torch_dist import MegatronCheckpoint
    from checkpoints.mappings import upcycle
    from checkpoints.tensors import CheckpointError

    source = MegatronCheckpoint(dense_folder)
    source.args.mtp_num_layers = 1
    with pytest.raises(CheckpointError) as refused:
        upcycle.from_megatron(source, upcycle.Upcycling(experts=2))
    line = str(refused.value)
    assert "a prediction layer is a block like the last one, which gets experts" in line and "\n" not in line
    assert "--mtp-num-layers 1" in line
    source.args.mtp_num_layers = None  # negative control
    upcycle.from_megatron(source, upcycle.Upcycling(experts=2))


@pytest.mark.parametrize("how", ["upcycled", "for the other spec"])
def test_a_tensor_that_the_source_lacks_is_missed(dense_folder, how):
    """What there should be comes from the settings, not from what there is."""
    from checkpoints.disk.torch_dist import MegatronCheckpoint
    from checkpoints.mappings import specs, upcycle
    from checkpoints.plan import check
    from checkpoints.tensors import CheckpointError

    source = MegatronCheckpoint(dense_folder)

    def conversion():
        if how == "upcycled":
            return upcycle.from_megatron(source, upcycle.Upcycling(experts=2)).conversion
        return specs.convert(source, transformer_impl="transformer_engine").conversion

    assert check(conversion(), source.infos).balanced
    source.infos = {
        name: info for name, info in source.infos.items() if name != "decoder.layers.1.mlp.linear_fc2.weight"
    }
    with pytest.raises(CheckpointError, match=r"the target would lack: 'decoder.layers.1.mlp"):
        check(conversion(), source.infos)


@pytest.fixture(scope="module")
def stock_moe_folder(tmp_path_factory):
    """Megatron's shared-expert MoE in every second block."""
    folder = tmp_path_factory.mktemp("stock") / "save"
    flags = with_flags(training.STOCK_SHARED_EXPERT, "--train-iters 2", f"--save {folder}", "--save-interval 2")
    (printed,) = ranks.run(training.train, 1, with_flags(flags, "--no-save-optim"))
    assert "exit code" not in printed, printed[-3000:]
    return folder


def test_a_stock_moe_keeps_its_experts(stock_moe_folder, tmp_path):
    """Every tensor as it was: the wiring alone is another, which the saved settings say."""
    upcycle(stock_moe_folder, tmp_path / "scmoe", "--position", "pos1")
    (before,) = ranks.run(training.checkpoint_tensors, 1, stock_moe_folder, 2)
    (after,) = ranks.run(training.checkpoint_tensors, 1, tmp_path / "scmoe")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    old, new = (ranks.run(our_logits, 1, folder)[0] for folder in (stock_moe_folder, tmp_path / "scmoe"))
    assert (old - new).abs().max() > 1e-4


STOCK_WRONG = {
    "--experts 16": "the checkpoint has experts already",
    "--drop-ratio 0.5": "the checkpoint has experts already",
    "--moe-every 4": "use --moe-every 2",
    "--shortcut-combine add": "has no place for",
}


@pytest.mark.parametrize("flags", STOCK_WRONG)
def test_wrong_ways_with_a_stock_moe(stock_moe_folder, tmp_path, flags):
    done = convert("megatron", "megatron", stock_moe_folder, tmp_path / "scmoe", *flags.split())
    assert done.returncode == 2 and STOCK_WRONG[flags] in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
