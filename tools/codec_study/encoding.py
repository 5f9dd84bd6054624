"""What hashing, centroids, residuals and fp8 cost, beside the experts whose rows they save."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import provenance
import torch
from torch import Tensor

from codec_study.cost import Cost
from megatron_scmoe.codec.lloyd import refined
from megatron_scmoe.codec.lsh import Clusters, Hasher, cluster, means, restore
from megatron_scmoe.codec.rounding import Fp8
from megatron_scmoe.cpu import backend as cpu_backend

ROWS, HIDDEN, EXPERTS = 8192, 1024, 8
HASHES, WIDTH = 6, 2
CENTRES = 200
NOISE = 0.01


def cost_of_encoding(repetitions: int) -> Cost:
    """Time an expert MLP's forward on all rows and everything that the codec does to them, by turns.

    Rows lie around centres, so that about a fifth of them is left: random ones would not compress. One thread, fp32,
    freed memory kept, as in a training.

    Args:
        repetitions: of each, behind one to warm up.

    Returns:
        With seconds of ``mlp``, ``encode`` (hash, cluster, means), ``refine`` (one step of Lloyd's algorithm),
        ``restore`` (outputs, weights), ``compensate`` (the same with residuals, as the paper has it) and ``fp8``
        (of one transfer: to codes and back).
    """
    whence = provenance.provenance()
    torch.set_num_threads(1)
    cpu_backend.keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, HIDDEN, generator=generator)
    which = torch.randint(CENTRES, (ROWS,), generator=generator)
    rows = centres[which] + NOISE * torch.randn(ROWS, HIDDEN, generator=generator)
    rows_per_expert = torch.full((EXPERTS,), ROWS // EXPERTS)
    weights = torch.rand(ROWS, generator=generator)
    up = torch.randn(HIDDEN, 4 * HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(4 * HIDDEN, HIDDEN, generator=generator) * HIDDEN**-0.5
    fp8 = Fp8()
    hasher = Hasher(HIDDEN, hashes=HASHES, width=WIDTH, seed=1)
    found: dict[str, list[float]] = defaultdict(list)

    def encode() -> tuple[Tensor, Clusters]:
        keys, finite = hasher.keys(rows)
        assert finite
        clusters = cluster(keys, rows_per_expert)
        return means(rows, clusters, int(clusters.per_expert.sum())), clusters

    with torch.no_grad():
        for repetition in range(-1, repetitions):
            mlp_s, _ = _timed(lambda: torch.nn.functional.gelu(rows @ up) @ down)
            encode_s, (centroids, clusters) = _timed(encode)
            refine_s, _ = _timed(lambda: refined(clusters, hasher.sketches(rows), rows_per_expert, len(centroids)))  # noqa: B023
            outputs = centroids * 2
            restore_s, _ = _timed(lambda: restore(outputs, clusters, weights))  # noqa: B023
            compensate_s, _ = _timed(lambda: restore(outputs, clusters, weights, (rows, centroids)))  # noqa: B023
            fp8_s, _ = _timed(lambda: fp8.decode(fp8.encode(rows), rows.dtype))
            if repetition >= 0:
                seconds = {"mlp": mlp_s, "encode": encode_s, "refine": refine_s, "restore": restore_s}
                for name, value in {**seconds, "compensate": compensate_s, "fp8": fp8_s}.items():
                    found[name].append(value)
    return {"rows": ROWS, "hidden": HIDDEN, "rate": len(centroids) / ROWS, "seconds": dict(found), **whence}


def _timed[T](work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
