"""Devices that are not here: bandwidth, clock, memory and matrix units, as they are published."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UsageError

_ORIN = "NVIDIA Jetson Orin data sheets (LPDDR5; clock of the mode without Super)"
_SUPER = "NVIDIA's Super mode, JetPack 6.1 and later: 68 to 102 GB/s, 625 to 1020 MHz"
_THOR = "NVIDIA Jetson AGX Thor data sheet (LPDDR5X, 273 GB/s)"
_GEFORCE = "NVIDIA's GeForce specifications (memory bus, data rate, boost clock)"
# Operations a clock of one multiprocessor. AGX Orin has 170 TOPS of sparse int8 in its GPU, a
# quarter of that in dense float16; Thor 2,070 TFLOPS of sparse fp4, an eighth; an RTX 4090 165
# TFLOPS of dense float16, those of other generations alike.
_ORIN_RATE, _THOR_RATE, _RTX_RATE = 2048, 8192, 512


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
    """

    name: str
    bus_bits: int
    gbit_per_pin: float
    ghz: float
    memory_gb: int
    multiprocessors: int
    flop_per_clock: int
    source: str

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


DEVICES = {
    device.name: device
    for device in (
        DeviceSpec("orin-nano-4gb", 64, 4.266, 0.625, 4, 4, _ORIN_RATE, _ORIN),
        DeviceSpec("orin-nano-8gb", 128, 4.266, 0.625, 8, 8, _ORIN_RATE, _ORIN),
        DeviceSpec("orin-nano-8gb-super", 128, 6.4, 1.02, 8, 8, _ORIN_RATE, _SUPER),
        DeviceSpec("orin-nx-8gb", 128, 6.4, 0.765, 8, 8, _ORIN_RATE, _ORIN),
        DeviceSpec("orin-nx-16gb", 128, 6.4, 0.918, 16, 8, _ORIN_RATE, _ORIN),
        DeviceSpec("agx-orin-32gb", 256, 6.4, 0.93, 32, 14, _ORIN_RATE, _ORIN),
        DeviceSpec("agx-orin-64gb", 256, 6.4, 1.3, 64, 16, _ORIN_RATE, _ORIN),
        DeviceSpec("thor", 256, 8.533, 1.575, 128, 20, _THOR_RATE, _THOR),
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


def find_devices(names: str) -> list[DeviceSpec]:
    """Devices by their names, separated by commas.

    Raises:
        UsageError: one is not known, or none is named.
    """
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in DEVICES]
    if unknown or not wanted:
        raise UsageError(
            "There is no such device.",
            where="--predict",
            observed=", ".join(unknown) or "none",
            expected=", ".join(DEVICES),
            change="name one or several of these, separated by commas",
        )
    return [DEVICES[name] for name in dict.fromkeys(wanted)]
