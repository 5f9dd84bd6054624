"""Published training steps as workloads: NVIDIA's performance tables of Megatron-Bridge, releases 25.09 to 26.08.

``published_steps.csv`` has the rows of the tables (https://github.com/NVIDIA-NeMo/Megatron-Bridge, docs/
performance-summary.md of tags v0.2.0 to v0.6.0; routing forced to be balanced, mock data); ``published_settings.csv``
what they leave out, from the recipes of the tag named in each line. A row takes the last line of its model, GPU and
precision that is not newer than it.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from planning.counts import model_flops
from planning.shapes import SHAPES, stages
from planning.training import Dispatcher, Graphs, Precision, Training
from planning.workload import Layout, Workload

STEPS = Path(__file__).with_name("published_steps.csv")
SETTINGS = Path(__file__).with_name("published_settings.csv")

_PRECISIONS = {
    "BF16": Precision.BF16,
    "FP8": Precision.FP8,
    "FP8-CS": Precision.FP8,
    "FP8(?)": Precision.FP8,
    "FP8-MX": Precision.MXFP8,
    "MXFP8": Precision.MXFP8,
    "NVFP4": Precision.NVFP4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A published step.

    Attributes:
        family: its model.
        gpu: key of ``HARDWARE``.
        release: of the software.
        workload: what ran.
        step_s: measured: tokens of a step over tokens/s of all GPUs.
        flops: model FLOP of a token, as published.
        words: the row, in words.
    """

    family: str
    gpu: str
    release: str
    workload: Workload
    step_s: float
    flops: float
    words: str


@cache
def steps() -> tuple[Step, ...]:
    """All published steps, in the order of the file."""
    with STEPS.open(newline="") as file:
        return tuple(map(_step, csv.DictReader(file)))


def _step(row: dict[str, str]) -> Step:
    family = row["model"].partition(" (")[0]
    gpu = row["system"].removeprefix("DGX-")
    shape = SHAPES[family]
    tokens_per_s, tflops = _number(row["tokens_per_s_per_gpu"]), _number(row["tflops_per_gpu"])
    layout = Layout(
        gpus=int(row["gpus"]),
        tp=int(row["tp"]),
        pp=int(_number(row["pp"])),
        vp=int(_number(row["vp"])) if row["vp"] != "n/a" else 1,
        cp=int(row["cp"]),
        ep=int(row["ep"]),
    )
    candidates = [
        Workload(
            stages=stages(shape, layout.pp, layout.vp, predicting=predicting),
            hidden=shape.hidden,
            vocabulary=shape.vocabulary,
            seq_length=int(row["seq_length"]),
            micro_batch=int(row["micro_batch"]),
            global_batch=int(row["global_batch"]),
            layout=layout,
            training=_training(family, gpu, row["precision"], row["release"]),
        )
        for predicting in (False, True)
    ]
    flops = tflops * 1e12 / tokens_per_s
    # Some rows trained prediction layers and do not say so: their published FLOP do.
    workload = min(candidates, key=lambda one: abs(_flops_of_token(one) / flops - 1))
    step_s = workload.global_batch * workload.seq_length / (layout.gpus * tokens_per_s)
    words = f"{row['model']}, {layout.gpus} {gpu}, {row['precision']}, {row['release']}"
    return Step(
        family=family, gpu=gpu, release=row["release"], workload=workload, step_s=step_s, flops=flops, words=words
    )


def _flops_of_token(workload: Workload) -> float:
    return model_flops(workload) / (workload.global_batch * workload.seq_length)


def _number(text: str) -> float:
    """The first number of a cell; a second one, in parentheses, is of another setting."""
    found = re.match(r"[\d.]+", text)
    if not found:
        raise ValueError(f"{text!r} in {STEPS.name} is no number")
    return float(found[0])


@cache
def _settings() -> tuple[dict[str, str], ...]:
    with SETTINGS.open(newline="") as file:
        return tuple(csv.DictReader(file))


def _training(family: str, gpu: str, precision: str, release: str) -> Training:
    found = [
        line
        for line in _settings()
        if (line["model"], line["gpu"]) == (family, gpu)
        and line["precision"] in ("*", precision)
        and line["since"] <= release
    ]
    if not found:
        raise ValueError(f"{SETTINGS.name} has no line for {family} on {gpu} in release {release}")
    line = found[-1]
    return Training(
        precision=_PRECISIONS[precision],
        dispatcher=Dispatcher(line["dispatcher"]),
        recompute=frozenset(line["recompute"].split()),
        overlap_moe=line["overlap_moe"] == "1",
        cuda_graphs=Graphs(line["graphs"]),
        fused_experts=line["fused"] == "1",
        fp8_attention=line["fp8_attention"] == "1",
        grad_bytes=2,  # grad_reduce_in_fp32 is off in all of these recipes
    )
