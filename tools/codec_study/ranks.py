"""torchrun, with its own arguments, which ends as soon as the study does: nobody would read what it trains on."""

from __future__ import annotations

from megatron_scmoe.job.orphans import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    from torch.distributed.run import main

    main()  # behind the line above: this import is slow
