"""How a job of many ranks ends where one of them hangs."""

import math
from dataclasses import dataclass

from megatron_scmoe.config.rules import ConfigError


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What watches the ranks of a job."""

    hang_limit: float = -1.0
    """Seconds that a training step may take before the job ends with the stacks of all ranks and the name of the rank
    that hangs. -1: 10 times the slowest of the last 20 steps, at least 30. The first step of a run and saves have no
    such limit; a rank that is stopped is found in them too. inf: no step is too long. 0: nothing is watched."""

    def validate_job(self) -> None:
        """Raise ConfigError where the limit is none."""
        if math.isnan(self.hang_limit) or (self.hang_limit < 0 and self.hang_limit != -1):
            raise ConfigError(f"a limit is a time: --hang-limit is {self.hang_limit:g}; give seconds, inf, 0 or -1")
