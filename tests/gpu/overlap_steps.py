"""Steps of a model of cluster size on one GPU, timed and profiled; `parts/overlap.py` starts it per CUDA setting.

    python -m overlap_steps RESULT.json

One rank of eight, of which the others do not exist: hidden size 2048, 2048 tokens twice, 8 experts of its own, top-1,
bf16. Each all-to-all is a sleep of one thread and a copy of the payload, on a stream of its own, so that it takes its
time and hardly a multiprocessor: what it would take from matrix products is not in these numbers.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import device
import models
import torch
import wire
from models import Case
from torch.profiler import ProfilerActivity, profile

from megatron_scmoe.overlap.costs import passes_of
from megatron_scmoe.overlap.observe import recording
from megatron_scmoe.overlap.spans import communication_s, exposed_s, hidden_share, intersection, length, union

RANKS, SEQUENCE, BATCH, VOCABULARY = 8, 2048, 2, 1024
SIZES = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 16,
    "kv_channels": 128,
    "ffn_hidden_size": 5632,
    "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 5632,
    "num_moe_experts": 64,
}
STEPS = 10
TRANSFERS_S = (80e-6, 450e-6)
PLANS = {
    "off": Case(overlap="off"),
    "fixed": Case(),
    "2 chunks": Case(chunks=2),
    "dgmoe": Case(shortcut="dgmoe"),
}


def build(case: Case) -> torch.nn.Module:
    """The model on this GPU, with its own initialisation."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_scmoe.models.gpt import ScMoEGPTModelBuilder, ScMoEGPTModelConfig, with_shortcut

    sizes = SIZES | ({"moe_shared_expert_intermediate_size": None} if case.shortcut == "dgmoe" else {})
    config = ScMoEGPTModelConfig(
        transformer=dataclasses.replace(models.transformer_config(case.replace(dtype=torch.bfloat16)), **sizes),
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
    )
    builder = ScMoEGPTModelBuilder(with_shortcut(config, models.settings(case)))
    return builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).to(models.DEVICE, torch.bfloat16)


def stepper(model: torch.nn.Module) -> Callable[[], None]:
    """One forward and backward of the same batch."""
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), device=models.DEVICE)
    positions = torch.arange(SEQUENCE, device=models.DEVICE).expand_as(tokens)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, positions, None, labels=tokens).mean().backward()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    """Mean over ``STEPS``."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(STEPS):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / STEPS


def traced(step: Callable[[], None]) -> dict[str, float]:
    """What the profiler saw of one step: the part of transfers beside kernels of other streams, and idle time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return lanes([event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")])


def lanes(events: list[dict]) -> dict[str, float]:
    """Shares and times of a Chrome trace's GPU events, in microseconds there; the wire's stream is that of sleeps."""
    of_wire = {event["args"]["stream"] for event in events if "spin" in event["name"]}
    assert len(of_wire) == 1, (
        f"sleeps on streams {of_wire}; kernels: {sorted({event['name'] for event in events})[:20]}"
    )
    intervals: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        intervals[event["args"]["stream"] in of_wire].append((event["ts"], event["ts"] + event["dur"]))
    transfers, computed = union(intervals[True]), union(intervals[False])
    first, last = computed[0][0], computed[-1][1]
    return {
        "hidden_share": length(intersection(transfers, computed)) / length(transfers),
        "transfers_ms": length(transfers) / 1e3,
        "computed_ms": length(computed) / 1e3,
        "idle_ms": (last - first - length(union([*transfers, *computed]))) / 1e3,
        "kernels": len(intervals[False]),
    }


def reported(step: Callable[[], None]) -> float:
    """The hidden share as --overlap-report gives it, over all groups."""
    with recording() as recorded:
        step()
    passes = passes_of(recorded)
    exposed = sum(exposed_s(one.spans) for one in passes)
    return hidden_share(exposed, sum(communication_s(one.spans) for one in passes))


@contextmanager
def paced(transfer_s: float) -> Iterator[None]:
    """All-to-alls of that time."""
    with wire.in_place_of_torch(wire.Wire(transfer_s, spoils=False)):
        yield


def main() -> None:
    """Measure every plan with every transfer time, and write it down."""
    device.prepare()
    torch.use_deterministic_algorithms(False)  # sums are atomic, as in a training
    found = {}
    wire.cycles_per_s()
    with device.fake_ranks(RANKS):
        for name, case in PLANS.items():
            torch.manual_seed(1)
            step = stepper(build(case))
            for transfer_s in TRANSFERS_S:
                with paced(transfer_s):
                    for _ in range(3):
                        step()
                    torch.cuda.synchronize()
                    measured = {"step_ms": milliseconds(step), **traced(step), "reported_share": reported(step)}
                found[f"{name}, {transfer_s * 1e6:g} us"] = {key: round(value, 3) for key, value in measured.items()}
                Path(sys.argv[1]).write_text(json.dumps(found))
            del step


if __name__ == "__main__":
    main()
