"""Devices that are not here: bandwidth, clock, memory and matrix units, as they are published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.errors import UsageError

_ORIN = "NVIDIA Jetson Orin data sheets (LPDDR5; clock of the mode without Super)"
_SUPER = "NVIDIA's Super mode, JetPack 6.1 and later: 68 to 102 GB/s, 625 to 1020 MHz"
_THOR = "NVIDIA Jetson AGX Thor data sheet (LPDDR5X, 273 GB/s)"
_SPARK = "NVIDIA DGX Spark data sheet (LPDDR5X, 273 GB/s); its clock as remembered"
_GEFORCE = "NVIDIA's GeForce specifications (memory bus, data rate, boost clock)"
# Operations a clock of one multiprocessor. AGX Orin has 170 TOPS of sparse int8 in its GPU, a
# quarter of that in dense float16; Thor 2,070 TFLOPS of sparse fp4, an eighth; an RTX 4090 165
# TFLOPS of dense float16, those of other generations alike.
_ORIN_RATE, _THOR_RATE, _RTX_RATE = 2048, 8192, 512
_SPARK_RATE = 1024
_NANO_MODES = "clocks of nvpmodel's modes as smolhub.com measured them on an Orin Nano Super"
_OTHER_MODES = "nvpmodel's modes as remembered of NVIDIA's guide; not looked up"
# Of a Jetson's memory the system sees 93% (7,608 MiB of 8 GiB), of which a desktop takes 1.4 GiB.
_SEEN, _DESKTOP_BYTES = 0.93, 1_500_000_000
_OF_A_CARD = 0.9


@dataclass(frozen=True)
class DeviceSpec:
    """A device: its memory bounds the decoding of one sequence, its matrix units what is rebuilt.

    Attributes:
        name: as on the command line.
        bus_bits: width of its memory bus.
        gbit_per_pin: data rate, 10^9 transfers a second.
        ghz: highest clock of its GPU.
        memory_gb: capacity, 10^9 bytes, as it is sold; a Jetson's CPU shares it.
        multiprocessors: of its GPU.
        flop_per_clock: of one of them, dense products of float16 added up in float32.
        source: of these numbers.
        mode: power mode that they are of; empty where there is none, or it is not known.
        free_bytes: that are free for a model, where somebody looked; None for what is usual.
        l4t: release of its system, where it is known.
    """

    name: str
    bus_bits: int
    gbit_per_pin: float
    ghz: float
    memory_gb: int
    multiprocessors: int
    flop_per_clock: int
    source: str
    mode: str = ""
    free_bytes: int | None = None
    l4t: str | None = None

    @property
    def is_orin(self) -> bool:
        """Whether its GPU is a Jetson Orin's."""
        return self.flop_per_clock == _ORIN_RATE

    @property
    def is_thor(self) -> bool:
        """Whether its GPU is a Jetson Thor's."""
        return self.flop_per_clock == _THOR_RATE

    @property
    def has_power_figures(self) -> bool:
        """Whether power was published of it: of an Orin Nano, but in its slowest mode."""
        return self.is_orin and (self.memory_gb, self.bus_bits) == (8, 128) and self.mode != "7w"

    @property
    def shares_memory(self) -> bool:
        """Whether the system is in the same memory."""
        return self.flop_per_clock != _RTX_RATE

    @property
    def available_bytes(self) -> int:
        """What a model may take: as it was found, else usual beside a desktop."""
        if self.free_bytes is not None:
            return self.free_bytes
        if not self.shares_memory:
            return int(_OF_A_CARD * self.memory_gb * 1e9)
        return int(_SEEN * self.memory_gb * (1 << 30)) - _DESKTOP_BYTES

    @property
    def gb_per_s(self) -> float:
        """Peak bandwidth, 10^9 bytes a second."""
        return self.bus_bits * self.gbit_per_pin / 8

    @property
    def tflops(self) -> float:
        """Peak of its matrix units, 10^12 operations a second."""
        return self.multiprocessors * self.flop_per_clock * self.ghz / 1e3

    @property
    def flop_per_byte(self) -> float:
        """Operations that it has time for while it reads a byte."""
        return 1e3 * self.tflops / self.gb_per_s

    def in_modes(self) -> list[DeviceSpec]:
        """The device in each of its power modes; none where no modes of it are known."""
        source = _MEASURED_MODES.get(self.name, _OTHER_MODES)
        return [
            replace(
                self,
                name=name,
                gbit_per_pin=rate,
                ghz=ghz,
                multiprocessors=multiprocessors,
                source=f"{self.source}; {source}",
                mode=name.partition("@")[2],
            )
            for name, (rate, ghz, multiprocessors) in _POWER_MODES.items()
            if name.startswith(f"{self.name}@")
        ]


DEVICES = {
    device.name: device
    for device in (
        DeviceSpec("orin-nano-4gb", 64, 4.266, 0.625, 4, 4, _ORIN_RATE, _ORIN),
        DeviceSpec("orin-nano-8gb", 128, 4.266, 0.625, 8, 8, _ORIN_RATE, _ORIN, "15w"),
        DeviceSpec("orin-nano-8gb-super", 128, 6.4, 1.02, 8, 8, _ORIN_RATE, _SUPER, "maxn"),
        DeviceSpec("orin-nx-8gb", 128, 6.4, 0.765, 8, 8, _ORIN_RATE, _ORIN),
        DeviceSpec("orin-nx-16gb", 128, 6.4, 0.918, 16, 8, _ORIN_RATE, _ORIN, "maxn"),
        DeviceSpec("agx-orin-32gb", 256, 6.4, 0.93, 32, 14, _ORIN_RATE, _ORIN),
        DeviceSpec("agx-orin-64gb", 256, 6.4, 1.3, 64, 16, _ORIN_RATE, _ORIN, "maxn"),
        DeviceSpec("thor", 256, 8.533, 1.575, 128, 20, _THOR_RATE, _THOR),
        DeviceSpec("dgx-spark", 256, 8.533, 2.418, 128, 48, _SPARK_RATE, _SPARK),
        DeviceSpec("rtx-3060", 192, 15.0, 1.777, 12, 28, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-3090", 384, 19.5, 1.695, 24, 82, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-4060", 128, 17.0, 2.46, 8, 24, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-4070", 192, 21.0, 2.475, 12, 46, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-4080", 256, 22.4, 2.505, 16, 76, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-4090", 384, 21.0, 2.52, 24, 128, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-5070", 192, 28.0, 2.512, 12, 48, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-5080", 256, 30.0, 2.617, 16, 84, _RTX_RATE, _GEFORCE),
        DeviceSpec("rtx-5090", 512, 28.0, 2.407, 32, 170, _RTX_RATE, _GEFORCE),
    )
}


# Transfers a second, clock and multiprocessors of power modes.
_POWER_MODES = {
    "orin-nano-8gb@7w": (4.266, 0.408, 8), "orin-nano-8gb@15w": (4.266, 0.625, 8),
    "orin-nano-8gb@25w": (6.4, 0.82, 8), "orin-nano-8gb@maxn": (6.4, 1.02, 8),
    "orin-nx-16gb@10w": (4.266, 0.612, 4), "orin-nx-16gb@15w": (6.4, 0.612, 8),
    "orin-nx-16gb@25w": (6.4, 0.408, 8), "orin-nx-16gb@maxn": (6.4, 0.918, 8),
    "agx-orin-64gb@15w": (4.266, 0.421, 6), "agx-orin-64gb@30w": (6.4, 0.625, 8),
    "agx-orin-64gb@50w": (6.4, 0.829, 16), "agx-orin-64gb@maxn": (6.4, 1.3, 16),
}  # fmt: skip
_MEASURED_MODES = {"orin-nano-8gb": _NANO_MODES}
_ALL_MODES = "all"


def find_devices(names: str) -> list[DeviceSpec]:
    """Devices by their names, separated by commas.

    A name may have a power mode, `orin-nano-8gb@25w`, or all of them, `orin-nano-8gb@all`.

    Raises:
        UsageError: one is not known, or none is named.
    """
    found: dict[str, DeviceSpec] = {}
    for word in (part.strip() for part in names.split(",")):
        if word:
            found |= {device.name: device for device in _devices_of(word)}
    if not found:
        raise _unknown("none", DEVICES)
    return list(found.values())


def _devices_of(word: str) -> list[DeviceSpec]:
    name, _, mode = word.lower().partition("@")
    if name not in DEVICES:
        raise _unknown(name, DEVICES)
    if not mode:
        return [DEVICES[name]]
    modes = DEVICES[name].in_modes()
    wanted = [one for one in modes if mode in (one.mode, _ALL_MODES)]
    if not wanted:
        raise _unknown(word, [one.name for one in modes] or [name])
    return wanted


def _unknown(observed: str, known: Sequence[str] | dict[str, DeviceSpec]) -> UsageError:
    return UsageError(
        "There is no such device.",
        where="--predict",
        observed=observed,
        expected=", ".join(known),
        change="name one or several of these, separated by commas, a power mode behind an @, or "
        "the file of `skipcat-device describe`",
    )
