#!/usr/bin/env python3
"""Check the wheel in a folder: every source file of the package is in it, and all of it can be imported from there.

    python .ci/check_wheel.py dist

The package is imported by a process that has the wheel's files before the checkout's on its path, and says so if a
module came from elsewhere. Exits with 1 and names what is missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_scmoe"
IMPORT_ALL = """
import importlib, pkgutil, sys, warnings
warnings.filterwarnings("ignore")
import torch
if not torch.cuda.is_available():
    from megatron_scmoe.cpu import backend
    backend.install()
import megatron_scmoe
names = [module.name for module in pkgutil.walk_packages(megatron_scmoe.__path__, "megatron_scmoe.")]
files = [importlib.import_module(name).__file__ for name in names]
elsewhere = [file for file in files if not file.startswith(sys.argv[1])]
if elsewhere:
    sys.exit(f"imported from elsewhere than {sys.argv[1]}: {elsewhere}")
print(f"megatron_scmoe {megatron_scmoe.__version__}: imported {len(names)} modules from the wheel")
"""


def sources(checkout: Path) -> set[str]:
    """The package's source files, as a wheel names them."""
    return {path.relative_to(checkout).as_posix() for path in (checkout / PACKAGE).rglob("*.py")}


def packed(wheel: Path) -> set[str]:
    """Names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def main(folder: Path) -> str | int:
    """Check the one wheel in ``folder``; returns what is wrong, or 0."""
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        return f"{folder} should hold one wheel and has {[wheel.name for wheel in wheels]}"
    missing = sources(ROOT) - packed(wheels[0])
    if missing:
        return f"{wheels[0].name} lacks {sorted(missing)}"
    with tempfile.TemporaryDirectory() as home:
        install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", home, str(wheels[0])]
        subprocess.run([sys.executable, "-m", *install], check=True)
        command = [sys.executable, "-c", IMPORT_ALL, home]
        return subprocess.run(command, cwd=home, env=os.environ | {"PYTHONPATH": home}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
