"""Runs the unmodified ``megatron.training.pretrain`` on gloo ranks of a machine without a GPU.

Megatron-Core 0.19.2 calls CUDA at a few dozen fixed places. ``replacements.py`` names each attribute that is set
instead, why, and what a CPU run can therefore NOT show. ``install`` sets them all, ``uninstall`` restores them all,
importing this module does nothing. Only entry points and tests call ``install``, and where CUDA exists it refuses.

No hook sees every operation. A step of one micro-batch through two blocks, one of them MoE with EP=2, makes 49
intercepted calls beside its all-to-alls in the stock model, 49 with scmoe, 67 with dgmoe (4 more when it also logs);
each further micro-batch adds 32, 32 and 50 (``tests/cpu/test_intercepted_calls.py``). The thousands of
other operations of a step run as they would without this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import inspect
import logging
import pkgutil
import sys
import warnings

import torch

from megatron_scmoe.cpu.replacements import REPLACEMENTS, Replacement
from megatron_scmoe.cpu.stand_ins import calls, counted

# Megatron takes CUDA-only paths as soon as it can import one of these.
HIDDEN_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h

_undo: contextlib.ExitStack | None = None  # not None: installed


def is_installed() -> bool:
    """Whether the replacements are in place."""
    return _undo is not None


def intercepted_calls() -> dict[str, int]:
    """Per replaced name, the calls it answered since the last reset."""
    return dict(calls)


def reset_intercepted_calls() -> None:
    """Start counting from zero."""
    calls.clear()


def keep_freed_memory() -> None:
    """Let large tensors take the memory of freed ones, as CUDA's caching allocator does; other C libraries stay.

    glibc gives blocks of 32 MiB and more back at once, and every page of a fresh one is a fault: half of the time of a
    gather of that size. It lasts as long as the process does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def install() -> None:
    """Hide CUDA-only packages, import Megatron, apply ``REPLACEMENTS``; a second call changes nothing."""
    global _undo  # noqa: PLW0603 - one process has one torch
    if torch.cuda.is_available():
        raise RuntimeError("cpu_backend: this machine has CUDA; start without cpu_backend.install()")
    if is_installed():
        return
    megatron_is_imported = "megatron.core" in sys.modules
    visible = [name for name in HIDDEN_PACKAGES if _is_visible(name)]
    if megatron_is_imported and visible:
        raise RuntimeError(f"cpu_backend: Megatron was imported with {visible[0]} visible; call install() before it")
    with contextlib.ExitStack() as stack, warnings.catch_warnings():  # undoes everything if anything below fails
        # While it is imported Megatron warns a dozen times on each rank that the packages hidden here are missing.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
        _hide_packages(stack)
        if megatron_is_imported:
            # Its fused functions went through torch.compile already; this makes those run eagerly too.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for replacement in REPLACEMENTS:
            for target in replacement.targets():
                _apply(target, replacement, stack)
        _silence_shared_generator(stack)
        keep_freed_memory()
        if torch.cuda.is_available():
            raise RuntimeError("cpu_backend: unset PYTORCH_NVML_BASED_CUDA_CHECK, it asks the replaced device_count")
        _undo = stack.pop_all()


def uninstall() -> None:
    """Restore every replaced attribute; Megatron stays imported."""
    global _undo  # noqa: PLW0603
    if _undo is not None:
        _undo.close()
        _undo = None


def _is_visible(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _hide_packages(stack: contextlib.ExitStack) -> None:
    for name in HIDDEN_PACKAGES:
        if name in sys.modules:
            stack.callback(sys.modules.__setitem__, name, sys.modules[name])
        else:
            stack.callback(sys.modules.pop, name, None)
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError


def _apply(target: str, replacement: Replacement, stack: contextlib.ExitStack) -> None:
    owner_name, _, attribute = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)  # imports Megatron when its first row comes
    original = inspect.getattr_static(owner, attribute)  # a classmethod stays a classmethod
    stand_in = replacement.make(original)
    if replacement.counted and inspect.isfunction(stand_in):
        stand_in = counted(stand_in, target)
    if attribute in vars(owner):
        stack.callback(setattr, owner, attribute, original)
    else:
        stack.callback(delattr, owner, attribute)  # it was inherited
    setattr(owner, attribute, stand_in)


def _silence_shared_generator(stack: contextlib.ExitStack) -> None:
    # Megatron warns at each fork that the CPU generator moved. Here that generator is the one it forked.
    logger = logging.getLogger("megatron.core.tensor_parallel.random")

    def is_about_something_else(record: logging.LogRecord) -> bool:
        return record.msg != "CPU RNG state changed within GPU RNG context"

    logger.addFilter(is_about_something_else)
    stack.callback(logger.removeFilter, is_about_something_else)
