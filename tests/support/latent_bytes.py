"""A rank of slow_link.py: what the network interfaces of all ranks sent in a few steps, and what our transfers say.

    slow_link.py --rate unlimited -- python latent_bytes.py FILE LATENT_SIZE [UNIQUE]
    slow_link.py --ranks 4 --ranks-per-node 2 --rate unlimited -- python latent_bytes.py FILE LATENT_SIZE UNIQUE

Rank 0 writes FILE. Its model is one group of width 256, whose experts read latents of LATENT_SIZE, or tokens for 0.
With UNIQUE, a value of --a2a-unique, tokens are routed at random.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parents[1]), str(_HERE.parents[1] / "tools")]

from megatron_scmoe.cpu import backend as cpu_backend  # noqa: E402

cpu_backend.install()

import models  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from slow_network.control import Control  # noqa: E402

from megatron_scmoe.config import Position, ScMoEConfig, Shortcut, Unique  # noqa: E402
from megatron_scmoe.models.gpt import ScMoEGPTModelBuilder, ScMoEGPTModelConfig, with_shortcut  # noqa: E402
from megatron_scmoe.overlap import observe  # noqa: E402

WIDTH, TOKENS, STEPS = 256, 512, 4


def build(latent: int, unique: str) -> torch.nn.Module:
    """One group at pos2, top-2, its experts split over the ranks."""
    transformer = models.transformer_config(models.Case(num_groups=1, topk=2, combine="add", latent=latent or None))
    transformer.hidden_size, transformer.kv_channels = WIDTH, WIDTH // transformer.num_attention_heads
    transformer.moe_router_force_load_balancing = bool(unique)
    how = {"a2a_unique": Unique(unique)} if unique else {}
    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, shortcut_position=(Position.POS2,), **how)
    config = ScMoEGPTModelConfig(
        transformer=transformer, vocab_size=32, seq_length=TOKENS, position_embedding_type="rope"
    )
    return ScMoEGPTModelBuilder(with_shortcut(config, scmoe)).build_model(
        ProcessGroupCollection.use_mpu_process_groups()
    )


def main(path: str, latent: str, unique: str = "") -> None:
    """Count the bytes of STEPS forward and backward passes; gradients are not reduced."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=size, expert_tensor_parallel_size=1)
    model_parallel_cuda_manual_seed(1)
    model, control = build(int(latent), unique), Control.from_environment()
    tokens = torch.arange(TOKENS).remainder(32)[None]
    model(tokens, tokens, None, labels=tokens).sum().backward()  # connections are made at the first one
    dist.barrier()
    before = control.bytes_sent()
    dist.barrier()
    with observe.recording() as recorded:
        for _ in range(STEPS):
            model(tokens, tokens, None, labels=tokens).sum().backward()
    dist.barrier()
    after = control.bytes_sent()
    mine = sum(transfer.sent_bytes for transfer in recorded.transfers)
    of_ranks: list[int] = [0] * size
    dist.all_gather_object(of_ranks, mine)
    if dist.get_rank() == 0:
        sent = [late - early for early, late in zip(before, after, strict=True)]
        Path(path).write_text(json.dumps({"interface": sent, "transfers": of_ranks}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
