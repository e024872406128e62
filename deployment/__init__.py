"""A policy on the robot's own computer. `loop` needs NumPy alone, `runtime` neither PyTorch nor Transformers."""

from .loop import ControlLoop, Schedule
from .runtime import DeployedPolicy

__all__ = ["ControlLoop", "DeployedPolicy", "Schedule"]
