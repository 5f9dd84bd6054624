"""The steps of a training run, as the overlap sees them: plans change, and reports are written, between two steps.

Megatron has no hook between steps, so the first micro-batch of a step stands for its begin: no collective of a group is
in flight then, and no rank waits there for a later stage. Collectives are among the ranks of one stage here. What
stages tell one another, plans for a checkpoint and figures for the last rank's writers, lies in the process group's
store.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_scmoe.codec.rate import RateControl, adjust_rates
from megatron_scmoe.config import Overlap, ScMoEConfig
from megatron_scmoe.layers.group import GroupBlock
from megatron_scmoe.layers.pipelined import PipelinedMoELayer
from megatron_scmoe.layers.span import GroupSpan
from megatron_scmoe.mcore import stages
from megatron_scmoe.overlap import observe
from megatron_scmoe.overlap.adaptive import Decision, Phase, Tuner
from megatron_scmoe.overlap.costs import GroupPass, passes_of
from megatron_scmoe.overlap.kept import saved_form
from megatron_scmoe.overlap.recording import Recording
from megatron_scmoe.report.figures import Summary, codec_scalars, rows_of, summarize, warning
from megatron_scmoe.report.files import ReportFile
from megatron_scmoe.report.scalars import Scalars
from megatron_scmoe.training import queues
from megatron_scmoe.training.agreement import check_equal, gathered
from megatron_scmoe.training.kept_plans import KeptPlans, Planned


class OverlapSession:
    """Plans and reports of one rank.

    Args:
        args: Megatron's namespace; ``overlap_plans`` and ``lsh_levels`` in it are what a checkpoint keeps.
        scmoe: the settings.
    """

    def __init__(self, args: Namespace, scmoe: ScMoEConfig) -> None:
        self._args = args
        self._scmoe = scmoe
        self._kept = KeptPlans(args, scmoe)
        self._seen: set[torch.nn.Module] = set()
        self._planned: dict[int, Planned] = {}
        self._rate_controls: dict[int, RateControl] = {}
        self._tuner: Tuner | None = None
        self._recording: Recording | None = None
        self._iteration: int | None = None
        self._file: ReportFile | None = None
        self._scalars: Scalars | None = None  # it and the mail need the process group's store
        self._mail: stages.StageMail | None = None

    def close(self) -> None:
        """Report what the last step measured; every rank calls it when training, and W&B's run, are over."""
        if self._recording is not None and self._iteration is not None:
            observe.stop(self._recording)
            self._report(self._iteration + 1, passes_of(self._recording))
            self._recording = None
        if self._scalars is not None:
            self._scalars.close()

    def in_evaluation(self, model: torch.nn.Module) -> None:
        """Called before every micro-batch of an evaluation: the step before it is over, and its recording with it."""
        if self._recording is not None:
            observe.stop(self._recording)
        self.see(model)

    def before_micro_batch(self, model: torch.nn.Module) -> None:
        """Called before every micro-batch; does its work where it is the first one of a step.

        Args:
            model: the part of it that the micro-batch goes through; under interleaving each is shown once a step.
        """
        ended, self._iteration = self._iteration, self._args.curr_iteration
        if ended is None:
            self._scalars = Scalars(self._args, self._scmoe)
            if self._scmoe.overlap is Overlap.ADAPTIVE or self._scmoe.lsh_target_rate:
                self._mail = stages.StageMail("megatron_scmoe/to_save")
            if self._scmoe.overlap is Overlap.ADAPTIVE:
                self._kept.agree(stages.stage_group())
            if self._scmoe.overlap_report:
                self._file = ReportFile(Path(self._scmoe.overlap_report), dist.get_rank())
        elif ended != self._iteration:
            self._between_steps(ended + 1)
        self.see(model)

    def see(self, model: torch.nn.Module) -> None:
        """Take the groups of a model part that was not shown before, with what the checkpoint kept of them.

        Called by itself where nothing is trained: an evaluation that hashes does so at the levels of the training.
        """
        if model in self._seen:
            return
        self._seen.add(model)
        for module in model.modules():
            if isinstance(module, GroupBlock | PipelinedMoELayer):
                self._see_codec(module)
            planned = module.span if isinstance(module, GroupBlock) else module
            if isinstance(planned, GroupSpan | PipelinedMoELayer):
                self._planned[planned.group_index] = planned
                if plans := self._kept.of(planned):
                    planned.plan, planned.forward_plan = plans.training, plans.forward

    def _see_codec(self, group: GroupBlock | PipelinedMoELayer) -> None:
        control, levels = group.cargo_maker.rate_control, getattr(self._args, "lsh_levels", {})
        if control is not None:
            self._rate_controls[group.group_index] = control
            if str(group.group_index) in levels:
                control.level.fill_(levels[str(group.group_index)])

    def _between_steps(self, iteration: int) -> None:
        """All of ``iteration`` steps are done and the next one has not begun."""
        if self._scmoe.lsh_target_rate:
            self._adjust_rates(iteration)
        if self._tuner is None and self._scmoe.overlap is Overlap.ADAPTIVE and self._planned:
            self._tuner = self._kept.tuner(self._planned, iteration)
        elif self._recording is not None:
            observe.stop(self._recording)
            passes = passes_of(self._recording)
            self._report(iteration, passes)
            if self._tuner is not None:
                self._tuner.take(passes)
        self._recording = None
        if self._tuner is not None:
            if self._tuner.advance():
                self._agree(self._tuner, iteration)
            self._set_plans(self._tuner)
        self._collect_what_to_save()
        says_rate = self._scmoe.compresses and (self._args.curr_iteration + 1) % self._args.log_interval == 0
        if self._file is not None or (self._tuner is not None and self._tuner.records) or says_rate:
            self._recording = observe.start()

    def _agree(self, tuner: Tuner, iteration: int) -> None:
        """One rank of the stage decides from what all measured; all adopt it."""
        stage = stages.stage_group()
        evidence = gathered(tuner.evidence(), stage)
        root = dist.get_process_group_ranks(stage)[0]
        message: list[Any] = [tuner.conclude(evidence) if dist.get_rank() == root else None]
        dist.broadcast_object_list(message, src=root, group=stage)
        decision: Decision = message[0]
        tuner.adopt(decision)
        check_equal(tuner.plans, stage)
        if dist.get_rank() == root:
            stage_name = "" if self._args.pipeline_model_parallel_size == 1 else f" of stage {stages.stage_rank()}"
            print(f" > overlap{stage_name} from iteration {iteration + 1}: {decision.text}", flush=True)
            if tuner.phase is Phase.SETTLED:
                beside = {"hidden_share": decision.hidden_share, "conditions": self._kept.conditions}
                self._send({"overlap_plans": saved_form(decision.plans, iteration=iteration, **beside)})

    def _set_plans(self, tuner: Tuner) -> None:
        for index, plans in tuner.plans.items():
            self._planned[index].plan, self._planned[index].forward_plan = plans.training, plans.forward

    def _adjust_rates(self, iteration: int) -> None:
        found = dict(sorted(self._rate_controls.items()))
        adjust_rates(list(found.values()), stages.stage_group())
        if iteration % self._args.log_interval == 0 and stages.is_stage_root():
            levels = {index: control.level.item() for index, control in found.items()}
            self._send({"lsh_levels": {str(index): level for index, level in levels.items()}})
            for index, level in levels.items():
                if why := found[index].out_of_reach(level):
                    target = f"--lsh-target-rate {self._scmoe.lsh_target_rate:g}"
                    print(f" > codec warning: group {index} cannot hold {target}: {why}", flush=True)

    def _send(self, to_save: dict[str, dict[str, Any]]) -> None:
        assert self._mail is not None
        self._mail.send(json.dumps(to_save))

    def _collect_what_to_save(self) -> None:
        """Rank 0 writes the arguments of a checkpoint: it takes what each stage decided, as soon as it is there."""
        if dist.get_rank() == 0 and self._mail is not None:
            for text in self._mail.receive():
                for name, value in json.loads(text).items():
                    setattr(self._args, name, {**getattr(self._args, name, {}), **value})

    def _report(self, iteration: int, passes: list[GroupPass]) -> None:
        """To the files of --overlap-report; to the log, too, and with a codec to the log in any case."""
        assert self._recording is not None
        assert self._scalars is not None
        logs = iteration % self._args.log_interval == 0
        if self._file is None and not (logs and self._scmoe.compresses):
            return
        rows = rows_of(passes, self._recording, {index: group.plan for index, group in self._planned.items()})
        if self._file is not None:
            self._file.write(iteration, rows, passes if logs else [])
        if not logs:
            return
        rows_of_ranks = gathered(rows, stages.stage_group())
        summary = summarize(rows_of_ranks)
        self._scalars.add(
            iteration,
            {f"overlap/{name}": value for name, value in summary.scalars(self._scmoe).items()},
            {f"codec/{name}": value for name, value in codec_scalars(rows_of_ranks).items()}
            if self._scmoe.sends_centroids
            else {},
        )
        if stages.is_stage_root():
            purpose = {Phase.MEASURE: " (sequential for once, to measure)", Phase.CHECK: " (trying plans)"}
            doing = purpose.get(self._tuner.phase, "") if self._tuner else ""
            print(f" > overlap at iteration {iteration}: {summary.words(self._scmoe)}{doing}", flush=True)
            self._warn(summary)

    def _warn(self, summary: Summary) -> None:
        if self._tuner is None or self._tuner.hidden_share is None or self._tuner.records:
            return  # nothing was predicted, or these steps are for measuring
        one_queue = self._scmoe.flies_side_by_side and queues.launches_in_one()
        text = warning(summary, self._tuner.hidden_share, one_queue=one_queue)
        if text is not None:
            print(f" > overlap warning: {text}", flush=True)
