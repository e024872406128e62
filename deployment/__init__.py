"""A policy on the robot's own computer; `loop` and `runtime` need neither PyTorch nor Transformers."""

from .loop import ControlLoop, Schedule
from .runtime import DeployedPolicy

__all__ = ["ControlLoop", "DeployedPolicy", "Schedule"]
