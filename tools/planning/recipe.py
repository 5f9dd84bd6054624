"""Recipes of examples/: the flags that examples/launch.sh makes of one, and a new one with other settings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from command_line import UserError, one_line

from planning.settings import split_values

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch.sh"
_SOURCED = re.compile(r"""source\s+(["']?)(.+?)\1\s*$""")


def flags_of(recipe: str, words: Sequence[str] = ()) -> tuple[int, list[str]]:
    """GPUs and flags of a recipe.

    Args:
        recipe: a name in examples/recipes/, or the path of such a file.
        words: flags that come behind the recipe's own.

    Raises:
        UserError: in the launcher's own words, where it refuses.
    """
    environment = os.environ | {"DRY_RUN": "flags"}
    done = subprocess.run([LAUNCH, _name(recipe), *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"launch.sh ended with code {done.returncode}"]
        raise UserError(one_line(lines[-1].removeprefix("launch.sh: refused: ")))
    gpus, *flags = done.stdout.splitlines()
    return int(gpus), split_values(flags)


def files(recipe: str) -> list[Path]:
    """The files that a recipe is read from: its own, and those that it sources, directly or not."""
    found = [LAUNCH.parent / "recipes" / f"{recipe}.sh" if "/" not in (name := _name(recipe)) else Path(name)]
    for path in found:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for sourced in filter(None, map(_SOURCED.match, lines)):
            other = Path(sourced[2].replace("$here", str(LAUNCH.parent)))
            found += [other] * (other not in found)
    return found


def _name(recipe: str) -> str:
    """As launch.sh takes it: a name, or a whole path."""
    path = Path(recipe).absolute()
    if path.suffix != ".sh":
        return recipe
    return path.stem if path.parent == LAUNCH.parent / "recipes" else str(path)


def text(comment: str, base: str, nodes: int, flags: Sequence[str], environment: Mapping[str, str]) -> str:
    """A recipe that is another one with other settings.

    Args:
        comment: where it comes from.
        base: the other one: a name, or a path.
        nodes: of 8 GPUs each.
        flags: that replace its layout, or come behind its own.
        environment: of its ranks, where users set nothing else.
    """
    lines = [f"# {line}" for line in comment.splitlines()]
    found = _name(base)
    source = shlex.quote(found) if "/" in found else f'"$here/recipes/{found}.sh"'
    lines += [f"source {source}", f"nodes={nodes}"]
    lines += [f"{name}=${{{name}:-{value}}}" for name, value in environment.items()]
    # The schedule comes behind all settings of a recipe, and what comes last wins.
    lines += ["layout=()", f"schedule+=({' '.join(map(shlex.quote, flags))})"]
    return "\n".join(lines) + "\n"


def text_of_flags(
    comment: str, nodes: int, flags: Sequence[str], environment: Mapping[str, str], vocabulary: int
) -> str:
    """A recipe of ``flags``, with what the launcher wants to know beside them; the arguments are those of ``text``."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"nodes={nodes} vocabulary={vocabulary} shared_width=0 model=() experts=() layout=() schedule=()"]
    lines += [f"{name}=${{{name}:-{value}}}" for name, value in environment.items()]
    lines += [f"form=({' '.join(map(shlex.quote, flags))})"]
    return "\n".join(lines) + "\n"
