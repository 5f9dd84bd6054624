"""Settings that no model has, and folders that are another format: one line that names them, and nothing is written."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import commands
import numpy
import pytest
import small_checkpoints
from checkpoint_files import TOOLS, engine, formats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint_formats import replace_common

sys.path.insert(0, str(TOOLS))
import atomic
import convert_checkpoint as tool
import inspect_checkpoint as inspector
import score
from checkpoints import journal
from checkpoints.disk import torch_dist_writer
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.disk.torch_saved import find_elements
from checkpoints.mappings.megatron_settings import RULES

LONGEST_S = 5.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return small_checkpoints.all_formats(tmp_path_factory.mktemp("folders"))


def call(capsys, *words: object) -> tuple[int, str]:
    """Exit code, and what was said of an error."""
    code = tool.main(list(map(str, words)))
    return code, capsys.readouterr().err


WAYS = {
    "hf-dense": ("--from", "hf-dense", "--to", "megatron", "--experts", "2", "--skip-change"),
    "hf-longcat": ("--from", "hf-longcat", "--to", "megatron"),
    "hf-scmoe": ("--from", "hf-scmoe", "--to", "megatron"),
    "megatron": ("--from", "megatron", "--to", "hf-scmoe"),
    "megatron of longcat": ("--from", "megatron", "--to", "hf-longcat"),
}


def test_as_they_are_they_convert(folders, tmp_path, capsys):
    """Negative control of all refusals below."""
    for name, words in WAYS.items():
        code, err = call(capsys, *words, "--load", folders[name], "--save", tmp_path / name)
        assert code == 0, err


def changed_config(folder: Path, copy: Path, changes: dict[str, object]) -> Path:
    """A copy of a Hugging Face folder with other settings."""
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def changed_args(folder: Path, copy: Path, changes: dict[str, object], without: tuple[str, ...] = ()) -> Path:
    """A copy of a Megatron checkpoint with other saved arguments, and ``without`` some."""
    shutil.copytree(folder, copy)
    args = vars(MegatronCheckpoint(folder).args) | changes
    args = {name: value for name, value in args.items() if name not in without}
    replace_common(copy / "release", [{"args": Namespace(**args), "iteration": 0}])
    return copy


def changed(folders: dict[str, Path], name: str, copy: Path, changes: dict[str, object]) -> Path:
    change = changed_args if name.startswith("megatron") else changed_config
    return change(folders[name], copy, changes)


def refusal(capsys, tmp_path: Path, name: str, folder: Path) -> str:
    """The one line that a conversion of ``folder`` ends with, soon, and without anything written."""
    before = sorted(tmp_path.iterdir())
    begin_s = time.monotonic()
    code, err = call(capsys, *WAYS[name], "--load", folder, "--save", tmp_path / "new")
    assert time.monotonic() - begin_s < LONGEST_S
    assert code == 2 and err.count("\n") == 1 and err.startswith("convert_checkpoint.py: error: "), err
    assert sorted(tmp_path.iterdir()) == before
    return err


NAN = math.nan
SIZE = (0, -1, 10**30, 2.5, "4", True, [], NAN)
NEEDED_SIZE = (*SIZE, None)
POSITIVE = (0, -1.0, NAN, math.inf, 1e300, "1e-5", True, None, [1])
FLAG = (1, "yes", [])
WORD = ("no such word", 5, [], True)
MANY = 10**9

ABSURD: dict[str, dict[tuple[str, ...], tuple[object, ...]]] = {
    "hf-dense": {
        (
            *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
            "max_position_embeddings",
        ): NEEDED_SIZE,
        ("num_key_value_heads", "head_dim"): SIZE,
        ("rms_norm_eps", "rope_theta"): POSITIVE,
        ("tie_word_embeddings", "use_sliding_window"): FLAG,
        ("rope_scaling", "rope_parameters"): (5, "default", [1]),
        ("num_hidden_layers",): (MANY,),
        ("num_attention_heads",): (3, 7, MANY),
        ("num_key_value_heads",): (3,),
        ("hidden_act", "model_type"): WORD,
    },
    "hf-longcat": {
        (
            *("num_layers", "vocab_size", "hidden_size", "ffn_hidden_size", "expert_ffn_hidden_size"),
            *("n_routed_experts", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "v_head_dim", "moe_topk", "max_position_embeddings"),
        ): NEEDED_SIZE,
        ("routed_scaling_factor", "rms_norm_eps", "rope_theta"): POSITIVE,
        ("zero_expert_num",): (-1, 10**30, 2.5, "4", True, []),
        ("num_layers", "n_routed_experts", "moe_topk"): (MANY,),
        ("rope_parameters",): (5, [1]),
    },
    "hf-scmoe": {
        (
            *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
            *("max_position_embeddings", "num_key_value_heads", "head_dim", "moe_every", "num_experts_per_tok"),
            "moe_intermediate_size",
        ): NEEDED_SIZE,
        ("num_experts",): (-1, 10**30, 2.5, "4", True, None, [], MANY),
        ("zero_experts",): (-1, 2.5, "4", True, None, []),
        ("num_hidden_layers",): (MANY,),
        ("norm_eps", "routed_scaling_factor"): POSITIVE,
        ("softmax_scale",): (0, NAN, "1", True),
        ("tie_word_embeddings", "qk_norm", "attention_bias", "router_pre_softmax"): (*FLAG, None),
        ("moe_share_groups",): (0, 3, 1.0, True, None),
        ("shortcut_position",): (5, "pos2", [5], None),
        ("moe_layer_pattern",): (5, [2], [True], "1"),
        ("rope_parameters", "megatron"): (5, [1], "default"),
        ("shortcut", "shortcut_combine", "router", "activation", "normalization", "attention"): WORD,
    },
    "megatron": {
        (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "padded_vocab_size"),
            *("max_position_embeddings", "moe_every", "moe_router_topk"),
        ): NEEDED_SIZE,
        ("kv_channels", "num_query_groups", "moe_ffn_hidden_size", "q_lora_rank", "seq_length"): SIZE,
        ("num_experts",): (-1, 10**30, 2.5, "4", True, [], MANY),
        ("num_layers", "moe_router_topk"): (MANY,),
        ("num_query_groups",): (3,),
        ("layernorm_epsilon", "rotary_base", "rotary_scaling_factor"): POSITIVE,
        ("rotary_percent",): (*POSITIVE, 1.5),
        ("moe_router_topk_scaling_factor",): (0, -1.0, NAN, "1", True),
        ("swiglu", "group_query_attention", "multi_latent_attention", "qk_layernorm"): (*FLAG, None),
        ("moe_layer_freq",): (0, -1, 2.5, "1", True, None, [2], [True]),
        ("moe_share_groups",): (0, True),
        ("shortcut_position",): ("pos2", [5], ["pos4"], None),
        (
            *("transformer_impl", "shortcut", "shortcut_combine", "router", "latent_scaling", "normalization"),
            *("a2a_codec", "position_embedding_type", "moe_router_score_function", "moe_router_dtype", "rope_type"),
        ): WORD,
        ("hf_config",): ("[]", "{", "[" * 10**5, 5),
    },
}
CASES = [(name, key) for name, keys in ABSURD.items() for group in keys for key in group]


@pytest.mark.parametrize(("name", "key"), sorted(set(CASES)))
def test_absurd_values_are_named(folders, tmp_path, capsys, name, key):
    """The file, the setting and its value."""
    values = [value for group, values in ABSURD[name].items() if key in group for value in values]
    for number, value in enumerate(values):
        folder = changed(folders, name, tmp_path / str(number), {key: value})
        err = refusal(capsys, tmp_path, name, folder)
        origin = f"saved arguments of {folder}" if name == "megatron" else "config.json"
        assert key in err and (ascii(value)[:50] in err or value in err) and origin in err, err


def test_every_rule_for_saved_arguments_is_asked(folders, tmp_path, capsys):
    for number, (key, rule) in enumerate(RULES.items()):
        assert not rule.holds({})
        folder = changed(folders, "megatron", tmp_path / str(number), {key: {}})
        assert f"{key} is {{}} in the saved arguments of" in refusal(capsys, tmp_path, "megatron", folder)


def test_the_rope_of_config_is_checked(folders, tmp_path, capsys):
    for number, value in enumerate((NAN, -5, 0, "x", True, [], 10**400)):
        for name in ("hf-dense", "hf-longcat", "hf-scmoe"):
            changes = {"rope_parameters": {"rope_type": "default", "rope_theta": value}}
            folder = changed(folders, name, tmp_path / f"{name} {number}", changes)
            assert "rope_theta is " in refusal(capsys, tmp_path, name, folder)


def test_missing_settings_are_named(folders, tmp_path, capsys):
    for name, key in (("hf-dense", "hidden_size"), ("hf-longcat", "moe_topk")):
        folder = changed_config(folders[name], tmp_path / name, {})
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))
        assert f"{key} is missing in {folder / 'config.json'}" in refusal(capsys, tmp_path, name, folder)
    folder = tmp_path / "megatron"
    shutil.copytree(folders["megatron"], folder)
    args = vars(MegatronCheckpoint(folder).args)
    del args["ffn_hidden_size"]
    replace_common(folder / "release", [{"args": Namespace(**args)}])
    assert "ffn_hidden_size is missing in the saved arguments of" in refusal(capsys, tmp_path, "megatron", folder)


def test_saved_arguments_without_end_are_refused(folders, tmp_path, capsys):
    endless: list[object] = []
    endless.append(endless)
    folder = changed(folders, "megatron", tmp_path / "folder", {"data_path": endless})
    assert "its saved arguments are no table of settings" in refusal(capsys, tmp_path, "megatron", folder)


def test_settings_that_contradict_one_another(folders, tmp_path, capsys):
    for number, (name, changes, said) in enumerate(
        (
            ("megatron", {"kv_channels": None, "hidden_size": 18}, "hidden_size is 18 in .* multiple of num_attention"),
            ("megatron", {"moe_layer_freq": [0, 1]}, "moe_layer_freq has 2 values"),
            ("megatron", {"moe_every": 3}, "num_layers is 4 in .* multiple of moe_every, 3"),
            ("megatron", {"shortcut_position": ["pos2"] * 3}, "shortcut_position has 3 values"),
            ("megatron", {"num_experts": None}, "num_experts is None in"),
            ("megatron", {"num_experts": 40}, "num_experts is 40 in .* for 2 layers, and with 16 tensors of experts"),
            ("megatron", {"moe_router_topk": 5}, "moe_router_topk is 5 in .* 4 experts to choose from"),
            ("hf-longcat", {"n_routed_experts": 40}, "n_routed_experts is 40 in .* for 2 layers"),
        )
    ):
        folder = changed(folders, name, tmp_path / str(number), changes)
        err = refusal(capsys, tmp_path, name, folder)
        assert re.search(said, err), err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(0, 70) | st.floats() | st.text(max_size=4) | st.just(MANY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_whatever_a_setting_is_it_is_one_line_or_a_conversion(folders, tmp_path_factory, capsys, name, data):
    source = folders[name]
    is_megatron = name.startswith("megatron")
    known = RULES if is_megatron else json.loads((source / "config.json").read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(known)), JSON, min_size=1, max_size=2))
    tmp_path = tmp_path_factory.mktemp("any")
    folder = changed(folders, name, tmp_path / "folder", changes)
    begin_s = time.monotonic()
    code, err = call(capsys, *WAYS[name], "--load", folder, "--save", tmp_path / "new")
    assert time.monotonic() - begin_s < LONGEST_S
    assert (code, err.count("\n")) in ((0, 0), (2, 1)), (changes, err)
    assert (tmp_path / "new").exists() == (code == 0) and not list(tmp_path.glob(".*"))
    shutil.rmtree(tmp_path)


# --- another format ----------------------------------------------------------------------------------------------

TARGETS = {"megatron": "hf-scmoe", "hf-dense": "megatron", "hf-longcat": "megatron", "hf-scmoe": "megatron"}
FORMATS = tuple(TARGETS)


@pytest.mark.parametrize("said", FORMATS)
@pytest.mark.parametrize("is_really", FORMATS)
def test_the_right_format_is_named(folders, tmp_path, capsys, said, is_really):
    words = ("--from", said, "--to", TARGETS[said], "--load", folders[is_really], "--save", tmp_path / "new")
    code, err = call(capsys, *words)
    if said == is_really:
        assert "use --from" not in err
        return
    expected = f"{folders[is_really]} seems to be {is_really}, and --from is {said}; use --from {is_really}\n"
    assert code == 2 and err == f"convert_checkpoint.py: error: {expected}"
    assert list(tmp_path.iterdir()) == []


def test_no_format_is_named_where_there_is_none(folders, tmp_path, capsys):
    folder = changed_config(folders["hf-dense"], tmp_path / "gpt2", {"model_type": "gpt2"})
    (tmp_path / "empty").mkdir()
    for load, said in (
        (folder, "has the model_type 'gpt2'; models of these can be read: longcat_flash, scmoe, llama"),
        (tmp_path / "empty", "is no "),
        (tmp_path / "gone", "is no folder; name that of a checkpoint"),
        (folder / "config.json", "is no folder; name that of a checkpoint"),
    ):
        for source, target in TARGETS.items():
            more = ("--experts", "2") if source == "hf-dense" else ()
            code, err = call(
                capsys, "--from", source, "--to", target, *more, "--load", load, "--save", tmp_path / "new"
            )
            assert code == 2 and said in err and "use --from" not in err and err.count("\n") == 1, err


@pytest.mark.parametrize("error", [KeyError("nothing"), RuntimeError("nothing"), TypeError("nothing")])
def test_other_words_than_another_format_where_the_format_is_right(folders, tmp_path, monkeypatch, capsys, error):
    def hungry(source):
        raise error

    monkeypatch.setitem(formats.PAIRS, ("hf-scmoe", "megatron"), (__name__, "hungry"))
    monkeypatch.setattr(sys.modules[__name__], "hungry", hungry, raising=False)
    err = refusal(capsys, tmp_path, "hf-scmoe", folders["hf-scmoe"])
    assert f"of which no hf-scmoe model can be made ({type(error).__name__}: " in err and "--from" not in err


# --- where nothing can be written ----------------------------------------------------------------------------------


def never(*_args, **_kwargs):
    raise AssertionError("work has begun")


def test_a_target_that_cannot_be_made_is_found_before_work(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(engine, "run", never)
    monkeypatch.setattr(formats, "opened", never)
    words = (*WAYS["hf-longcat"], "--load", folders["hf-longcat"], "--save")
    for save in (tmp_path / "file" / "new", tmp_path / "file" / "a" / "new"):
        code, err = call(capsys, *words, save)
        assert code == 2 and f"{save} cannot be made: {tmp_path / 'file'} is no folder; name another folder\n" in err
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "access", lambda place, mode: place != tmp_path)
        code, err = call(capsys, *words, tmp_path / "new")
    assert code == 2 and f"{tmp_path} is not writable; name another folder\n" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["x" * 300, "/proc/new", "/dev/full/new"])
def test_a_target_that_turns_out_impossible(folders, tmp_path, capsys, name):
    code, err = call(capsys, *WAYS["hf-longcat"], "--load", folders["hf-longcat"], "--save", tmp_path / name)
    assert code == 2 and "cannot be made: " in err and "continues" not in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_begun_continues(folders, tmp_path, monkeypatch, capsys):
    words = (*WAYS["hf-longcat"], "--load", folders["hf-longcat"], "--save", tmp_path / "new")

    def failing(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(formats, "opened", failing)
        code, err = call(capsys, *words)
    assert code == 1 and err.endswith("Input/output error; nothing was written\n")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(formats.MegatronWriter, "write_part", failing)
        code, err = call(capsys, *words)
    assert code == 1 and err.endswith("Input/output error; the same call continues\n")
    assert journal.has_begun(tmp_path / "new")
    assert call(capsys, *words) == (0, "")


@pytest.mark.parametrize("target", ["megatron", "hf-scmoe"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), (1, "[Errno 28] No space left on device")),
        (KeyboardInterrupt(signal.SIGINT), (130, "stopped by SIGINT")),
    ],
)
def test_what_ends_a_write_is_named(folders, tmp_path, monkeypatch, capsys, target, error, expected):
    """Also from within torch.save, whose own error says nothing of it."""

    def failing(self, data):
        if self.position > 3000 and len(data) > 500:  # elements, of a file that torch has begun
            raise error
        return write(self, data)

    write = torch_dist_writer.Sink.write
    source = next(name for name, words in WAYS.items() if words[3] == target)
    words = (*WAYS[source], "--load", folders[source], "--save", tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(torch_dist_writer.Sink, "write", failing)
        code, err = call(capsys, *words)
    assert (code, err) == (expected[0], f"convert_checkpoint.py: error: {expected[1]}; the same call continues\n")
    assert call(capsys, *words) == (0, "")


def test_a_disk_without_room_for_the_plan(folders, tmp_path, monkeypatch, capsys):
    def failing(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_text", failing)
    code, err = call(capsys, *WAYS["hf-longcat"], "--load", folders["hf-longcat"], "--save", tmp_path / "new")
    assert code == 1 and err.endswith("No space left on device; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_changes_nothing(folders, tmp_path, monkeypatch, capsys):
    what_now = tool._what_now

    def stopped(*_args):
        os.kill(os.getpid(), signal.SIGINT)

    def stopped_again(save):
        os.kill(os.getpid(), signal.SIGINT)
        return what_now(save)

    monkeypatch.setattr(formats, "opened", stopped)
    monkeypatch.setattr(tool, "_what_now", stopped_again)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code, err = call(capsys, *WAYS["hf-longcat"], "--load", folders["hf-longcat"], "--save", tmp_path / "new")
        assert (code, err) == (130, "convert_checkpoint.py: error: stopped by SIGINT; nothing was written\n")
        with pytest.raises(KeyboardInterrupt):  # the handlers of before are back
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# --- a flipped byte ------------------------------------------------------------------------------------------------

FLIPPED = (
    *("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"),
    *("decoder.layers.0.self_attention.linear_qkv.weight", "embedding.word_embeddings.weight"),
    "decoder.final_layernorm.weight",
)


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flipped_byte_anywhere_in_a_tensor_ends_a_conversion(folders, tmp_path, capsys, name):
    """Also in one that is read in parts: gate and up, one expert after another."""
    folder = tmp_path / "folder"
    shutil.copytree(folders["megatron"], folder)
    source = MegatronCheckpoint(folder)
    chunk = source._tensors[name].chunks[-1]
    place = find_elements(name, chunk, source.infos[name].dtype)
    with chunk.extent.path.open("r+b") as file:
        file.seek(place.storage.offset + place.storage.length - 1)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    err = refusal(capsys, tmp_path, "megatron", folder)
    assert f"is damaged: {name} is not what its checksum says; get it anew" in err


# --- tools that run a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *(("hf-dense", "num_hidden_layers", MANY), ("hf-scmoe", "num_hidden_layers", MANY)),
        *(("megatron", "num_layers", MANY), ("megatron", "vocab_size", "x"), ("hf-dense", "vocab_size", "x")),
    ],
)
def test_scores_of_what_is_no_model_are_refused(folders, tmp_path, capsys, name, key, value):
    folder = changed(folders, name, tmp_path / "folder", {key: value})
    numpy.save(tmp_path / "ids.npy", numpy.arange(8))
    words = ["--load", folder, "--input", tmp_path / "ids.npy", "--output", tmp_path / "out", "--seq-length", "8"]
    if name == "megatron":
        done = commands.run(TOOLS / "score.py", *words)
        code, err = done.returncode, done.stderr
    else:  # transformers is refused where Megatron's CPU backend is, as in the processes of commands
        code, err = score.main([str(word) for word in words]), capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert code == 2 and f"{key} is {value!r} in" in line
    assert not (tmp_path / "out").exists()


def test_a_second_signal_changes_nothing_of_scores_either(tmp_path, monkeypatch, capsys):
    def stopped(*_args):
        os.kill(os.getpid(), signal.SIGTERM)
        return "out"

    monkeypatch.setattr(score, "run", stopped)
    monkeypatch.setattr(score, "shown", stopped)
    words = ("--load", str(tmp_path), "--input", "ids.npy", "--output", str(tmp_path / "out"))
    assert score.main(list(words)) == 143
    assert capsys.readouterr().err == "score.py: error: stopped by SIGTERM; out was not written\n"


def test_absurd_settings_can_be_looked_at(folders, tmp_path, capsys):
    """The inspector says what is there, and computes nothing from it that cannot be."""
    for number, (name, changes) in enumerate(
        (
            ("megatron", {"num_experts": 4, "zero_experts": -4, "moe_router_topk": -1}),
            ("hf-scmoe", {"num_experts": 10**30, "num_experts_per_tok": NAN}),
            ("hf-dense", {"num_experts": True, "num_hidden_layers": [[]]}),
        )
    ):
        folder = changed(folders, name, tmp_path / str(number), changes)
        assert inspector.main([str(folder)]) == 0, capsys.readouterr().err
