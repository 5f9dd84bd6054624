"""tools/inspect_checkpoint.py: what is in a checkpoint, what is wrong in it, how two differ."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import ranks
import torch
import training
from test_hf_scmoe import build_and_save
from training import ROOT, SCMOE, with_flags

TOOL = ROOT / "tools" / "inspect_checkpoint.py"
sys.path.insert(0, str(TOOL.parent))
import inspect_checkpoint as tool  # noqa: E402
from checkpoints.contents import anatomy, statistics  # noqa: E402
from checkpoints.tensors import TensorInfo  # noqa: E402

CONFIG = {"model_type": "tiny", "hidden_size": 4, "num_experts": 2, "num_experts_per_tok": 1, "vocab_size": 3}


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (3, 4),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.moe.router.weight": (2, 4),
        "model.layers.0.moe.experts.0.up_proj.weight": (5, 4),
        "model.layers.0.moe.experts.1.up_proj.weight": (5, 4),
        "model.layers.0.shared_expert.up_proj.weight": (7, 4),
        "model.layers.0.shared_expert_gate.weight": (1, 4),
        "lm_head.weight": (3, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, values, config=CONFIG):
    """A Hugging Face folder."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inspect(tmp_path, *argv):
    """Exit code, and what it wrote as JSON."""
    path = tmp_path / "result.json"
    code = tool.main([*map(str, argv), "--json", str(path)])
    return code, json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two iterations of a small ScMoE model on two ranks."""
    folder = tmp_path_factory.mktemp("trained") / "save"
    flags = with_flags(SCMOE, "--train-iters 2", "--save-interval 1", f"--save {folder}")
    flags = with_flags(flags, "--expert-model-parallel-size 2", "--untie-embeddings-and-output-weights")
    outputs = ranks.run(training.train, 2, flags, timeout_s=240)
    assert "exit code" not in outputs[0], outputs[0][-3000:]
    return folder


# --- what is in it -----------------------------------------------------------------------------------------------


def test_parameters_by_kind(tmp_path):
    code, result = inspect(tmp_path, write(tmp_path / "folder", tensors()))
    assert code == 0
    assert result["parameters"]["by_kind"] == {
        "norms": 4,
        "embedding": 12,
        "output layer": 12,
        "gates": 4,
        "router": 8,
        "shared experts": 28,
        "routed experts": 40,
        "attention": 16,
    }
    assert result["parameters"]["total"] == 124 and result["parameters"]["active"] == 124 - 20
    assert result["bytes"] == 4 * 124 and result["dtypes"] == {"float32": 9}
    assert result["architecture"]["model_type"] == "tiny" and result["format"] == "Hugging Face, safetensors"


def test_zero_experts_lower_what_is_active():
    """LongCat-Flash: 12 of 512 + 256 choices; two of three visits are real."""
    infos = {"a.mlp.experts.0.up_proj.weight": TensorInfo((768, 1000), torch.bfloat16)}
    config = {"n_routed_experts": 512, "zero_expert_num": 256, "moe_topk": 12}
    assert anatomy.parameters(infos, config)["active"] == 768_000 * 12 // 768
    del config["zero_expert_num"]
    assert anatomy.parameters(infos, config)["active"] == 768_000 * 12 // 512
    assert anatomy.parameters(infos, {})["active"] is None


def test_every_tensor_of_our_models_has_a_kind(trained, tmp_path):
    code, result = inspect(tmp_path, trained)
    assert code == 0
    counts = result["parameters"]["by_kind"]
    assert "other" not in counts
    (saved,) = ranks.run(training.checkpoint_tensors, 1, trained, 2)
    model = {name: value for name, value in saved.items() if not name.startswith("optimizer.")}
    assert result["parameters"]["total"] == sum(value.numel() for value in model.values())
    hidden, ffn, experts = 32, 24, 4
    assert counts["routed experts"] == 2 * experts * 3 * hidden * ffn
    assert counts["shared experts"] == 2 * 3 * hidden * ffn
    assert counts["dense MLP"] == 2 * 3 * hidden * 48
    assert counts["attention"] == 4 * 4 * hidden * hidden
    assert counts["norms"] == (2 * 4 + 1) * hidden
    assert counts["router"] == 2 * experts * hidden and counts["gates"] == 2 * hidden
    assert result["parameters"]["active"] == result["parameters"]["total"] - counts["routed experts"] * 3 // 4


def test_active_parameters_with_prediction_layers(tmp_path):
    """By hand: each is a block like the last one, of whose four experts a token visits one, and a projection."""
    folder = tmp_path / "predicting"
    flags = with_flags(SCMOE, "--mtp-num-layers 2", "--untie-embeddings-and-output-weights")
    ranks.run(build_and_save, 1, flags, folder, torch.zeros(1, 4, dtype=torch.long), layout={})
    code, result = inspect(tmp_path, folder)
    assert code == 0
    hidden, ffn, experts, vocabulary = 32, 24, 4, 128
    moes, blocks, predictions = 2 + 2, 4 + 2, 2
    by_hand = {
        "norms": (2 * blocks + 1 + 3 * predictions) * hidden,
        "embedding": vocabulary * hidden,
        "output layer": vocabulary * hidden,
        "gates": moes * hidden,
        "router": moes * experts * hidden,
        "shared experts": moes * 3 * hidden * ffn,
        "routed experts": moes * experts * 3 * hidden * ffn,
        "prediction projections": predictions * 2 * hidden * hidden,
        "attention": blocks * 4 * hidden * hidden,
        "dense MLP": 2 * 3 * hidden * 48,
    }
    counts = result["parameters"]
    assert counts["by_kind"] == by_hand and counts["total"] == sum(by_hand.values())
    assert counts["active"] == counts["total"] - moes * 3 * 3 * hidden * ffn


def test_words_of_a_megatron_checkpoint(trained, tmp_path, capsys):
    code, result = inspect(tmp_path, trained)
    assert code == 0 and result["iteration"] == 2 and result["optimizer"]
    assert result["layout"]["expert_model_parallel_size"] == 2 and result["layout"]["world_size"] == 2
    architecture = result["architecture"]
    assert (architecture["shortcut"], architecture["shortcut_position"]) == ("scmoe", ["pos2"])
    assert (architecture["num_experts"], architecture["moe_router_topk"], architecture["num_layers"]) == (4, 1, 4)
    printed = capsys.readouterr().out
    assert "routed experts" in printed and "shortcut_position" in printed and "optimizer state: yes" in printed
    assert inspect(tmp_path, trained / "iter_0000001")[1]["iteration"] == 1


def test_it_starts_without_megatron(trained):
    program = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import inspect_checkpoint as tool;"
        f"code = tool.main([{str(trained)!r}]); bad = [m for m in sys.modules if m.split('.')[0] in"
        " ('megatron', 'transformers', 'safetensors')]; sys.exit(code or ', '.join(bad[:3]) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- figures, NaN ------------------------------------------------------------------------------------------------


def test_figures_of_each_tensor(tmp_path, capsys):
    values = tensors()
    code, result = inspect(tmp_path, write(tmp_path / "folder", values), "--norms")
    assert code == 0
    for name, value in values.items():
        found = result["figures"][name]
        assert found["norm"] == pytest.approx(float(value.double().norm()))
        assert found["mean"] == pytest.approx(float(value.double().mean()), abs=1e-12)
        assert found["std"] == pytest.approx(float(value.double().std(correction=0)))
        assert found["max_abs"] == float(value.abs().max())
    printed = capsys.readouterr().out
    assert all(name in printed for name in values)


def test_a_planted_nan_is_found(tmp_path, capsys):
    values = tensors()
    assert inspect(tmp_path, write(tmp_path / "good", values), "--scan")[0] == 0
    values["lm_head.weight"][2, 1] = math.nan
    values["model.layers.0.moe.router.weight"][0] = -math.inf
    code, result = inspect(tmp_path, write(tmp_path / "bad", values), "--scan")
    assert code == 1
    bad = {name: (f["num_nan"], f["num_inf"]) for name, f in result["figures"].items() if f["num_nan"] or f["num_inf"]}
    assert bad == {"lm_head.weight": (1, 0), "model.layers.0.moe.router.weight": (0, 4)}
    assert "2 of 9 tensors have NaN or Inf" in capsys.readouterr().out


def test_pieces_add_up(tmp_path, monkeypatch):
    """The figures do not depend on how many rows are read at once."""
    values = tensors()
    values["scalar"] = torch.tensor(2.5)
    folder = write(tmp_path / "folder", values)
    other = write(tmp_path / "other", {name: value * 1.5 for name, value in values.items()})
    whole = inspect(tmp_path, folder, other, "--norms")[1]
    monkeypatch.setattr(statistics, "STEP_BYTES", 40)
    pieces = inspect(tmp_path, folder, other, "--norms")[1]
    for name, found in whole["figures"].items():
        numbers = {key: value for key, value in found.items() if isinstance(value, float)}
        assert numbers == pytest.approx({key: pieces["figures"][name][key] for key in numbers})
    for name, found in whole["comparison"]["changed"].items():
        assert found == pytest.approx(pieces["comparison"]["changed"][name])


# --- two checkpoints ---------------------------------------------------------------------------------------------


def test_equal_checkpoints(tmp_path):
    values = tensors()
    values["lm_head.weight"][0, 0] = math.nan  # equals itself
    one, other = (write(tmp_path / name, values) for name in ("one", "other"))
    code, result = inspect(tmp_path, one, other)
    assert code == 0 and result["comparison"]["equal"] == 9 and not result["comparison"]["changed"]


def test_a_planted_difference_is_found(tmp_path, capsys):
    values = tensors()
    one = write(tmp_path / "one", values)
    name = "model.layers.0.moe.experts.1.up_proj.weight"
    before = values[name].double().norm()
    values[name][3, 2] += 0.5
    difference = float(values[name][3, 2].double() - tensors()[name][3, 2].double())
    code, result = inspect(tmp_path, one, write(tmp_path / "other", values))
    assert code == 1 and list(result["comparison"]["changed"]) == [name]
    found = result["comparison"]["changed"][name]
    assert found["changed"] == 1
    assert found["max_abs"] == pytest.approx(abs(difference))
    assert found["relative"] == pytest.approx(abs(difference) / float(before))
    assert name in capsys.readouterr().out


def test_names_shapes_and_dtypes_that_differ(tmp_path):
    values = tensors()
    one = write(tmp_path / "one", values)
    del values["lm_head.weight"]
    values["extra"] = torch.zeros(1)
    values["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 5)
    values["model.embed_tokens.weight"] = values["model.embed_tokens.weight"].bfloat16()
    code, result = inspect(tmp_path, one, write(tmp_path / "other", values))
    found = result["comparison"]
    assert code == 1
    assert (found["only_in_first"], found["only_in_second"]) == (["lm_head.weight"], ["extra"])
    assert found["other_shape"] == {"model.layers.0.self_attn.q_proj.weight": [[4, 4], [4, 5]]}
    assert found["other_dtype"] == {"model.embed_tokens.weight": ["float32", "bfloat16"]}
    assert 0 < found["changed"]["model.embed_tokens.weight"]["max_abs"] < 0.02


def test_a_nan_on_one_side_is_a_difference(tmp_path):
    values = tensors()
    one = write(tmp_path / "one", values)
    values["lm_head.weight"][1, 1] = math.nan
    code, result = inspect(tmp_path, one, write(tmp_path / "other", values))
    assert code == 1
    assert result["comparison"]["changed"]["lm_head.weight"] == {"changed": 1, "max_abs": "inf", "relative": "inf"}


def test_iterations_of_a_training(trained, tmp_path):
    code, result = inspect(tmp_path, trained / "iter_0000001", trained / "iter_0000002")
    assert code == 1 and not result["comparison"]["only_in_first"] and result["comparison"]["changed"]
    assert inspect(tmp_path, trained / "iter_0000002", trained)[0] == 0


# --- refusals ----------------------------------------------------------------------------------------------------


def test_bad_requests(trained, tmp_path, capsys):
    folder = write(tmp_path / "folder", tensors())
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([tmp_path / "gone"], "is no folder"),
        ([tmp_path / "empty"], "is no checkpoint"),
        ([folder, trained], "of one format"),
        ([folder, tmp_path / "gone"], "is no folder"),
        ([folder, "--json", tmp_path / "gone" / "a.json"], "is no folder; name another file"),
        ([folder, "--json", tmp_path / "empty"], "it is a folder; name another file"),
    ):
        assert tool.main(["--json", str(tmp_path / "result.json"), *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "result.json").exists()


def test_words_of_a_folder_reach_no_terminal(tmp_path, capsys):
    """Escape sequences and line breaks of config.json, in names and values, alone and in lists."""
    config = CONFIG | {"model_type": "tiny\x1b]0;owned\x07", "a\nb": 1, "list": ["one\ntotal  0", "\x1b[2J"]}
    folder = write(tmp_path / "fol\x1bder", tensors(), config)
    code, result = inspect(tmp_path, folder)
    printed = capsys.readouterr().out
    assert code == 0 and result["architecture"]["a\nb"] == 1
    assert all(line.isprintable() for line in printed.split("\n"))
    assert printed.count("\n  total ") == 1 and r"tiny\x1b]0;owned\x07" in printed and r"a\nb" in printed


def test_a_cut_file(tmp_path, capsys):
    folder = write(tmp_path / "folder", tensors())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert tool.main([str(folder), "--scan"]) == 2
    assert "cut short" in capsys.readouterr().err
