"""The folder of a study: data and settings that its runs share, and what they left.

::

    settings.json   what all runs share; another value is refused
    runs/NAME/      a training each; its result.json is written last and whole
    meta.json       of the last call: where, when and with what
    encoding.json   what encoding costs, where --encoding-cost has measured it
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import kept

from codec_study.arms import MODELS, all_arms

ROOT = Path(__file__).resolve().parent.parent.parent
META, RUNS, RESULT = "meta.json", "runs", "result.json"
MANIFEST = "manifest.json"
SETTINGS = "settings.json"
VOCABULARY = 1024
_OF_RUN = {
    *("model", "arm", "seed", "commit", "tokens_per_step", "validation", "train", "rate", "residual"),
    *("final_validation", "final_rate", "final_residual", "seconds_per_step"),
}
"""What every training has left since there are studies, and reports are made of."""


def made_data(folder: Path) -> Path:
    """``folder`` with the standard library's source in it, made unless it is there; its tool says what goes wrong."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", "stdlib", "--output", str(folder)]
    done = subprocess.run([*command, "--vocab-size", str(VOCABULARY), "--document-kib", "4"], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return folder


def described_data(folder: Path) -> dict[str, Any]:
    """What the data are, by their manifest."""
    manifest = kept.read(folder / MANIFEST)
    return {
        "tokens": manifest["totals"]["tokens"],
        "vocabulary": manifest["vocabulary"]["size"],
        "sha256": manifest["outputs"]["text_document.bin"]["sha256"],
    }


def settings_difference(folder: Path, wanted: Mapping[str, Any]) -> str:
    """How the settings of the runs in ``folder`` differ from those wanted; '' if they do not.

    The first call writes them down.

    Raises:
        OSError, ValueError: where they cannot be read.
    """
    path = folder / SETTINGS
    if not path.exists():
        kept.write(path, wanted)
        return ""
    found = kept.read(path)
    for name, value in wanted.items():
        if found.get(name) != value:
            return f"another --{name.replace('_', '-')} ({found.get(name)}, now {value})"
    return ""


def results(folder: Path) -> list[dict[str, Any]]:
    """What all runs of a study left, whichever call trained them: by model, arm and seed.

    Raises:
        OSError, ValueError: where one cannot be read.
    """
    order = [*MODELS, *(arm.name for arm in all_arms())]
    places = {name: place for place, name in enumerate(order)}
    found = []
    for path in sorted((folder / RUNS).glob(f"*/{RESULT}")):
        found.append(kept.read(path))
        if _OF_RUN - found[-1].keys() or found[-1]["model"] not in MODELS:
            raise ValueError(f"{path} is not what a training leaves")
    return sorted(found, key=lambda one: (places[one["model"]], places.get(one["arm"], len(places)), one["seed"]))


def read(folder: Path) -> dict[str, Any]:
    """The ``meta`` and the ``runs`` of the study in a folder.

    Raises:
        OSError, ValueError: where there is none.
    """
    meta = kept.read(folder / META)
    if "hardware" not in meta:
        raise ValueError(f"{META} is not that of a study")
    runs = results(folder)
    if not runs:
        raise ValueError(f"there is no {RUNS}/*/{RESULT}")
    return {"meta": meta, "runs": runs}
