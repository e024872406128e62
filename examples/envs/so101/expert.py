"""A scripted expert for SO-101: it lifts the named cube, whose position it takes from the simulator.

It acts on the present state alone, so it can take over in any state: hover above the cube with the gripper turned to
its faces, descend, close, lift. Joints are in radians here.
"""

import mujoco
import numpy as np
from so101_nexus.lerobot_dataset import sim_qpos_to_dataset_row

from .simulator import HALF_CUBE, SO101Scene

HOVER, LIFT = 0.07, 0.10  # from the cube's centre to the fingertips, metres: along the gripper, and upwards
OPEN = 0.5  # of the gripper's range, on the way to the cube
MAX_STEP, MAX_GRIPPER_STEP = np.radians(5.0), np.radians(10.0)  # in a step of 40 ms
GAIN, MIN_STEP = 0.4, np.radians(0.4)  # near its goal, a joint moves by GAIN times the distance, plus MIN_STEP
ARM_ABOVE = np.radians([45, -65, 85, 0])  # where solving begins, after the pan: the gripper points down
ORIENTATION_WEIGHT = 0.01  # metres of position error that a radian of orientation error counts as


class Kinematics:
    """Inverse kinematics of a scene's arm, by Levenberg-Marquardt."""

    def __init__(self, scene: SO101Scene):
        self.model, self.data, self.scratch = scene.model, scene.data, mujoco.MjData(scene.model)
        self.site, self.qpos, self.dofs = scene.env._tcp_site_id, scene.env._arm_qpos_addrs, scene.env._arm_qvel_addrs
        self.low, self.high = scene.low[:5], scene.high[:5]
        self._position_jacobian, self._rotation_jacobian = np.zeros((2, 3, self.model.nv))

    def errors(self, joints: np.ndarray, position: np.ndarray, roll: float | None) -> np.ndarray:
        """Errors of the fingertips' position in metres, then of the weighted orientation: `(6,)`, or `(5,)`.

        Args:
            joints: `(5,)`.
            roll: World angle about the vertical that the gripper's sides have, up to half a turn. None: any, and the
                last error is left out.
        """
        self.scratch.qpos[self.qpos] = joints
        mujoco.mj_kinematics(self.model, self.scratch)
        axes = self.scratch.site_xmat[self.site].reshape(3, 3)
        rotation = np.cross(axes[:, 2], [0, 0, -1.0])
        if roll is not None:
            side = np.array([np.cos(roll), np.sin(roll), 0])
            rotation[2] = np.cross(axes[:, 0], -side if axes[:, 0] @ side < 0 else side)[2]
        errors = np.concatenate([position - self.scratch.site_xpos[self.site], ORIENTATION_WEIGHT * rotation])
        return errors if roll is not None else errors[:5]

    def _jacobian(self, num_errors: int) -> np.ndarray:
        """Of the joints that `errors` was called with last: `(num_errors, 5)`."""
        mujoco.mj_comPos(self.model, self.scratch)
        mujoco.mj_jacSite(self.model, self.scratch, self._position_jacobian, self._rotation_jacobian, self.site)
        rotation = ORIENTATION_WEIGHT * self._rotation_jacobian[:, self.dofs]
        return np.vstack([self._position_jacobian[:, self.dofs], rotation])[:num_errors]

    def solve(
        self, joints: np.ndarray, position: np.ndarray, roll: float | None = None, iterations: int = 40
    ) -> tuple[np.ndarray, float]:
        """Joints `(5,)` that put the fingertips at `position`, pointing down, and how far they miss it in metres."""
        self.scratch.qpos[:] = self.data.qpos
        damping, errors = 1e-4, self.errors(joints, position, roll)
        jacobian = self._jacobian(len(errors))
        for _ in range(iterations):
            change = np.linalg.solve(jacobian.T @ jacobian + damping * np.eye(5), jacobian.T @ errors)
            new = np.clip(joints + change, self.low, self.high)
            new_errors = self.errors(new, position, roll)
            if new_errors @ new_errors < errors @ errors:
                is_done = np.linalg.norm(new - joints) < 1e-4 or new_errors @ new_errors < 1e-8
                joints, errors, damping = new, new_errors, max(damping / 4, 1e-7)
                if is_done:
                    break
                jacobian = self._jacobian(len(errors))
            else:
                damping *= 6
                if damping > 10:
                    break
        return joints, float(np.linalg.norm(errors[:3]))

    def approach(self, joints: np.ndarray) -> np.ndarray:
        """The direction in which the gripper points: `(3,)`."""
        self.scratch.qpos[self.qpos] = joints
        mujoco.mj_kinematics(self.model, self.scratch)
        return self.scratch.site_xmat[self.site].reshape(3, 3)[:, 2].copy()


class Expert:
    """The expert of one episode. It plans again whenever the cube has moved by three millimetres."""

    def __init__(self, scene: SO101Scene):
        self.scene, self.kinematics = scene, Kinematics(scene)
        self.planned_for: np.ndarray | None = None  # position of the cube, metres

    def _plan(self) -> None:
        """Find the joints `(5,)` of three poses: hover, grasp and lift."""
        x, y, z, *quaternion = self.scene.cube(self.scene.task)
        position = np.array([x, y, z])
        if self.planned_for is not None and np.linalg.norm(self.planned_for - position) <= 0.003:
            return
        yaw, pan = 2 * np.arctan2(quaternion[3], quaternion[0]), np.arctan2(y, x)
        roll = yaw + np.round((pan - yaw) / (np.pi / 2)) * np.pi / 2  # the faces that need the least turning
        at, solve = np.array([x, y, max(z, HALF_CUBE)]), self.kinematics.solve
        self.grasp, _ = solve(np.array([-pan, *ARM_ABOVE]), at, roll)
        self.hover, _ = solve(self.grasp, at - HOVER * self.kinematics.approach(self.grasp), roll)
        self.lift, _ = solve(self.hover, at + [0, 0, LIFT])
        self.planned_for = position

    def action(self) -> np.ndarray:
        """The next action in LeRobot's units: float64 `(6,)`."""
        scene = self.scene
        joints, is_grasping = scene.joints, scene.is_grasping
        arm, gripper = joints[:5], joints[5]
        if not is_grasping or self.planned_for is None:
            self._plan()
        goal, opening = (self.lift, 0.0) if is_grasping else self._reach(arm, gripper)
        difference = goal - arm
        distance = np.abs(difference).max()
        step = min(MAX_STEP, GAIN * distance + MIN_STEP)
        arm = arm + difference * min(1.0, step / max(distance, 1e-9))
        wanted = scene.low[5] + opening * (scene.high[5] - scene.low[5])
        gripper = gripper + np.clip(wanted - gripper, -MAX_GRIPPER_STEP, MAX_GRIPPER_STEP)
        return sim_qpos_to_dataset_row(np.clip(np.append(arm, gripper), scene.low, scene.high))

    def _reach(self, arm: np.ndarray, gripper: float) -> tuple[np.ndarray, float]:
        """Joints `(5,)` to move to and the gripper's opening in [0, 1], while the cube is not held."""
        scene, tips = self.scene, self.scene.fingertips
        offset = tips - scene.cube(scene.task)[:3]
        opening = (gripper - scene.low[5]) / (scene.high[5] - scene.low[5])
        way = self.grasp - self.hover  # hover and grasp are joined by a line in joint space
        share = np.clip((arm - self.hover) @ way / (way @ way), 0, 1)
        from_way = np.abs(arm - self.hover - share * way).max()
        if np.abs(arm - self.grasp).max() < np.radians(2.0) and opening > 0.1:
            return self.grasp, 0.0
        if from_way < np.radians(4.0) and opening > 0.4:
            return self.grasp, OPEN
        if offset[2] < 0.045 and np.linalg.norm(offset[:2]) > 0.02 and tips[2] < 0.06:  # low, next to the cube
            raised, _ = self.kinematics.solve(arm, np.array([tips[0], tips[1], 0.085]), iterations=10)
            return raised, OPEN
        return self.hover, OPEN
