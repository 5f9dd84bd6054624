"""What machines can do: physical peaks with their sources, and constants, which are fitted or measured.

Rates are per GPU; links in bytes/s of one direction. Peaks are dense (without sparsity).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

CONSTANTS_FILE = Path(__file__).with_name("constants.json")
"""Written by ``planning.check.run``: constants by GPU and software release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Physical peaks of one GPU and of what lies between GPUs.

    Attributes:
        name: as users give it.
        bf16: FLOP/s of matrix units in bf16.
        fp8: in any of the 8-bit formats; ``bf16`` where the GPU has none.
        fp4: in nvfp4; ``fp8`` where it has none.
        sms: multiprocessors, which share the tiles of a GEMM.
        memory_bandwidth: bytes/s.
        memory: bytes.
        link: bytes/s to GPUs of the same domain, one direction.
        domain: GPUs that ``link`` reaches.
        network: bytes/s to all other GPUs, one direction: the standard machine's.

    Raises:
        ValueError: for what is no finite number above 0, and parts of a multiprocessor or GPU.
    """

    name: str
    bf16: float
    fp8: float
    fp4: float
    sms: int
    memory_bandwidth: float
    memory: float
    link: float
    domain: int
    network: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "name":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} of {self.name} is {value!r}: it has to be a finite number above 0")
            if name in ("sms", "domain") and value != int(value):
                raise ValueError(f"{name} of {self.name} is {value}: it has to be a whole number")


GIB = 2**30
"""Of what datasheets call GB of memory: CUDA reports about 139 GiB of an H200's 141, and drivers have the rest."""

_TABLE = (
    # NVIDIA A30 datasheet: 165 TFLOP/s bf16, 933 GB/s, 24 GB; PCIe 4.0 x16, 31.5 GB/s each way. 56 SMs (GA100).
    # 8 GPUs a server; network: one 100 Gb/s port for 8 GPUs (the paper that uses it has one server and names none).
    Hardware(
        name="A30-PCIe", bf16=165e12, fp8=165e12, fp4=165e12, sms=56, memory_bandwidth=933e9, memory=24 * GIB,
        link=31.5e9, domain=8, network=12.5e9 / 8,
    ),
    # NVIDIA A800 80GB SXM datasheet: the A100's 312 TFLOP/s bf16, 2,039 GB/s, 108 SMs, with NVLink at 400 GB/s both
    # ways. Network: one 100 Gb/s port for 8 GPUs (the paper that uses it says "Ethernet" and no rate).
    Hardware(
        name="A800-NVLink", bf16=312e12, fp8=312e12, fp4=312e12, sms=108, memory_bandwidth=2039e9, memory=80 * GIB,
        link=200e9, domain=8, network=12.5e9 / 8,
    ),
    # NVIDIA H100 SXM datasheet: 989 TFLOP/s bf16, 1,979 fp8, 3.35 TB/s, 80 GB, NVLink 900 GB/s both ways, 132 SMs.
    # NVIDIA DGX H100: a 400 Gb/s ConnectX-7 for each GPU.
    Hardware(
        name="H100", bf16=989.4e12, fp8=1978.9e12, fp4=1978.9e12, sms=132, memory_bandwidth=3.35e12, memory=80 * GIB,
        link=450e9, domain=8, network=50e9,
    ),
    # NVIDIA H200 SXM datasheet: as the H100 with 4.8 TB/s and 141 GB.
    Hardware(
        name="H200", bf16=989.4e12, fp8=1978.9e12, fp4=1978.9e12, sms=132, memory_bandwidth=4.8e12, memory=141 * GIB,
        link=450e9, domain=8, network=50e9,
    ),
    # NVIDIA DGX B200 datasheet, for 8 GPUs: 36 PFLOP/s fp8 and 72 fp4 dense, 64 TB/s, 1,440 GB, NVLink 14.4 TB/s both
    # ways, eight 400 Gb/s ports. bf16 is half of fp8. 148 SMs (CUDA: multiprocessor count).
    Hardware(
        name="B200", bf16=2250e12, fp8=4500e12, fp4=9000e12, sms=148, memory_bandwidth=8e12, memory=180 * GIB,
        link=900e9, domain=8, network=50e9,
    ),
    # NVIDIA GB200 NVL72 datasheet, for 72 GPUs: 180 PFLOP/s bf16, 360 fp8, 720 fp4 dense, 576 TB/s, 13.4 TB, NVLink
    # 130 TB/s both ways; a 400 Gb/s ConnectX-7 for each GPU.
    Hardware(
        name="GB200", bf16=2500e12, fp8=5000e12, fp4=10000e12, sms=148, memory_bandwidth=8e12, memory=186 * GIB,
        link=900e9, domain=72, network=50e9,
    ),
    # NVIDIA GB300 NVL72 datasheet, for 72 GPUs: 180 PFLOP/s bf16, 360 fp8, 1,080 fp4 dense, 576 TB/s, 20 TB, NVLink
    # 130 TB/s both ways; an 800 Gb/s ConnectX-8 for each GPU.
    Hardware(
        name="GB300", bf16=2500e12, fp8=5000e12, fp4=15000e12, sms=148, memory_bandwidth=8e12, memory=278 * GIB,
        link=900e9, domain=72, network=100e9,
    ),
)  # fmt: skip
HARDWARE: Mapping[str, Hardware] = {hardware.name: hardware for hardware in _TABLE}

NEAREST: Mapping[str, str] = {"H200": "H100", "A800-NVLink": "H100", "A30-PCIe": "H100"}
"""Of GPUs of which no step is published: whose constants they are given."""

NETWORKS: Mapping[str, float] = {"100": 12.5e9, "400": 50e9}
"""Bytes/s of each GPU's port, one direction, by its Gb/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What of the peaks is reached, and what calls cost: fitted, or measured by ``--calibrate``.

    The defaults are those of kernels that run alone, by rule of thumb: four fifths of a peak, three of attention.

    Attributes:
        gemm: part of the matrix units' peak that a large dense GEMM reaches.
        grouped: the same of experts' grouped GEMMs.
        attention: part of the bf16 peak that core attention reaches; its backward at the same rate.
        memory: part of the memory bandwidth that element-wise kernels reach.
        link: part of the link's rate that a collective within a domain reaches.
        network: the same of the network's, between domains.
        launch_s: of one kernel, by the host.
        gap_s: between two kernels of a queue that is full.
        tile_s: of filling and emptying the multiprocessors with tiles of a product.
        message_s: of a collective for each peer.
    """

    gemm: float = 0.8
    grouped: float = 0.8
    attention: float = 0.6
    memory: float = 0.8
    link: float = 0.8
    network: float = 0.8
    launch_s: float = 8e-6
    gap_s: float = 1.5e-6
    tile_s: float = 1e-6
    message_s: float = 2e-6

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0) or (value == 0 and not name.endswith("_s")):
                raise ValueError(f"constant {name} is {value}: it has to be a finite number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Hardware with the constants of a software release.

    Attributes:
        hardware: physical peaks.
        constants: what of them is reached.
        source: where the constants are from, in words.
    """

    hardware: Hardware
    constants: Constants
    source: str = "defaults"

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Machine:
        """A machine from a file's contents.

        Raises:
            ValueError: for a missing, unknown or impossible value.
        """
        try:
            return cls(
                hardware=Hardware(**values["hardware"]),
                constants=Constants(**values["constants"]),
                source=str(values["source"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no machine: {error}") from error


def machine(name: str, *, network: float | None = None, release: str | None = None) -> Machine:
    """The machine of a name.

    Args:
        name: a key of ``HARDWARE``.
        network: bytes/s between domains for each GPU, in place of the standard machine's.
        release: software release whose constants are to be taken; the newest one fitted, where there is none.

    Raises:
        ValueError: for a name or release that is not known.
    """
    if name not in HARDWARE:
        raise ValueError(f"hardware {name} is not known: choose one of {', '.join(HARDWARE)}")
    hardware = HARDWARE[name] if network is None else replace(HARDWARE[name], network=network)
    fitted = json.loads(CONSTANTS_FILE.read_text()).get(name, {}) if CONSTANTS_FILE.is_file() else {}
    if release is None and fitted:
        release = max(fitted)
    if release is None:
        return Machine(hardware=hardware, constants=Constants(), source="defaults: nothing published was fitted")
    if release not in fitted:
        raise ValueError(f"no constants of {name} for release {release}: choose one of {', '.join(fitted) or 'none'}")
    return Machine(
        hardware=hardware, constants=Constants(**fitted[release]), source=f"published steps of release {release}"
    )
