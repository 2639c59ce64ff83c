"""Schedules that prune while they train: they decide which units of channel groups go, a plan decides how many.

Groups are those of the graph in training. For channels that is the model itself; for directions of the KFE the model is
first written as chains of full rank, between whose stages the directions are channels like any other. To add a
schedule: one file with a `Schedule` under `schedule(name)`, imported here.
"""

from onnx_kfe.recovery.schedules import _directional, _incremental, _probabilistic
from onnx_kfe.recovery.schedules._iterative import learnt_directions, with_weights
from onnx_kfe.recovery.schedules._ranked import step_curve
from onnx_kfe.recovery.schedules._schedule import SCHEDULES, Schedule, find_schedule
from onnx_kfe.recovery.schedules._subject import Subject, of_channels, of_directions

__all__ = [
    "SCHEDULES",
    "Schedule",
    "Subject",
    "find_schedule",
    "learnt_directions",
    "of_channels",
    "of_directions",
    "step_curve",
    "with_weights",
]

# Imported for the schedules they register.
del _directional, _incremental, _probabilistic
