"""JetPack releases: the TensorRT, Python and C library that a bundle for one has to do with."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.bench.devices import DeviceSpec
from pipeline.engine.standard import profile_for
from pipeline.errors import UsageError
from pipeline.gpu import ORIN, THOR, Capability


@dataclass(frozen=True)
class JetPack:
    """A release, as it was found on boards: docs/jetson.md.

    Attributes:
        name: as on the command line.
        tensorrt: its version.
        python: (major, minor) of the system's own, which alone sees that TensorRT.
        glibc: (major, minor).
        cuda: version of its toolkit; its driver runs nothing of a newer one.
        capabilities: of the GPUs of its boards.
    """

    name: str
    tensorrt: str
    python: tuple[int, int]
    glibc: tuple[int, int]
    cuda: str
    capabilities: tuple[Capability, ...]

    @property
    def profile(self) -> str:
        """The newest export profile that its TensorRT knows."""
        return profile_for(self.tensorrt)

    def capability_of(self, device: DeviceSpec) -> Capability:
        """The GPU of a device.

        Raises:
            UsageError: this release is not for it.
        """
        found = ORIN if device.is_orin else THOR if device.is_thor else None
        if found not in self.capabilities:
            raise UsageError(
                "This JetPack is not for this device.",
                where="--jetpack, --device",
                observed=f"{self.name}, {device.name}",
                expected=", ".join(
                    f"{one.name} for {' and '.join(map(_family, one.capabilities))}"
                    for one in JETPACKS.values()
                ),
                change="name the JetPack that the board has, or another --device",
            )
        assert found is not None, "it is among the capabilities"
        return found


def _family(capability: Capability) -> str:
    return "Orin" if capability == ORIN else "Thor"


JETPACKS = {
    one.name: one
    for one in (
        JetPack("6.1", "10.3.0", (3, 10), (2, 35), "12.6", (ORIN,)),
        JetPack("6.2", "10.3.0", (3, 10), (2, 35), "12.6", (ORIN,)),
        JetPack("7.2", "10.16.2", (3, 12), (2, 39), "13.2", (ORIN, THOR)),
    )
}
