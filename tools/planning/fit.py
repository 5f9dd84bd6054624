"""Constants from measured steps: few, shared as far as can be, by damped least squares of logarithms.

What all share are eight constants. A GPU, and a software release, has one factor each, by which all of its kernels and
transfers are faster than the eight say; so a step is faster by the product of both. Each parameter is held near what
is expected of it (ridge), so that a GPU or release with few rows stays near what all have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from planning.hardware import HARDWARE, Constants, Machine
from planning.published import Step
from planning.step import predict

Vector = np.ndarray

SPREAD = {
    "gemm": 0.1,
    "grouped": 0.1,
    "attention": 0.1,
    "memory": 0.3,
    "link": 0.2,
    "network": 0.3,
    "launch_s": 0.5,
    "tile_s": 0.5,
}
"""Constants that are fitted, and how far, in logarithms, each is expected from ``EXPECTED``: what large products reach
is known well, what the host takes for a launch is not. The others stay as they are expected."""
EXPECTED = Constants(
    gemm=0.75, grouped=0.7, attention=0.55, memory=0.5, link=0.75, network=0.75, launch_s=10e-6, tile_s=1.5e-6
)
"""What is expected of kernels in a step: less than alone, since its passes over memory are counted too low."""
OWN_SPREAD = 0.15
"""The same of the factor of a GPU or a release."""
NOISE = 0.1
"""How far a step is expected from its prediction."""
OUTLIER = 0.25
"""Beyond so much a row pulls no harder than at it."""
MOST_ITERATIONS = 8
MOVED = 1e-3
"""Of a logarithm, for derivatives."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted constants.

    Attributes:
        names: of parameters: constants, GPUs and releases.
        values: logarithms: of a constant over the expected one, of a factor.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]

    def constants(self, gpu: str, release: str) -> Constants:
        """Of a GPU and release; a factor without rows is 1."""
        faster = math.exp(self.own(gpu, release))
        shared = asdict(self.shared())
        return Constants(
            **{name: value / faster if name.endswith("_s") else value * faster for name, value in shared.items()}
        )

    def shared(self) -> Constants:
        """What all share."""
        expected = asdict(EXPECTED)
        told = dict(zip(self.names, self.values, strict=True))
        return Constants(**{name: value * math.exp(told.get(name, 0.0)) for name, value in expected.items()})

    def own(self, gpu: str, release: str) -> float:
        """Logarithm of what a GPU and a release are faster."""
        told = dict(zip(self.names, self.values, strict=True))
        return told.get(gpu, 0.0) + told.get(release, 0.0)


def predicted_s(step: Step, fit: Fit) -> float:
    """A step's time by fitted constants."""
    machine = Machine(hardware=HARDWARE[step.gpu], constants=fit.constants(step.gpu, step.release))
    return predict(step.workload, machine).step_s


def fitted(steps: Sequence[Step], advance: Callable[[int], None] = lambda _: None) -> Fit:
    """Constants by which ``steps`` are predicted best.

    Args:
        steps: measured.
        advance: is told of each iteration.
    """
    names = (*SPREAD, *sorted({step.gpu for step in steps}), *sorted({step.release for step in steps}))
    values = np.zeros(len(names))
    spread = np.array([SPREAD.get(name, OWN_SPREAD) for name in names])
    errors, damping = _errors(steps, Fit(names, tuple(values))), 1e-3
    for _ in range(MOST_ITERATIONS):
        slopes = _slopes(steps, Fit(names, tuple(values)), errors)
        weights = np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(np.abs(errors), 1e-12))) / NOISE  # Huber's
        system = np.concatenate([slopes * weights[:, None], np.diag(1 / spread)])
        wanted = -np.concatenate([errors * weights, values / spread])
        damped = np.concatenate([system, np.diag(np.sqrt(damping) * np.linalg.norm(system, axis=0))])
        change = np.linalg.lstsq(damped, np.concatenate([wanted, np.zeros(len(names))]), rcond=None)[0]
        tried = _errors(steps, Fit(names, tuple(values + change)))
        advance(1)
        before, behind = _loss(errors, values / spread), _loss(tried, (values + change) / spread)
        if behind >= before:
            damping *= 30
            continue
        values, errors, damping = values + change, tried, damping / 10
        if before - behind < 1e-3 * before:
            break
    return Fit(names, tuple(float(value) for value in values))


def _slopes(steps: Sequence[Step], fit: Fit, errors: Vector) -> Vector:
    """Derivatives of the errors by all parameters; by a factor of its own a step's is -1."""
    slopes = np.zeros((len(steps), len(fit.names)))
    for index, name in enumerate(fit.names):
        if name in SPREAD:
            moved = [value + MOVED * (other == index) for other, value in enumerate(fit.values)]
            slopes[:, index] = (_errors(steps, Fit(fit.names, tuple(moved))) - errors) / MOVED
        else:
            slopes[:, index] = [-float(name in (step.gpu, step.release)) for step in steps]
    return slopes


def _errors(steps: Sequence[Step], fit: Fit) -> Vector:
    """Logarithms of predicted over measured: of what all share, each workload once, less the step's own factors."""
    constants = fit.shared()
    seconds = {
        (gpu, workload): predict(workload, Machine(hardware=HARDWARE[gpu], constants=constants)).step_s
        for gpu, workload in {(step.gpu, step.workload) for step in steps}
    }
    return np.array(
        [math.log(seconds[step.gpu, step.workload] / step.step_s) - fit.own(step.gpu, step.release) for step in steps]
    )


def _loss(errors: Vector, deviations: Vector) -> float:
    far = np.abs(errors) > OUTLIER
    squares = np.where(far, 2 * OUTLIER * np.abs(errors) - OUTLIER**2, errors**2)
    return float(np.sum(squares) / NOISE**2 + np.sum(deviations**2))
