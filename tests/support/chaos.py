"""Kill a training at random moments, start it again, and compare: no checkpoint lost, every loss the same bit for bit.

    python tests/support/chaos.py --kills 100 --out /tmp/chaos

A small ScMoE model trains on two gloo ranks, with the entry script that users start, and saves every second step; one
job in five saves in the background (--async-save). First it trains undisturbed, under torchrun. Then it meets a random
obstacle, in a step or in a save: kill -9 of a rank, of all ranks or of torchrun, SIGSTOP of a rank, a full disk, or a
kill after which a file of the newest checkpoint is cut or gone, or Megatron's tracker is torn. When no process of the
job is left it is started again, and so on until the last step; then it begins anew, until there were enough kills.
All but the first job are forked, torchrun's agent and its ranks, from a process that has imported torch and Megatron.

Wrong is: a step that it continues from which is older than the newest whole checkpoint; a loss that differs in any bit
from that of the undisturbed training; a process that stays; a job that does not end or start, or a hang whose line does
not name the rank. Whatever is wrong is printed; 5 jobs with faults end the call.

written to OUT:
  summary.md, summary.json   figures: what happened how often, what was found
  runs.jsonl                 a line for each job
  logs/                      what each job printed

Needs root for the full disk, a tmpfs; without, a limit of file sizes takes its place, which the summary says.
Exit code 0: nothing was wrong; 1: something was; 130: stopped by ^C (what was done so far is in OUT).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from random import Random

import ranks
import victim
from chaos_judge import NOTHING, Run, faults, in_markdown, summary, written
from obstacles import ALL, DAMAGE, SAVE, STEP, STOP, Disk, Obstacle, damage, obstacles, strike
from victim import INTERVAL, STEPS, Job

MOST_FAULTS = 5
START_S = 240.0
"""Until a job has done some steps, on a machine with other work."""
END_S = 300.0
"""Until a struck job has ended; its own watch ends it within a minute."""
STRIKE_S = 0.3
"""Within which an obstacle comes after a step: about as long as a step or a save takes."""
LONGEST_WAIT_STEPS = 4
WAYS_IN_TURN = ["sync"] * 4 + ["async"]
"""One of these for each job; the writers of ``async`` import everything anew, which takes long."""


class Campaign:
    """Obstacles, one after another.

    Args:
        folder: for all that is written; made where there is none.
        seed: of ranks, moments and ways of saving.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder.absolute()
        self.runs: list[Run] = []
        self.found: list[str] = []
        self._began_s = time.monotonic()
        self._random = Random(seed)
        self._disk = Disk(self.folder / "disk")
        self._save = self._disk.folder / "save"
        for name in ("logs", "losses", "data"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("logs", "losses"):
            (self.folder / name).mkdir()
        (self.folder / "runs.jsonl").write_text("")
        victim.prepare(self.folder)
        ranks.prepare()  #
        self._truth: dict[int, str] = {}
        self._begin_anew()

    def train_undisturbed(self) -> None:
        """Train once, for the losses that all others are compared with."""
        self._begin_anew()
        run = self._train(None)
        self._truth = dict(run.losses)
        if run.exit_code != 0 or sorted(self._truth) != list(range(1, STEPS + 1)):
            raise RuntimeError(f"the undisturbed training did not reach step {STEPS}: {self.folder}/logs/{run.log}")
        self._begin_anew()

    def meet(self, obstacle: Obstacle | None) -> Iterator[Run]:
        """Start or continue the training until ``obstacle`` has struck; one that ends before begins anew.

        Yields:
            Each job, judged. With None it is the one job that comes to the last step.
        """
        while len({fault.split(":")[0] for fault in self.found}) < MOST_FAULTS:
            run = self._train(obstacle)
            new = [f"job {run.number}: {fault}" for fault in faults(run, self._truth)]
            self.runs.append(run)
            self.found += new
            with (self.folder / "runs.jsonl").open("a") as file:
                file.write(json.dumps(asdict(run) | {"faults": new}) + "\n")
            self._write()
            if run.kind == NOTHING or new:
                self._begin_anew()
            yield run
            if obstacle is None or run.kind != NOTHING:
                return

    def close(self) -> None:
        """Free the disk."""
        self._write()
        self._disk.release()

    def _write(self) -> None:
        disk = "a tmpfs" if self._disk.is_mounted else "a limit of file sizes, since no tmpfs could be mounted"
        figures = summary(self.runs, self.found, time.monotonic() - self._began_s) | {"the full disk was": disk}
        (self.folder / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
        (self.folder / "summary.md").write_text(in_markdown(figures))

    def _begin_anew(self) -> None:
        shutil.rmtree(self._save, ignore_errors=True)
        self._whole: set[int] = set()
        self._named: int | None = None  # by the tracker, before the job that comes
        self._last_step = 0

    def _train(self, obstacle: Obstacle | None) -> Run:
        """One job, to its end."""
        number = len(self.runs) + 1 if self._truth else 0
        log, losses = (self.folder / name / f"{number:04d}.log" for name in ("logs", "losses"))
        way, promised = self._random.choice(WAYS_IN_TURN), max(self._whole, default=0)
        run = Run(number=number, way=way, promised=promised, log=log.name)
        job = Job(victim.flags(self.folder, self._save, run.way), log, losses, is_forked=bool(self._truth))
        try:
            if obstacle is not None and job.wait_until(self._is_reached(job, obstacle), START_S):
                time.sleep(self._random.random() * STRIKE_S)
                self._strike(run, job, obstacle.kind)
            run.exit_code, run.seconds, run.orphans = job.wait_for_end(END_S)
        finally:
            job.kill()
            self._disk.free()
        self._look(run, job)
        return run

    def _is_reached(self, job: Job, obstacle: Obstacle) -> Callable[[], bool]:
        """Whether the step has ended behind which, or behind whose save, the obstacle strikes."""
        least = self._random.randint(2 if obstacle.kind == STOP else 1, LONGEST_WAIT_STEPS)

        def is_reached() -> bool:
            losses = job.losses()
            return len(losses) >= least and (losses[-1][0] % INTERVAL == 0) == (obstacle.moment == SAVE)

        return is_reached

    def _strike(self, run: Run, job: Job, kind: str) -> None:
        losses = job.losses()
        last = losses[-1][0]
        to_save = last - last % INTERVAL
        is_saving = to_save >= losses[0][0] and victim.tracker(self._save) != to_save
        words = strike(kind, job, self._disk, self._random)
        if words:
            run.kind, run.moment, run.words = kind, SAVE if is_saving else STEP, words

    def _look(self, run: Run, job: Job) -> None:
        """What a job has left behind; and damage it."""
        if run.exit_code == 0:
            run.kind, run.moment = NOTHING, ""  # it had ended before, or the disk was large enough
        printed = job.printed()
        run.losses, run.began_from = job.losses(), victim.continued_from(printed)
        run.damage, run.hang = (_first_line(words, printed) for words in ("the newest whole one", "hang: "))
        run.repeated = max(0, self._last_step - (run.began_from or 0))
        self._last_step = run.losses[-1][0] if run.losses else self._last_step
        named = victim.tracker(self._save)
        self._whole |= written(victim.steps_saved(printed), self._named, named)
        self._named = named
        if run.kind != DAMAGE:
            return
        if not self._whole:
            run.kind = ALL
            return
        words, lost = damage(self._save, self._whole, self._random)
        self._named = victim.tracker(self._save)
        run.words += f"; {words}"
        self._whole.discard(lost or 0)


def _first_line(words: str, text: str) -> str:
    found = re.search(rf"^.*{re.escape(words)}.*$", text, re.MULTILINE)
    return found[0].strip() if found else ""


def meet_all(campaign: Campaign, wanted: list[Obstacle]) -> None:
    """And train to the end; prints a line for each job."""
    campaign.train_undisturbed()
    began_s = time.monotonic()
    for number, obstacle in enumerate([*wanted, None], start=1):
        for run in campaign.meet(obstacle):
            passed_s = time.monotonic() - began_s
            left = timedelta(seconds=round(passed_s / number * (len(wanted) + 1 - number)))
            print(f"[{number}/{len(wanted) + 1}, about {left} left] {in_words(run)}", flush=True)
            for fault in campaign.found:
                if fault.startswith(f"job {run.number}: "):
                    print(f"FAULT: {fault}", flush=True)


def in_words(run: Run) -> str:
    """A line."""
    losses = f"from step {run.began_from}, {len(run.losses)} steps, {run.way}"
    end = f"ended with {run.exit_code}" + (f" after {run.seconds:.1f} s" if run.kind != NOTHING else "")
    return f"job {run.number} {losses}: {f'{run.words}, in a {run.moment}; ' if run.words else ''}{end}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how many (default 100, under an hour)")
    parser.add_argument("--seed", type=int, default=0, help="of the order, moments and ranks (default 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where all of it is written")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"a campaign has kills: --kills is {args.kills}; give 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as any exit, it frees the disk
    victim.adopt_orphans()
    campaign = Campaign(args.out, args.seed)
    try:
        meet_all(campaign, obstacles(args.kills, Random(args.seed)))
    except KeyboardInterrupt:
        print(f"chaos.py: stopped by SIGINT; what was done is in {args.out}", file=sys.stderr)
        return 130
    finally:
        campaign.close()
    print((args.out / "summary.md").read_text())
    return 1 if campaign.found else 0


if __name__ == "__main__":
    sys.exit(main())
