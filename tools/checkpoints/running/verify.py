"""Do two checkpoints compute the same? Both run the same tokens in fp32, each in a process of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.running import model
from checkpoints.tensors import CheckpointError

TOOLS = Path(__file__).resolve().parents[2]
ROWS, LENGTH, SEED = 2, 64, 1234
TOLERANCE = 1e-4


def verify(
    source: str | Path,
    source_format: str,
    target: str | Path,
    target_format: str,
    *,
    tokens: numpy.ndarray | None = None,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare the logits of two checkpoints in fp32.

    Args:
        source: folder of either kind.
        source_format: what its user calls it.
        target: folder of either kind.
        target_format: what its user calls it.
        tokens: ids, [b, s]; None: random ones that both have, always the same.
        tolerance: the largest difference of two logits that passes.
        trust_remote_code: whether Python files of a Hugging Face folder may run, which are not those of this tool.

    Returns:
        The largest difference and where it is, its size beside the logits', and whether it passes; plain types.

    Raises:
        CheckpointError: where one of them does not run.
    """
    sides = {f"the source ({source_format})": Path(source), f"the target ({target_format})": Path(target)}
    seed = SEED if tokens is None else None
    if tokens is None:
        tokens = random_tokens(*sides.values())
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        path = Path(scratch, "tokens.npy")
        numpy.save(path, tokens)
        logits = [logits_of(name, folder, path, trust_remote_code=trust_remote_code) for name, folder in sides.items()]
        found = compare(*logits)
    found["tolerance"] = tolerance
    found["passed"] = found["largest_difference"] is not None and found["largest_difference"] <= tolerance
    return {"dtype": "float32", "rows": tokens.shape[0], "tokens": int(tokens.size), "seed": seed, **found}


def compare(source: numpy.ndarray, target: numpy.ndarray) -> dict[str, Any]:
    """How logits differ, [b, s, vocabulary] each; where one vocabulary is longer, its end is left out.

    Differences are None where they are not finite.
    """
    vocabulary = min(source.shape[-1], target.shape[-1])
    largest, where, squares, scale, agreeing = -1.0, (0, 0, 0), 0.0, 0.0, 0
    for row, position in numpy.ndindex(source.shape[:2]):
        one, other = (side[row, position, :vocabulary].astype(numpy.float64) for side in (source, target))
        difference = numpy.abs(one - other)
        column = int(difference.argmax())  # of NaN, if there is any
        if not difference[column] <= largest and not math.isnan(largest):
            largest, where = float(difference[column]), (row, position, column)
        squares, scale = squares + float(difference @ difference), scale + float(one @ one)
        agreeing += int(one.argmax() == other.argmax())
    finite = math.isfinite(largest) and math.isfinite(scale)
    return {
        "largest_difference": largest if finite else None,
        "largest_difference_at": dict(zip(("row", "position", "token_id"), where, strict=True)),
        "relative_difference": (math.sqrt(squares / scale) if scale else 0.0) if finite else None,
        "same_first_choice": agreeing / (source.shape[0] * source.shape[1]),
        "vocabularies": [source.shape[-1], target.shape[-1]],
    }


def random_tokens(*folders: Path) -> numpy.ndarray:
    """Ids that every one of these checkpoints has, [b, s], and as many as fit into its window; always the same."""
    limits = [_limits(folder) for folder in folders]
    vocabulary, length = (min(values) for values in zip(*limits, strict=True))
    return numpy.random.default_rng(SEED).integers(vocabulary, size=(ROWS, min(LENGTH, length)))


def _limits(folder: Path) -> tuple[int, int]:
    """Size of the vocabulary, and most tokens of a window."""
    opened = model.open_folder(folder)
    settings: Mapping[str, Any] = vars(opened.args) if isinstance(opened, MegatronCheckpoint) else opened.config
    vocabularies = (settings.get("vocab_size"), settings.get("padded_vocab_size"))
    known = [size for size in vocabularies if size]
    if not known:
        raise CheckpointError(f"{folder} does not say how large its vocabulary is; add vocab_size to config.json")
    return min(known), settings.get("max_position_embeddings") or LENGTH


def logits_of(
    name: str,
    folder: Path,
    tokens: Path,
    *,
    trust_remote_code: bool = False,
    settings: Mapping[str, object] | None = None,
) -> numpy.ndarray:
    """Logits in fp32, [b, s, vocabulary], by a process of its own; they lie beside ``tokens`` on disk.

    Args:
        name: what to call the checkpoint where it does not run.
        folder: of either kind.
        tokens: file with ids, [b, s].
        trust_remote_code: whether Python files of a Hugging Face folder may run, which are not those of this tool.
        settings: of a Megatron checkpoint, in the place of those that it has saved.

    Raises:
        CheckpointError: where it does not run.
    """
    with tempfile.NamedTemporaryFile(dir=tokens.parent, suffix=".npy", delete=False) as file:
        path = Path(file.name)
    request = {
        "folder": str(folder),
        "tokens": str(tokens),
        "logits": str(path),
        "trust_remote_code": trust_remote_code,
        "settings": settings,
    }
    _run(name, request)
    return numpy.load(path, mmap_mode="r")


def _run(name: str, request: Mapping[str, Any]) -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [inherited.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "checkpoints.running.verify", json.dumps(request)],
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        reason = f"killed by {signal.Signals(-done.returncode).name}; all of it has to fit into memory in fp32"
        raise CheckpointError(f"cannot verify, {name} does not run: {reason}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise CheckpointError(f"cannot verify, {name} does not run: {lines[-1][:300]}")


def _write_logits(request: Mapping[str, Any]) -> None:
    """What the process of ``logits_of`` does."""
    loaded = model.load(
        Path(request["folder"]),
        dtype=torch.float32,
        trust_remote_code=bool(request["trust_remote_code"]),
        settings=request["settings"],
    )
    tokens = torch.from_numpy(numpy.load(request["tokens"])).unsqueeze(1)  # a micro-batch for each row
    logits = [scores.logits for scores in loaded.score(tokens, tokens, with_logits=True)]
    numpy.save(request["logits"], torch.cat([part for part in logits if part is not None]).numpy())


if __name__ == "__main__":
    try:
        _write_logits(json.loads(sys.argv[1]))
    except CheckpointError as error:
        sys.exit(str(error))
