"""Steps of a model of cluster size on one GPU, timed and profiled; `parts/overlap.py` starts it per CUDA setting.

    python -m overlap_steps RESULT.json

One rank of eight, of which the others do not exist: hidden size 2048, 2048 tokens twice, 8 experts of its own, top-1,
bf16. Each all-to-all is a copy of the payload on a stream of its own, which takes as long as a link would. It sleeps in
one thread meanwhile and takes no multiprocessor; or, to see what NCCL's kernels take from matrix products, it holds 8,
16 or 32 of them, at a normal and at a high priority (``paced.py``).

On the CPU this is a dry run: a tiny model, and times of a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import device
import models
import paced
import torch
import wire
from device import HAS_CUDA
from models import Case
from torch.profiler import ProfilerActivity, profile

from megatron_scmoe.contracts import Launch, Plan, SpanShape
from megatron_scmoe.overlap.costs import costs_of, passes_of
from megatron_scmoe.overlap.observe import END, recording
from megatron_scmoe.overlap.plan import WAIT, even_plan, forward_order, sequential_plan
from megatron_scmoe.overlap.recording import Recording
from megatron_scmoe.overlap.solver import CallCosts
from megatron_scmoe.overlap.spans import communication_s, exposed_s, hidden_share, intersection, length, union

if TYPE_CHECKING:
    from megatron_scmoe.layers.span import GroupSpan  # and Megatron with it, which `device.prepare` makes importable

RANKS, SEQUENCE, BATCH, VOCABULARY = (8, 2048, 2, 1024) if HAS_CUDA else (2, 8, 2, 32)
STEPS, COST_STEPS = (10, 3) if HAS_CUDA else (1, 1)
SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_query_groups": 16,
    "kv_channels": 128,
    "ffn_hidden_size": 5632,
    "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 5632,
    "num_moe_experts": 64,
}
SHORT_S, LONG_S = 80e-6, 450e-6
"""What the tokens of a rank take to their experts: of eight GPUs on NVLink, of 64 with a 400 Gbit/s link each."""
PAYLOAD_BYTES = SEQUENCE * BATCH * SIZES["hidden_size"] * 2


def launched(shape: SpanShape, launch: Launch) -> Plan:
    """One chunk in the middle of the window, launched there."""
    return dataclasses.replace(even_plan(shape, 1), launch=launch)


MODELS = {
    "pos2": Case(),
    "pos1": Case(position=("pos1",)),
    "dgmoe": Case(shortcut="dgmoe"),
    "lsh": Case(codec="lsh", hashes=6),
}
PLANS: dict[str, tuple[str, Callable[[SpanShape], Plan]]] = {
    "off": ("pos2", sequential_plan),
    "fixed": ("pos2", partial(even_plan, chunks=1)),
    "behind": ("pos2", partial(launched, launch=Launch.BEHIND)),
    "2 chunks": ("pos2", partial(even_plan, chunks=2)),
    "4 chunks": ("pos2", partial(even_plan, chunks=4)),
    "pos1": ("pos1", partial(even_plan, chunks=1)),
    "pos1, within": ("pos1", partial(launched, launch=Launch.WITHIN)),
    "pos1, behind": ("pos1", partial(launched, launch=Launch.BEHIND)),
    "dgmoe": ("dgmoe", partial(even_plan, chunks=1)),
}
WITH_SHORT = ("off", "fixed", "pos1, within")
WITH_ONE_QUEUE = ("off", "fixed", "behind", "2 chunks")
"""With CUDA_DEVICE_MAX_CONNECTIONS=1; the rest does not depend on it."""
CONTENDERS = [(ctas, priority) for ctas in (8, 16, 32) for priority in (0, -1)] if HAS_CUDA else []


def build(case: Case) -> torch.nn.Module:
    """The model on this device, with its own initialisation."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_scmoe.models.gpt import ScMoEGPTModelBuilder, ScMoEGPTModelConfig, with_shortcut

    sizes = SIZES | ({"moe_shared_expert_intermediate_size": None} if case.shortcut == "dgmoe" else {})
    dtype = torch.bfloat16 if HAS_CUDA else torch.float32
    transformer = models.transformer_config(case.replace(dtype=dtype))
    config = ScMoEGPTModelConfig(
        transformer=dataclasses.replace(transformer, **sizes) if HAS_CUDA else transformer,
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
    )
    builder = ScMoEGPTModelBuilder(with_shortcut(config, models.settings(case)))
    return builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).to(models.DEVICE, dtype)


def spans(model: torch.nn.Module) -> list[GroupSpan]:
    """Of all groups."""
    return [layer.span for layer in model.decoder.layers if getattr(layer, "span", None) is not None]


def set_plans(model: torch.nn.Module, plan: Callable[[SpanShape], Plan]) -> None:
    """Let every span run by ``plan``."""
    for span in spans(model):
        span.plan = plan(span.shape)
        assert span.shape.has(span.plan)


def stepper(model: torch.nn.Module) -> Callable[[], None]:
    """One forward and backward of the same batch."""
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), device=models.DEVICE)
    positions = torch.arange(SEQUENCE, device=models.DEVICE).expand_as(tokens)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, positions, None, labels=tokens).mean().backward()

    return step


# ---- what is measured


def milliseconds(step: Callable[[], None]) -> float:
    """Mean over ``STEPS``."""
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / STEPS * 1e3


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
    """Shares and times of a Chrome trace's GPU events, in microseconds there; its kernels tell the wire's stream."""
    of_wire = {event["args"]["stream"] for event in events if "spin" in event["name"] or paced.KERNEL in event["name"]}
    assert len(of_wire) == 1, (
        f"transfers on streams {of_wire}; kernels: {sorted({event['name'] for event in events})[:20]}"
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


def reported(recorded: Recording) -> dict[str, float]:
    """Hidden share and idle time as --overlap-report gives them, over all groups."""
    passes = passes_of(recorded)
    exposed = sum(exposed_s(one.spans) for one in passes)
    share = hidden_share(exposed, sum(communication_s(one.spans) for one in passes))
    idle = [length(one.idle) for one in passes if one.idle is not None]
    return {"reported_share": share, **({"reported_idle_at_most_ms": sum(idle) * 1e3} if idle else {})}


def host_us(recorded: Recording) -> dict[str, float]:
    """What the host takes for a group's forward and backward, its wait for counts apart; means, marks included."""
    found = {"host_forward_us": 0.0, "host_backward_us": 0.0, "host_waits_us": 0.0}
    for mark, following in pairwise(recorded.marks):
        if mark.name != END:
            kind = "host_waits_us" if mark.name == WAIT else f"host_{'backward' if mark.backward else 'forward'}_us"
            found[kind] += (following.host_s - mark.host_s) * 1e6
    num_groups = len({mark.group for mark in recorded.marks})
    return {name: total / num_groups for name, total in found.items()}


def measured(step: Callable[[], None], transfer_s: float, *, ctas: int = 0, priority: int = 0) -> dict[str, float]:
    """One plan with one kind of transfer."""
    line = wire.Wire(transfer_s, spoils=False, full_bytes=PAYLOAD_BYTES, ctas=ctas, priority=priority)
    with wire.in_place_of_torch(line):
        for _ in range(3 if HAS_CUDA else 1):
            step()
        found = {"step_ms": milliseconds(step)}
        with recording() as recorded:
            step()
        found |= reported(recorded) | host_us(recorded)
        if HAS_CUDA:
            line.asked_s = 0.0
            found |= traced(step)
            found["transfers_asked_ms"] = line.asked_s * 1e3
    return _rounded(found)


def costs_us(model: torch.nn.Module, step: Callable[[], None]) -> dict[str, dict[str, float]]:
    """What a group's call costs on the compute lane, each step by itself, as the solver gets it; in microseconds."""
    set_plans(model, sequential_plan)
    passes = []
    with wire.in_place_of_torch(wire.Wire(SHORT_S, spoils=False)):
        step()
        for _ in range(COST_STEPS):
            with recording() as recorded:
                step()
            passes += passes_of(recorded)
    span = spans(model)[0]
    costs = costs_of([one for one in passes if one.group == span.group_index], span.shape, chunks=1)
    assert costs is not None
    return {"forward": _us(costs.forward.calls[0]), "backward": _us(costs.backward.calls[0])}


def order(model: torch.nn.Module, step: Callable[[], None]) -> tuple[list, list]:
    """Steps of the first span's forward: as they were launched, and by its plan."""
    with wire.in_place_of_torch(wire.Wire(0, spoils=False)), recording() as recorded:
        step()
    span = spans(model)[0]
    marks = [mark for mark in recorded.marks if mark.group == span.group_index and not mark.backward][1:-1]
    planned = forward_order(span.op_names, span.shape, span.plan)
    return [[mark.name, mark.index, mark.call] for mark in marks], [list(one) for one in planned]


def _us(call: CallCosts) -> dict[str, float]:
    return _rounded({name: seconds * 1e6 for name, seconds in dataclasses.asdict(call).items()})


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in found.items()}


# ---- all of it


def measure_all(*, one_queue: bool, keep: Callable[[dict], None] = lambda _found: None) -> dict[str, dict]:
    """Steps and orders by plan, costs by model.

    Args:
        one_queue: whether CUDA has one; then what depends on it is measured.
        keep: called with what was found so far.
    """
    found: dict[str, dict] = {"steps": {}, "orders": {}, "costs": {}}
    plans = {name: PLANS[name] for name in (WITH_ONE_QUEUE if one_queue else PLANS)}
    with device.fake_ranks(RANKS):
        for model_name, case in MODELS.items():
            its_plans = {name: plan for name, (its_model, plan) in plans.items() if its_model == model_name}
            if one_queue and not its_plans:
                continue
            torch.manual_seed(1)
            model = build(case)
            step = stepper(model)
            for name, plan in its_plans.items():
                set_plans(model, plan)
                for words, numbers in _steps_of(name, step, one_queue=one_queue):
                    found["steps"][words] = numbers
                    keep(found)
                found["orders"][name] = order(model, step)
            if not one_queue:
                found["costs"][model_name] = costs_us(model, step)
            keep(found)
            del model, step
    return found


def _steps_of(name: str, step: Callable[[], None], *, one_queue: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """What is measured of one plan, in words, and its numbers."""
    yield f"{name}, {LONG_S * 1e6:g} us", measured(step, LONG_S)
    if one_queue:
        return
    if name in WITH_SHORT:
        yield f"{name}, {SHORT_S * 1e6:g} us", measured(step, SHORT_S)
    if name == "fixed":
        for ctas, priority in CONTENDERS:
            words = f"{name}, {LONG_S * 1e6:g} us, {ctas} multiprocessors, priority {priority}"
            yield words, measured(step, LONG_S, ctas=ctas, priority=priority)


def main() -> None:
    """Measure, and write it down as it is found."""
    device.prepare()
    torch.use_deterministic_algorithms(False)  # sums are atomic, as in a training
    one_queue = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    measure_all(one_queue=one_queue, keep=lambda found: Path(sys.argv[1]).write_text(json.dumps(found)))


if __name__ == "__main__":
    main()
