"""tools/convert_checkpoint.py --with-optimizer: one table of hyperparameters becomes two and back, and no bit changes.

Checkpoints here are small and made by the tools' own writer; those of real runs, and the runs that go on from what is
made of them, are in tests/training/test_moments.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import checkpoint_files as files
import pytest
import torch
from checkpoint_files import ARGS, MegatronCheckpoint, TensorInfo, assert_same, engine, formats, made_tensors, read_all
from checkpoints import read_back
from checkpoints.disk.torch_dist_metadata import Extent
from checkpoints.disk.torch_dist_writer import MegatronWriter
from checkpoints.mappings import optimizers
from checkpoints.tensors import CheckpointError
from test_convert import call

GROUP = {
    "is_expert_parallel": False,
    "default_config": True,
    "wd_mult": 1.0,
    "lr": 0.01,
    "betas": (0.9, 0.99),
    "step": 7,
}
NO_DECAY = {**GROUP, "wd_mult": 0.0}
EMBEDDING = {**GROUP, "default_config": False, "lr": 0.02}
EXPERTS = {**GROUP, "is_expert_parallel": True}
FORMAT = {"param_state_sharding_type": "fully_reshardable"}
ONE = {"optimizer": {"param_groups": [GROUP, NO_DECAY]}, **FORMAT}
TWO = {0: ONE, 1: {"optimizer": {"param_groups": [EXPERTS]}, **FORMAT}}
PLAIN_ONE = {"state": {"common_step": torch.tensor(7.0)}, "param_groups": [GROUP, NO_DECAY]}
PLAIN_TWO = {0: PLAIN_ONE, 1: {**PLAIN_ONE, "param_groups": [EXPERTS]}}
COMMON = {
    **{"checkpoint_version": 3.0, "iteration": 7, "optimizer": ONE, "opt_param_scheduler": {"num_steps": 56}},
    **{"rerun_state_machine": {"mode": "disabled", "state": 0}, "num_floating_point_operations_so_far": 1e9},
    "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True},
}
RUN = {"num_experts": 4, "optimizer": "adam", "use_distributed_optimizer": True}
OBJECTS = ("rng_state/shard_0.0_1.1", "rerun_state_machine_state/shard_0_1", "decoder.x._extra_state/shard_0_1")
NOT_TRAINED = ("number", "whole", "decoder.layers.1.mlp.router.expert_bias")
KINDS = ("exp_avg", "exp_avg_sq")
EXPERT = "decoder.layers.1.mlp.experts.experts.linear_fc1"
WORDS = ("--from", "megatron", "--to", "megatron", "--with-optimizer")


def run_tensors() -> dict[str, torch.Tensor]:
    """Of a model, and what an optimizer keeps of them: fp32 copies of what has less than 32 bits."""
    model = made_tensors()
    state = {
        f"optimizer.state.{kind}.{name}": torch.rand(tensor.shape)
        for name, tensor in model.items()
        for kind in (*KINDS, *(["fp32_param"] if tensor.dtype.itemsize == 2 else []))
        if name not in NOT_TRAINED
    }
    return model | state


def write_run(folder: Path, tensors=None, *, common=None, args=None) -> Path:
    """A checkpoint as a run leaves it behind."""
    source = files.write_hf(folder.with_name(f"{folder.name}-hf"), run_tensors() if tensors is None else tensors)
    carried = {}
    for number, key in enumerate(OBJECTS):
        path = source / f"{number}.pt"
        torch.save([{"state": number}], path)
        carried[key] = Extent(path, 0, path.stat().st_size)
    opened = files.opened(source)
    made = files.identity(opened, args={**ARGS, **RUN, **(args or {})})
    conversion = dataclasses.replace(made.conversion, carried=carried)
    target = dataclasses.replace(made, conversion=conversion, common={**COMMON, **(common or {})})
    engine.run(
        engine.Job(
            source=opened,
            conversion=conversion,
            writer=formats.writer("megatron", target),
            target=folder,
            shard_bytes=1 << 20,
            options={},
        )
    )
    return folder


def whole(folder: Path) -> MegatronCheckpoint:
    return MegatronCheckpoint(folder, as_saved=True)


def saved_bytes(extent: Extent) -> bytes:
    return extent.path.read_bytes()[extent.offset :][: extent.length]


def table(folder: Path) -> dict:
    return whole(folder).common["optimizer"]


WAYS = {
    # from, to, and whether the distributed optimizer has saved it
    "one": (ONE, TWO, True),
    "two": (TWO, ONE, True),
    "plain one": (PLAIN_ONE, PLAIN_TWO, False),
    "plain two": (PLAIN_TWO, PLAIN_ONE, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_is_bit_equal(tmp_path, monkeypatch, capsys, way):
    monkeypatch.setattr(optimizers, "_PIECE_BYTES", 400)
    there, other, is_distributed = WAYS[way]
    metadata = {} if is_distributed else {"content_metadata": {"chained_optim_avoid_prefix": True}}
    args = {"use_distributed_optimizer": is_distributed}
    source = write_run(tmp_path / "run", common={"optimizer": there, **metadata}, args=args)
    last = source
    for name in ("there", "back"):
        code, out, err = call(capsys, *WORDS, "--load", last, "--save", tmp_path / name, "--verify")
        assert code == 0 and f"verified: {len(run_tensors())} tensors are the same bit for bit" in out, err
        last = tmp_path / name
    before, after = whole(source), whole(last)
    assert_same(read_all(after), read_all(before))
    assert after.args == before.args and after.iteration == 7
    rest = {key: value for key, value in before.common.items() if key != "rerun_state_machine"}
    assert optimizers._plain(after.common) == optimizers._plain(rest)
    assert (last / "latest_checkpointed_iteration.txt").read_text() == "7"
    for key in ("rng_state/shard_0.0_1.1", "decoder.x._extra_state/shard_0_1"):
        assert saved_bytes(after.objects[key]) == saved_bytes(before.objects[key])
    assert optimizers._plain(table(tmp_path / "there")) == optimizers._plain(other)


def test_receipt_accounts_for_everything(tmp_path, capsys):
    code, _, err = call(capsys, *WORDS, "--load", write_run(tmp_path / "run"), "--save", tmp_path / "new")
    assert code == 0, err
    receipt = json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert receipt["converted"]["tensors"] == receipt["target"]["tensors"] == len(run_tensors())
    assert [entry["names"] for entry in receipt["dropped"]] == [["rerun_state_machine_state/shard_0_1"]]
    assert receipt["carried"] == ["decoder.x._extra_state/shard_0_1", "rng_state/shard_0.0_1.1"]
    assert receipt["options"]["optimizers"] == "other"
    assert_same(read_all(MegatronCheckpoint(tmp_path / "new")), made_tensors())  # as the other tools see it
    notes = " ".join(receipt["notes"])
    assert "two optimizers, that of experts apart: load it with --expert-model-parallel-size above 1" in notes
    assert f"{len(NOT_TRAINED)} tensors have no moments" in notes


def test_experts_with_biases_have_two_groups(tmp_path, capsys):
    """And groups of embeddings are not theirs. No run on the CPU has such experts: Core's local spec fails on them."""
    tensors = run_tensors()
    bias = {
        f"{before}{EXPERT}.bias": torch.rand(4, 6) for before in ("", *(f"optimizer.state.{one}." for one in KINDS))
    }
    groups = {"optimizer": {"param_groups": [GROUP, NO_DECAY, EMBEDDING]}, **FORMAT}
    source = write_run(tmp_path / "run", tensors | bias, common={"optimizer": groups})
    assert call(capsys, *WORDS, "--load", source, "--save", tmp_path / "two")[0] == 0
    found = table(tmp_path / "two")
    assert found[1]["optimizer"]["param_groups"] == [EXPERTS, {**NO_DECAY, "is_expert_parallel": True}]
    assert found[0] == groups
    assert call(capsys, *WORDS, "--load", tmp_path / "two", "--save", tmp_path / "one")[0] == 0
    assert table(tmp_path / "one") == groups


def changed(table: dict, **changes: object) -> dict:
    """Two optimizers, of which the experts' has other settings."""
    result = copy.deepcopy(table)
    result[1]["optimizer"]["param_groups"][0] |= changes
    return result


PREFIXED = {f"chained_0.{name}" if name.startswith("optimizer.") else name: t for name, t in run_tensors().items()}
PLACES = {"chained_0.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg": torch.ones(4)}
BY_PLACE = {"distrib_optim_sharding_type": "dp_reshardable"}
MODEL = made_tensors()
REFUSED = {
    # what is there -> words of the line
    "release": ({"tensors": MODEL, "common": {"optimizer": None}}, "has no optimizer: it is a release"),
    "no experts": ({"args": {"num_experts": None}}, "has no experts, so that every layout has one optimizer"),
    "optimizer": ({"args": {"optimizer": "muon"}}, "adam and sgd: the optimizer in"),
    "by place": (
        {"tensors": MODEL | PLACES, "common": {"content_metadata": BY_PLACE}},
        "has the format 'dp_reshardable'; load it in the layout that saved it, and save it with --dist-ckpt-optim",
    ),
    "no format": ({"common": {"content_metadata": None}}, "has the format 'None'"),
    "older names": ({"tensors": PREFIXED}, "have the names of an older Megatron, as 'chained_0.optimizer.state."),
    "three": ({"common": {"optimizer": {0: ONE, 1: ONE, 2: TWO[1]}}}, "--overlap-param-gather-with-optimizer-step"),
    "not in order": ({"common": {"optimizer": {0: TWO[1], 1: ONE}}}, "other parts than dense layers and experts"),
    "other rate": ({"common": {"optimizer": changed(TWO, lr=0.3)}}, "experts in"),
    "other step": ({"common": {"optimizer": changed(TWO, step=6)}}, "have other settings, or another step"),
    "other state": ({"common": {"optimizer": {0: {**ONE, "grad_scaler": 1}, 1: TWO[1]}}}, "have other settings"),
    "rates by width": ({"args": {"use_mup": True}}, "it is not known in which of them experts are"),
    "no iteration": ({"common": {"iteration": -3}}, "iteration is -3 in"),
    "no groups": ({"common": {"optimizer": {"state": {}}}}, "has settings of which no megatron model can be made"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rewritten_is_refused(tmp_path, capsys, case):
    options, message = REFUSED[case]
    if options.get("common", {}).get("optimizer", ONE) is None:
        source = files.write_megatron(tmp_path / "run", options["tensors"], args={**ARGS, **RUN})
    else:
        source = write_run(
            tmp_path / "run", options.get("tensors"), **{k: v for k, v in options.items() if k != "tensors"}
        )
    (iteration,) = (path for path in source.iterdir() if path.is_dir())
    code, out, err = call(capsys, *WORDS, "--load", iteration, "--save", tmp_path / "new")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-hf"}


UNBALANCED = {
    "moment lost": (lambda t: t.pop(f"optimizer.state.exp_avg.{EXPERT}.weight"), "that the target would lack: 'optim"),
    "other shape": (
        lambda t: t.update({f"optimizer.state.exp_avg.{EXPERT}.weight": torch.ones(4, 6, 7)}),
        "that the target has no place for, or not in this shape: 'optimizer.state.exp_avg.",
    ),
    "parameter lost": (lambda t: t.pop(f"{EXPERT}.weight"), "that the target has no place for"),
}


@pytest.mark.parametrize("case", UNBALANCED)
def test_moments_are_accounted_for(tmp_path, capsys, case):
    change, message = UNBALANCED[case]
    tensors = run_tensors()
    change(tensors)
    code, _, err = call(capsys, *WORDS, "--load", write_run(tmp_path / "run", tensors), "--save", tmp_path / "new")
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()


REQUESTS = {
    "as it is": ((*WORDS, "--optimizers", "one"), "nothing to convert: --optimizers is one, as many as"),
    "no moments": ((*WORDS[:4], "--optimizers", "two"), "no optimizer goes along; add --with-optimizer"),
    "spec": (
        (*WORDS, "--transformer-impl", "local"),
        "is set with --from megatron --to megatron --transformer-impl local;",
    ),
    "upcycling": (
        (*WORDS, "--experts", "4"),
        "is set with --from megatron --to megatron --experts 4; drop it",
    ),
    "format": (("--from", "megatron", "--to", "hf-scmoe", "--with-optimizer"), "drop it, then --from megatron --to me"),
}


def test_bad_requests_are_refused(tmp_path, capsys):
    source = write_run(tmp_path / "run")
    for words, message in REQUESTS.values():
        code, out, err = call(capsys, *words, "--load", source, "--save", tmp_path / "new")
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
        assert {path.name for path in tmp_path.iterdir()} == {"run", "run-hf"}


def test_verify_notices_a_changed_bit(tmp_path, capsys, monkeypatch):
    write_part = MegatronWriter.write_part

    def damaging(self, sink, pieces, tensors):
        def changed():
            for piece, tensor in zip(pieces, tensors, strict=True):
                if piece.name == f"optimizer.state.exp_avg_sq.{EXPERT}.weight":
                    tensor.view(-1)[0] += 1
                yield tensor

        return write_part(self, sink, pieces, changed())

    source = write_run(tmp_path / "run")
    monkeypatch.setattr(MegatronWriter, "write_part", damaging)
    code, _, err = call(capsys, *WORDS, "--load", source, "--save", tmp_path / "new", "--verify")
    assert code == 1 and f"optimizer.state.exp_avg_sq.{EXPERT}.weight differs from what was read; what was" in err
    assert not (tmp_path / "new").exists()


def test_verify_notices_what_cannot_be_read(tmp_path, capsys, monkeypatch):
    def unreadable(folder, *, as_saved):
        raise CheckpointError(f"{folder} is damaged; get it anew")

    source = write_run(tmp_path / "run")
    monkeypatch.setattr(read_back, "MegatronCheckpoint", unreadable)
    code, _, err = call(capsys, *WORDS, "--load", source, "--save", tmp_path / "new", "--verify")
    assert code == 1 and "is damaged; get it anew; what was written stays in" in err
    assert not (tmp_path / "new").exists() and (tmp_path / ".new.partial").exists()


def test_read_back_compares_bits_and_names(tmp_path):
    tensors = {"a": torch.tensor([float("nan"), -0.0]), "b": torch.ones(3, 2)}
    source = whole(files.write_megatron(tmp_path / "run", tensors))
    conversion = files.identity(source).conversion
    folder = tmp_path / "run"
    assert read_back.compare(conversion, source, folder) == {"tensors": 2, "differing": [], "passed": True}
    other = files.write_megatron(tmp_path / "other", {**tensors, "a": torch.tensor([float("nan"), 0.0])})
    assert read_back.compare(conversion, source, other)["differing"] == ["a"]
    more = files.write_megatron(tmp_path / "more", {**tensors, "c": torch.ones(1)})
    assert read_back.compare(conversion, source, more)["differing"] == ["c"]


def test_a_damaged_object_is_noticed(tmp_path, capsys):
    """It is copied, not loaded: by its checksum."""
    source = write_run(tmp_path / "run")
    extent = whole(source).objects["rng_state/shard_0.0_1.1"]
    data = bytearray(extent.path.read_bytes())
    place = data.index(b"state", extent.offset)
    assert place < extent.offset + extent.length
    data[place] ^= 1
    extent.path.write_bytes(data)
    code, _, err = call(capsys, *WORDS, "--load", source, "--save", tmp_path / "new")
    assert code == 2 and "is damaged at rng_state/shard_0.0_1.1" in err and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("shape", [(3, 1 << 20, 64), (1 << 22, 64), (5,), (), (0, 4)])
def test_memory_is_that_of_a_piece(shape):
    """Or of a row, of which none is larger than an expert."""
    info = TensorInfo(shape, torch.float32)
    pieces = list(optimizers._pieces({"a": info}))
    assert sum(piece.info.nbytes for piece in pieces) == info.nbytes
    assert max(piece.info.nbytes for piece in pieces) <= max(optimizers._PIECE_BYTES, info.with_rows(1).nbytes)
    assert [piece.row for piece in pieces] == sorted({piece.row for piece in pieces})
