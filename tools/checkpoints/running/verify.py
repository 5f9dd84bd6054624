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

from checkpoints import formats
from checkpoints.running import model
from checkpoints.tensors import CheckpointError

TOOLS = Path(__file__).resolve().parents[2]
ROWS, LENGTH, SEED = 2, 64, 1234
TOLERANCE = 1e-4
POSITIONS = ("pos1", "pos2", "pos3")


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
    """Compare the logits of two folders of either kind in fp32; refuses one that does not run.

    The result, of plain types, has the largest difference and where it is, its size beside the logits', and whether it
    passes. Formats are what the user calls them.

    ``tokens`` are ids, [b, s]; None: random ones that both have, always the same. ``tolerance`` is the largest
    difference of two logits that passes. ``trust_remote_code`` is about Python files of a Hugging Face folder, which
    are not those of this tool.
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


def function_change(
    source: Path, source_format: str, target: Path, *, moe_every: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """How far upcycling moves a model from what it computed, in fp32, for every position of its routed experts.

    ``source`` is the dense model, or the stock MoE, and ``target`` the Megatron checkpoint made of it, whose parameters
    are the same for every position; of groups of one block, only pos1 exists. The result has the norm of the difference
    of all logits, relative to that of the source's, and how often the most likely token is the same.
    """
    result = {}
    with tempfile.TemporaryDirectory(prefix="change-") as scratch:
        tokens = Path(scratch, "tokens.npy")
        numpy.save(tokens, random_tokens(source, target))
        before = logits_of(f"the source ({source_format})", source, tokens, trust_remote_code=trust_remote_code)
        for position in POSITIONS if moe_every > 1 else POSITIONS[:1]:
            settings = {"shortcut_position": [position]}
            found = compare(before, logits_of("the target (megatron)", target, tokens, settings=settings))
            result[position] = {name: found[name] for name in ("relative_difference", "same_first_choice")}
    return {"function_change_at_step_0": result}


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
    opened = [formats.open_any(folder) for folder in folders]
    length = min(LENGTH, *(one.settings.get("max_position_embeddings") or LENGTH for one in opened))
    return numpy.random.default_rng(SEED).integers(min(one.vocab_size for one in opened), size=(ROWS, length))


def logits_of(
    name: str,
    folder: Path,
    tokens: Path,
    *,
    trust_remote_code: bool = False,
    settings: Mapping[str, object] | None = None,
) -> numpy.ndarray:
    """Logits in fp32, [b, s, vocabulary], by a process of its own; they lie beside ``tokens`` on disk.

    ``name`` is what to call the checkpoint where it does not run; the others are those of ``model.load``.
    """
    with tempfile.NamedTemporaryFile(dir=tokens.parent, suffix=".npy", delete=False) as file:
        logits = file.name
    options = {"trust_remote_code": trust_remote_code, "settings": settings}
    request = json.dumps([str(folder), str(tokens), logits, options])
    done = _in_a_process(request)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        reason = lines[-1][:300]
        if done.returncode < 0:
            reason = f"killed by {signal.Signals(-done.returncode).name}; all of it has to fit into memory in fp32"
        raise CheckpointError(f"cannot verify, {name} does not run: {reason}")
    return numpy.load(logits, mmap_mode="r")


def _in_a_process(request: str) -> subprocess.CompletedProcess[str]:
    """Call ``_write_logits`` with the JSON list ``request``, in a process that is no rank."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [inherited.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "checkpoints.running.verify", request],
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


def _write_logits(folder: str, tokens: str, logits: str, options: Mapping[str, Any]) -> None:
    """What the process of ``logits_of`` does."""
    loaded = model.load(Path(folder), dtype=torch.float32, **options)
    ids = torch.from_numpy(numpy.load(tokens)).unsqueeze(1)  # a micro-batch for each row
    parts = [scores.logits for scores in loaded.score(ids, ids, with_logits=True)]
    numpy.save(logits, torch.cat([part for part in parts if part is not None]).numpy())


if __name__ == "__main__":
    try:
        _write_logits(*json.loads(sys.argv[1]))
    except CheckpointError as error:
        sys.exit(str(error))
