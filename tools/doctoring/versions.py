"""Versions: of packages against what was tested and against one another, and whether torch can use the GPUs."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from doctoring import gpu
from doctoring.check import Finding, by_ranks, not_tried, ok, problem
from doctoring.job import Job
from megatron_scmoe.job import sameness

ROOT = Path(__file__).resolve().parents[2]
ALIKE = "install the same on every node"


def ranges() -> dict[str, SpecifierSet]:
    """The versions of each dependency that pyproject.toml allows."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = (re.fullmatch(r"([\w.-]+)(.*)", line) for line in lines)
    return {canonicalize_name(one[1]): SpecifierSet(one[2]) for one in found if one}


def pins() -> dict[str, str]:
    """The version of each package that requirements.txt and requirements-gpu.txt pin: what was tested together."""
    text = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-gpu.txt"))
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)$", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def installed(names: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that this process would import."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Versions:
    """See ``CATALOG``."""

    name, communicates = "versions", False

    def look(self, job: Job) -> dict[str, Any]:
        """Packages, what else is the same on all ranks, and what nvidia-smi and torch say of GPUs."""
        drivers = {driver for (driver,) in gpu.asked("driver_version").values()}
        return {
            "packages": installed([*ranges(), *sameness.PACKAGES]),
            "alike": sameness.versions() | {"driver": ", ".join(sorted(drivers)) or "none"},
            "has_cuda": job.has_cuda,
        }

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Differences between ranks, and then each rank by itself."""
        difference = sameness.difference([one["alike"] for one in seen])
        found = [problem(difference, ALIKE)] if difference else [ok("the same on every rank")]
        return found + by_ranks([[*judged(one["packages"]), *_of_gpus(one)] for one in seen])


def judged(packages: Mapping[str, str]) -> list[Finding]:
    """Installed versions, against what is allowed and what was tested."""
    found, other = [], []
    allowed, tested = ranges(), pins()
    for name, versions in allowed.items():
        if name not in packages:
            found.append(problem(f"{name} is not installed", f"pip install '{name}=={tested.get(name, versions)}'"))
        elif not versions.contains(packages[name], prereleases=True):
            text = f"{name} {packages[name]} is installed, and {versions} is needed"
            found.append(problem(text, f"pip install '{name}=={tested[name]}'"))
    for name, version in packages.items():
        if version == tested.get(name, version):
            continue
        if name in allowed:
            other.append(f"{name} {version} (tested: {tested[name]})")
        else:
            text = f"{name} {version} is installed, and {tested[name]} is what it was written for"
            found.append(problem(text, f"install {name}=={tested[name]}, see requirements-gpu.txt"))
    if not found:
        others = f"; within their ranges, and not what was tested: {', '.join(other)}" if other else ""
        found.append(ok(", ".join(f"{name} {packages[name]}" for name in ("torch", "megatron-core")) + others))
    return found


def _of_gpus(seen: Mapping[str, Any]) -> list[Finding]:
    versions = seen["alike"]
    if seen["has_cuda"]:
        names = ("NCCL", "driver", "transformer-engine", "apex")
        return [ok(", ".join(f"{name} {versions[name]}" for name in names))]
    if versions["driver"] != "none":
        return [
            problem(
                f"driver {versions['driver']} has GPUs and torch {versions['torch']} cannot use them: a training would "
                "run on the CPU",
                "install a torch for this driver's CUDA, or unset CUDA_VISIBLE_DEVICES",
            )
        ]
    return [not_tried("NCCL, driver, Transformer Engine and Apex: no GPU here")]
