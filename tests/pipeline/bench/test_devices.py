from __future__ import annotations

import pytest

from pipeline.bench.devices import DEVICES, find_devices
from pipeline.errors import UsageError

PUBLISHED_GB_PER_S = {
    "orin-nano-4gb": 34,
    "orin-nano-8gb": 68,
    "orin-nano-8gb-super": 102,
    "orin-nx-16gb": 102.4,
    "agx-orin-64gb": 204.8,
    "thor": 273,
    "rtx-3090": 936,
    "rtx-4090": 1008,
    "rtx-5090": 1792,
}


@pytest.mark.parametrize("name", PUBLISHED_GB_PER_S)
def test_bus_width_times_data_rate_is_the_published_bandwidth(name: str) -> None:
    assert DEVICES[name].gb_per_s == pytest.approx(PUBLISHED_GB_PER_S[name], rel=0.006)


def test_devices_are_found_once_each_in_the_order_given() -> None:
    found = find_devices("thor, RTX-4090,thor,")
    assert [device.name for device in found] == ["thor", "rtx-4090"]


@pytest.mark.parametrize("names", ["tpu-v9", "", "thor,tpu-v9"])
def test_an_unknown_device_is_refused_with_the_known_ones(names: str) -> None:
    with pytest.raises(UsageError) as refused:
        find_devices(names)
    for name in DEVICES:
        assert name in str(refused.value)
