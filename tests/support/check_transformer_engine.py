"""Are our Transformer Engine blocks checkpoint-compatible with the stock ones? Needs the package, but no GPU.

    python tests/support/check_transformer_engine.py

Builds stock and shortcut models of every position from Transformer Engine's modules on the CPU, where they can be
constructed though not run, and compares the keys and global shapes of their checkpoints. Exits with 1 where they
differ. Not part of `make test`, whose environment has no Transformer Engine.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parents[1])]

CASES = [("pos1", 1), ("pos1", 2), ("pos2", 2), ("pos3", 2), ("pos2", 4)]


class _Inert:
    """A stream or event that is never used: nothing runs here."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...


def pretend_to_have_cuda() -> None:
    """Answer what the constructors of Megatron and Transformer Engine ask; any kernel would still fail."""
    properties = types.SimpleNamespace(major=9, minor=0, name="none", multi_processor_count=1, total_memory=0)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.Stream = torch.cuda.Event = _Inert
    torch.cuda.current_stream = lambda *_: _Inert()
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda._lazy_call = lambda *_, **__: None
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda *_, **__: None


def keys_and_shapes(position: str, moe_every: int, *, grouped_gemm: bool, shortcut: bool) -> dict[str, tuple[int, ...]]:
    """Sharded keys of one model, with their global shapes; () for entries that are not tensors."""
    import models
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_scmoe.config import Position, ScMoEConfig, Shortcut
    from megatron_scmoe.models.gpt import ScMoEGPTModelBuilder, ScMoEGPTModelConfig, with_shortcut

    transformer = models.transformer_config(models.Case(position=(position,), moe_every=moe_every, num_groups=1))
    transformer.transformer_impl = "transformer_engine"
    transformer.use_cpu_initialization = True
    transformer.moe_grouped_gemm = grouped_gemm
    transformer.hidden_size, transformer.kv_channels = 32, 16  # its kernels want multiples of 16
    common = {"transformer": transformer, "vocab_size": 32, "position_embedding_type": "rope"}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if shortcut:
        scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, shortcut_position=(Position(position),), moe_every=moe_every)
        model = ScMoEGPTModelBuilder(with_shortcut(ScMoEGPTModelConfig(**common), scmoe)).build_model(groups)
    else:
        model = GPTModelBuilder(GPTModelConfig(**common)).build_model(groups)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    entries = model.sharded_state_dict(metadata=metadata).values()
    return {entry.key: tuple(getattr(entry, "global_shape", ()) or ()) for entry in entries}


def main() -> int:
    pretend_to_have_cuda()
    logging.disable(logging.WARNING)  # Megatron's about one generator for two devices, at every parameter
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    failures = 0
    for grouped_gemm in (False, True):
        for position, moe_every in CASES:
            stock, ours = (
                keys_and_shapes(position, moe_every, grouped_gemm=grouped_gemm, shortcut=shortcut)
                for shortcut in (False, True)
            )
            different = sorted(key for key in stock.keys() | ours.keys() if stock.get(key) != ours.get(key))
            failures += bool(different)
            experts = "grouped GEMM" if grouped_gemm else "sequential experts"
            print(
                f"{position}, --moe-every {moe_every}, {experts}: {len(stock)} keys, different: {different or 'none'}"
            )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
