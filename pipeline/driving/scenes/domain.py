"""Two worlds that scenes are drawn from: other cameras, roads, traffic and weather."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UsageError

_Range = tuple[float, float]


@dataclass(frozen=True)
class Domain:
    """Where scenes are drawn from; of a range, each scene draws a number.

    Attributes:
        name: as the user gives it.
        focal: focal length over the image's width.
        camera_height_m: above the road.
        horizon: row of the horizon over the image's height.
        bend: most curvature, 1 / m.
        lane_width_m: of every lane.
        own_lanes: most lanes in our direction.
        oncoming_lanes: most lanes in the other.
        yellow_centre: whether yellow paint parts the directions; white otherwise.
        asphalt: grey levels of the road, 0 to 1.
        vehicles: most vehicles in each lane.
        two_wheels: most motorcycles, which are no vehicles here.
        night: probability; dusk has as much.
        fog: probability; rain has as much.
        worn: most part of the paint that is gone.
    """

    name: str
    focal: _Range
    camera_height_m: _Range
    horizon: _Range
    bend: float
    lane_width_m: _Range
    own_lanes: int
    oncoming_lanes: int
    yellow_centre: bool
    asphalt: _Range
    vehicles: int
    two_wheels: int
    night: float
    fog: float
    worn: float


DOMAINS = {
    "wide": Domain(
        "wide", (0.75, 1.05), (1.25, 1.7), (0.42, 0.52), 0.0025, (3.3, 3.8), 3, 2, True,
        (0.28, 0.48), 3, 1, 0.15, 0.1, 0.35,
    ),
    "dense": Domain(
        "dense", (0.55, 0.72), (1.0, 1.35), (0.36, 0.46), 0.005, (2.7, 3.2), 2, 2, False,
        (0.18, 0.34), 4, 4, 0.3, 0.2, 0.6,
    ),
}  # fmt: skip


def domain_named(name: str) -> Domain:
    """The domain of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in DOMAINS:
        raise UsageError("There are no such scenes.", observed=name, expected=" or ".join(DOMAINS))
    return DOMAINS[name]
