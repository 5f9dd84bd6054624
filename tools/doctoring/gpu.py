"""What nvidia-smi says of the GPUs of this machine."""

from __future__ import annotations

import shutil
import subprocess

_PATIENCE_S = 20.0


def asked(*fields: str) -> dict[str, list[str]]:
    """Values of ``fields``, in their order, by the UUID of each GPU; empty where there is no nvidia-smi or no GPU."""
    if shutil.which("nvidia-smi") is None:
        return {}
    words = ["nvidia-smi", f"--query-gpu={','.join(('uuid', *fields))}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]
    return {uuid: values for uuid, *values in rows if len(values) == len(fields)} if done.returncode == 0 else {}
