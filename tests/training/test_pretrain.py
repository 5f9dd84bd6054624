"""End to end, as a user runs it: text in, torchrun, a kill in the middle of a save, and on from the last checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import training
from training import MODEL, PLAIN, ROOT, with_flags

SAVE_INTERVAL = 10
TEXT_TRAINING = """--micro-batch-size 4 --global-batch-size 8 --lr 5e-3 --lr-decay-style constant --train-iters 20
 --eval-interval 1000 --eval-iters 1 --log-interval 1 --num-workers 0 --no-create-attention-mask-in-dataloader
 --split 90,10,0 --tokenizer-type SentencePieceTokenizer --expert-model-parallel-size 2
 --shortcut scmoe --override-opt-param-scheduler"""
# Large enough that a save takes a while, small enough that an iteration does not.
WIDE = ["--hidden-size 192", "--moe-ffn-hidden-size 512", "--num-experts 8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A package of the standard library as Megatron's indexed dataset, written by our own tool."""
    folder = tmp_path_factory.mktemp("text") / "data"
    modules = sorted(Path(sysconfig.get_paths()["stdlib"], "asyncio").glob("*.py"))
    subprocess.run(
        [sys.executable, "tools/preprocess_data.py", "--input", *modules, "--output", folder, "--vocab-size", "512"],
        cwd=ROOT,
        check=True,
    )
    return folder


def torchrun(flags: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, "pretrain_gpt_scmoe.py", *flags], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )


def kill_all(process: subprocess.Popen) -> None:
    """kill -9 to torchrun and its ranks, stopped first so that none of them gets on meanwhile."""
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.kill()
    process.wait()


def kill_during_save(flags: list[str], checkpoints: Path, iteration: int, log: Path) -> bool:
    """Train until the folder of ``iteration`` appears, then kill; returns whether that save was still unfinished."""
    process = torchrun(flags, log)
    folder = checkpoints / f"iter_{iteration:07d}"
    try:
        deadline = time.monotonic() + 120
        while not folder.exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.001)
    finally:
        kill_all(process)
    return (checkpoints / "latest_checkpointed_iteration.txt").read_text() != str(iteration)


@pytest.mark.full
def test_text_in_kill_during_save_and_resume(tmp_path, data):
    checkpoints, log = tmp_path / "checkpoints", tmp_path / "log"
    flags = with_flags(
        f"{PLAIN} {MODEL} {TEXT_TRAINING}".split(),
        *WIDE,
        f"--data-path {data / 'text_document'}",
        f"--tokenizer-model {data / 'tokenizer.model'}",
        f"--save {checkpoints}",
        f"--load {checkpoints}",
        f"--save-interval {SAVE_INTERVAL}",
        f"--tensorboard-dir {tmp_path / 'tensorboard'}",
    )
    # A save may just have ended when the kill comes; then the next run resumes from it and is killed in a later one.
    for iteration in (20, 30, 40):
        unfinished = kill_during_save(with_flags(flags, f"--train-iters {iteration}"), checkpoints, iteration, log)
        if unfinished:
            break
    assert unfinished, "three saves were faster than the kill"
    last_complete = iteration - SAVE_INTERVAL
    assert (checkpoints / f"iter_{iteration:07d}").exists()

    process = torchrun(with_flags(flags, f"--train-iters {iteration}"), log)
    try:
        assert process.wait(120) == 0, log.read_text()[-3000:]
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    printed = log.read_text()
    assert f"at iteration {last_complete}" in printed
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == str(iteration)
    losses = {int(i): float(loss) for i, loss in re.findall(r"iteration +(\d+)/.* lm loss: (\S+)", printed)}
    assert sorted(losses) == list(range(last_complete + 1, iteration + 1))
    first_loss = training.scalars(tmp_path / "tensorboard", "lm loss")["lm loss"][1]
    assert losses[iteration] < 0.9 * first_loss
    assert re.search(r"validation loss at iteration \d+ on validation set .* PPL: \d", printed)
    assert re.search(r"> \d+ of \d+ iterations done, about 0:\d\d:\d\d left", printed)


def losses_of_the_small_example(
    home: Path, data: Path, iterations: int, *more: str, container: str = "gpt"
) -> tuple[float, float]:
    """Of the example script: the first loss that it logs, and that of the validation at its end."""
    home.mkdir()
    (home / "data").symlink_to(data)
    done = subprocess.run(
        [ROOT / "examples/pretrain_small.sh", home, str(iterations), "--log-interval", "1", *more],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CONTAINER": container},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    first = re.search(r"iteration +1/.* lm loss: (\S+)", done.stdout)
    last = re.search(
        rf"validation loss at iteration {iterations} on validation set .*? lm loss value: (\S+)", done.stdout
    )
    assert first and last, done.stdout[-3000:]
    return float(first[1]), float(last[1])


@pytest.mark.full
@pytest.mark.parametrize("container", ["gpt", "hybrid"])
def test_the_small_example_learns(tmp_path, data, container):
    first, last = losses_of_the_small_example(tmp_path / "learns", data, 60, container=container)
    assert last < 0.75 * first
    runs = tmp_path / "learns" / ("hybrid" if container == "hybrid" else "")
    assert (runs / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "60"
    saved = training.checkpoint_tensors(runs / "checkpoints", 60)
    assert any("mixer.in_proj" in name for name in saved) is (container == "hybrid")


@pytest.mark.parametrize("called", ["make", "script"])
def test_an_unknown_container_is_refused_before_anything_else(tmp_path, called):
    """Negative control: the known ones are not."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    words = ["make", "-n", "pretrain"] if called == "make" else [ROOT / "examples/pretrain_small.sh", tmp_path]
    programs = {"PATH": "/usr/bin:/bin"}  # without torchrun: what is not refused ends there
    ends = {
        name: subprocess.run(
            words, env=programs | {"CONTAINER": name}, cwd=ROOT, capture_output=True, text=True, check=False
        )
        for name in ("mamba", "gpt", "hybrid")
    }
    refused = ends.pop("mamba")
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "CONTAINER is 'mamba', which is no model of Megatron's: use gpt or hybrid" in refused.stderr
    assert not any("CONTAINER is" in done.stderr for done in ends.values())


@pytest.mark.full
def test_nothing_is_learned_without_steps(tmp_path, data):
    """Negative control of the test above: the loss falls by learning alone."""
    first, last = losses_of_the_small_example(tmp_path / "stays", data, 3, "--lr", "0", "--min-lr", "0")
    assert last == pytest.approx(first, rel=0.02)
