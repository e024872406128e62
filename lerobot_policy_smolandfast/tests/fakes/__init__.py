"""Hardware without hardware, also for `--robot.discover_packages_path=fakes`: an arm, a camera, and six servos."""

import os
import threading
import time
import tty
from dataclasses import dataclass, field

import numpy as np
from lerobot.cameras import Camera, CameraConfig
from lerobot.motors import MotorCalibration
from lerobot.robots import Robot, RobotConfig

JOINTS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
NAMES = [f"{joint}.pos" for joint in JOINTS]
IMAGES = {
    name: np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for i, name in enumerate(("front", "wrist", "top"))
}


@CameraConfig.register_subclass("fake_camera")
@dataclass(kw_only=True)
class FakeCameraConfig(CameraConfig):
    """A camera that always sees one of `IMAGES`."""

    image: str


class FakeCamera(Camera):
    is_connected = False

    def __init__(self, config: FakeCameraConfig):
        super().__init__(config)
        self.image = IMAGES[config.image]

    @staticmethod
    def find_cameras():
        return []

    def connect(self, warmup=True):
        self.is_connected = True

    def read(self):
        return self.image.copy()

    def async_read(self, timeout_ms=0.0):
        return self.read()

    def read_latest(self, max_age_ms=500):
        return self.read()

    def disconnect(self):
        self.is_connected = False


@RobotConfig.register_subclass("fake_arm")
@dataclass(kw_only=True)
class FakeArmConfig(RobotConfig):
    start: list[float] = field(default_factory=lambda: [0.0] * 6)
    names: list[str] = field(default_factory=lambda: NAMES[::-1])  # not in the policy's order
    views: list[str] = field(default_factory=lambda: ["wrist", "front"])


class FakeArm(Robot):
    """Joints that cover half of the way to their goal with each action. Every call is kept in `calls`."""

    config_class, name, is_calibrated, is_connected = FakeArmConfig, "fake_arm", True, False
    calls: list[tuple] = []

    def __init__(self, config: FakeArmConfig):
        super().__init__(config)
        self.config = config
        self.position = dict(zip(NAMES, config.start, strict=True))

    @property
    def action_features(self):
        return dict.fromkeys(self.config.names, float)

    @property
    def observation_features(self):
        return {**self.action_features, **{name: IMAGES[name].shape for name in self.config.views}}

    def connect(self, calibrate=True):
        self.calls.append(("connect",))
        self.is_connected = True

    def calibrate(self): ...
    def configure(self): ...

    def get_observation(self):
        self.calls.append(("observe", dict(self.position)))
        return {**self.position, **{name: IMAGES[name].copy() for name in self.config.views}}

    def send_action(self, action):
        self.calls.append(("act", action, time.monotonic()))
        self.position = {name: (value + action[name]) / 2 for name, value in self.position.items()}
        return action

    def disconnect(self):
        self.calls.append(("disconnect",))
        self.is_connected = False


def calibration() -> dict[str, MotorCalibration]:
    return {joint: MotorCalibration(i, 0, 0, 1024, 3072) for i, joint in enumerate(JOINTS, 1)}


class FakeServos:
    """Six STS3215 servos behind the serial port `port`, as LeRobot's `SO101Follower` talks to them.

    Feetech's protocol 0: `FF FF id length instruction parameters checksum`. A servo with torque covers half of the
    way to its goal with each goal that it gets.

    Attributes:
        memory: The 256 registers of each servo, by id.
        goals: The goal positions of each synchronous write.
        num_damaged: Packets that were cut short or mixed with others.
    """

    PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 1, 2, 3, 0x82, 0x83
    MODEL, LIMITS, TORQUE, GOAL, PRESENT = 3, 9, 40, 42, 56
    START = [2048] * 5 + [1229]  # the joints in the middle, the gripper open by a tenth

    def __init__(self):
        self._servos, terminal = os.openpty()
        tty.setraw(terminal)
        self.port, self.memory, self.goals, self.num_damaged = os.ttyname(terminal), {}, [], 0
        for motor in calibration().values():
            registers = self.memory[motor.id] = bytearray(256)
            self._put(registers, self.MODEL, 777)
            self._put(registers, self.LIMITS, motor.range_min)
            self._put(registers, self.LIMITS + 2, motor.range_max)
            for address in (self.GOAL, self.PRESENT):
                self._put(registers, address, self.START[motor.id - 1])
        threading.Thread(target=self._serve, daemon=True).start()

    @staticmethod
    def _put(registers: bytearray, address: int, value: int) -> None:
        registers[address : address + 2] = value.to_bytes(2, "little")

    def read(self, address: int) -> list[int]:
        """A register of two bytes, of each servo."""
        return [int.from_bytes(registers[address : address + 2], "little") for registers in self.memory.values()]

    def _serve(self) -> None:
        received = b""
        while True:
            received += os.read(self._servos, 4096)
            while len(received) >= 4 and len(received) >= (end := received[3] + 4):
                packet, received = received[:end], received[end:]
                if packet[:2] == b"\xff\xff" and sum(packet[2:]) & 0xFF == 0xFF:
                    self._answer(packet[2], packet[4], packet[5:-1])
                else:
                    self.num_damaged, received = self.num_damaged + 1, b""

    def _answer(self, servo: int, instruction: int, data: bytes) -> None:
        if instruction == self.PING:
            self._reply(servo)
        elif instruction == self.READ:
            self._reply(servo, self.memory[servo][data[0] : data[0] + data[1]])
        elif instruction == self.WRITE:
            self.memory[servo][data[0] : data[0] + len(data) - 1] = data[1:]
            self._reply(servo)
        elif instruction == self.SYNC_READ:
            for servo in data[2:]:
                self._reply(servo, self.memory[servo][data[0] : data[0] + data[1]])
        elif instruction == self.SYNC_WRITE:
            address, size = data[:2]
            for i in range(2, len(data), size + 1):
                self.memory[data[i]][address : address + size] = data[i + 1 : i + 1 + size]
            if address == self.GOAL:
                self._move()

    def _reply(self, servo: int, data: bytes = b"") -> None:
        body = bytes([servo, len(data) + 2, 0, *data])
        os.write(self._servos, b"\xff\xff" + body + bytes([~sum(body) & 0xFF]))

    def _move(self) -> None:
        self.goals.append(self.read(self.GOAL))
        for registers, goal, present in zip(
            self.memory.values(), self.goals[-1], self.read(self.PRESENT), strict=True
        ):
            if registers[self.TORQUE]:
                self._put(registers, self.PRESENT, (goal + present) // 2)
