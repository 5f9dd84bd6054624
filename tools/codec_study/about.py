"""What tools/ablate_codec.py says of itself."""

from __future__ import annotations

ABOUT = """\
Train a small GPT (4 blocks, width 128, an MoE of 4 experts in every second block) on the Python standard library's
source, once for each model, arm and seed, and compare validation losses at equal tokens. Arms differ in what the all-
to-all carries and in nothing else: tokens (none), tokens with experts that compute E(x) + x (control), tokens in bf16
or fp8, the centroids of LSH-MoE, or, on two ranks, tokens that travel to a rank once, as they are or in fp8. One has
sums in another order and nothing else (none 2 chunks): what it does to a loss is noise. Three more train none for a
part of the steps, as what a codec saves time against. Differences are paired by seed; figures are medians over seeds
with their range.
"""
EPILOG = """\
examples:
  # every model and arm, 3 seeds of 1000 steps each (days of a core), behind all other work of the machine; a call
  # after ^C goes on where it was
  nice -n 19 .venv/bin/python tools/ablate_codec.py --output study

  # a first look: one model, the three arms that the paper's claim is about, one seed
  .venv/bin/python tools/ablate_codec.py --output look --models top-2 --arms 'none,control,lsh q6' --seeds 1

  # what is to cost nothing, and what rounding alone does (none and lsh are trained: docs/results/codec-study has them)
  nice -n 19 .venv/bin/python tools/ablate_codec.py --output docs/results/codec-study --arms \\
      'none 2 chunks,bf16,fp8,fp8 four transfers,none 2 ranks,unique 2 ranks,unique fp8 2 ranks'

  # more seeds, or more arms, in the folder of an earlier call: what is trained already is kept
  .venv/bin/python tools/ablate_codec.py --output study --seeds 5

  # train nothing: show what an earlier call found, and write it into a document
  .venv/bin/python tools/ablate_codec.py --from study --write-results docs/results/codec.md

  # the same, and which codec to use when, at what price, with the step times of tools/ablate_overlap.py
  .venv/bin/python tools/ablate_codec.py --from study --step-times ablation --write-advice docs/codec.md

  # what encoding costs, on an otherwise idle machine; --from study judges it, too
  .venv/bin/python tools/ablate_codec.py --encoding-cost --output study

  # show an earlier call, and what none reaches in the same wall time on the slow link that an ablation of step times
  # has measured: it needs the arms 'none 0.25x steps' and so on, with a whole schedule in fewer steps
  .venv/bin/python tools/ablate_codec.py --from study --step-times ablation

models:
  top-2 (the gate weights of both experts add up to 1), shared-expert (top-1 beside a gated shared expert), pos2 (ScMoE:
  the same parameters, and the routed experts read an earlier tensor). All with one chunk, in layers of this package.

what it does not prove:
  The model is tiny and its training short; one rank holds every expert (two where the arm says so, each with half of a
  step's sequences), on a CPU, in fp32. The part of rows sent
  depends on model, text, length of training and tokens for each expert: a property of this setting. Seconds of a
  step are those of one rank without a network; tools/ablate_overlap.py measures what sending less saves.

exit codes: 0 done; 1 a training failed (the others went on); 2 bad request or something missing; 129 / 130 / 143
stopped.
"""
