"""Driving perception: vehicles, drivable area and lane lines by one network, data, training."""
