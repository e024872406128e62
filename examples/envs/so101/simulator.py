"""The SO-101 arm in so101-nexus' MuJoCo simulator (PickLift): three cubes, of which the instruction names one.

State and action are in LeRobot's units for an SO-101: five joints in degrees, the gripper from 0 (closed) to 100. An
action is the target of the joints for the next 40 ms. The cubes lie 16 to 28 cm from a point 15 cm in front of the
base, within 45 degrees of straight ahead. An episode is solved once the gripper holds the named cube 5 cm above its
start.

Needs `so101-nexus` and, on Linux, Debian's `libosmesa6`, or `MUJOCO_GL=egl` or `glfw`.
"""

import mujoco
import numpy as np
from so101_nexus.camera_utils import compute_overhead_camera_params
from so101_nexus.config import PhysicsConfig, PickConfig
from so101_nexus.lerobot_dataset import dataset_row_to_sim_qpos, sim_qpos_to_dataset_row
from so101_nexus.mujoco.pick_env import PickLiftEnv
from so101_nexus.objects import CubeObject
from so101_nexus.observations import JointPositions

from envs import FRAME_SIZE
from envs.rendering import Renderer, fast_renderer

COLORS = ("red", "blue", "green")
TASKS = {color: f"Pick up the {color} cube." for color in COLORS}
JOINTS = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos", "gripper.pos"]
IMAGE_KEYS = ("observation.images.front", "observation.images.wrist")
MAX_EPISODE_STEPS = 100  # the expert needs 28 to 40
CONTROL_HZ = 25
ACTION_DIM = STATE_DIM = len(JOINTS)
IMAGE_SIZE = 128  # pixels along each side of the policy's images
HALF_CUBE = 0.0125  # metres, height of the centre of a cube on the table
LIFTED = HALF_CUBE + 0.05  # of one that counts as lifted
# Metres, of the simplified arm's cells in images and films; a pixel of the front camera is about six millimetres.
CELL_SIZE, FILM_CELL_SIZE = 0.003, 0.002
# The wrist camera's position in metres and tilt in degrees, in the gripper's frame, and both fields of view.
WRIST_POSITION, WRIST_TILT, WRIST_FOV, FRONT_FOV = (0, 0.04, -0.04), -28.6, 75, 45
SPAWN_CENTER, MIN_RADIUS, MAX_RADIUS = (0.15, 0.0), 0.16, 0.28  # of the cubes, metres
FRONT_CAMERA = compute_overhead_camera_params(SPAWN_CENTER, MAX_RADIUS, fov_deg=FRONT_FOV, aspect=1)
FILM_VIEW = {"lookat": (0.22, 0, 0.06), "distance": 0.75, "azimuth": 140, "elevation": -30}


class SO101Scene:
    """A [`envs.Scene`] of one task. The same seed gives the same scene for all three.

    Args:
        task: A key of `TASKS`.
        full_render: Render the policy's images with so101-nexus' own quality: all triangles, smoothed, with shadows.
    """

    def __init__(self, task: str, full_render: bool = False):
        if task not in TASKS:
            raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}.")
        self.task, self.full_render = task, full_render
        config = PickConfig(
            objects=[CubeObject(color=color) for color in COLORS],
            n_distractors=len(COLORS) - 1,
            spawn_center=SPAWN_CENTER,
            spawn_min_radius=MIN_RADIUS,
            spawn_max_radius=MAX_RADIUS,
            spawn_angle_half_range_deg=45,
            physics=PhysicsConfig(control_period_s=1 / CONTROL_HZ),
            observations=[JointPositions()],
        )
        self.env = PickLiftEnv(config)
        self.model, self.data = self.env.model, self.env.data
        self.low, self.high = self.env._target_low, self.env._target_high  # of the joints, radians
        camera, tilt = self.env._wrist_cam_id, np.array([np.radians(WRIST_TILT), 0, 0])
        mujoco.mju_euler2Quat(self.model.cam_quat[camera], tilt, "XYZ")
        self.model.cam_pos[camera], self.model.cam_fovy[camera] = WRIST_POSITION, WRIST_FOV
        self._cameras = (_free_camera(**FRONT_CAMERA), "wrist_cam")
        self._renderers: dict[int, Renderer] = {}  # by size in pixels
        self._scratch = mujoco.MjData(self.model)  # of `gripper_view`

    def reset(self, seed: int, start: np.ndarray | None = None) -> None:
        """Place the cubes at random, the arm at rest or at `start`: joints `(6,)` in LeRobot's units."""
        options = {"target_index": COLORS.index(self.task)}
        if start is not None:
            options["init_qpos"] = self._as_radians(start)
        self.env.reset(seed=seed, options=options)

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Move towards an action `(6,)`, clipped to the joints' range, for 40 ms; returns reward, success, False."""
        _, reward, _, _, info = self.env.step(self._as_radians(action).astype(np.float32))
        return float(reward), bool(info["success"]), False

    def _as_radians(self, joints: np.ndarray) -> np.ndarray:
        return np.clip(dataset_row_to_sim_qpos(np.asarray(joints, dtype=np.float64)), self.low, self.high)

    @property
    def joints(self) -> np.ndarray:
        """Positions of the six joints: float64 `(6,)` in radians."""
        return self.env._get_current_qpos().copy()

    @property
    def state(self) -> np.ndarray:
        """Float32 `(6,)`: five joints in degrees, the gripper from 0 (closed) to 100."""
        return sim_qpos_to_dataset_row(self.joints).astype(np.float32)

    @property
    def fingertips(self) -> np.ndarray:
        """Position between the fingertips: `(3,)` in metres."""
        return self.data.site_xpos[self.env._tcp_site_id].copy()

    @property
    def is_grasping(self) -> bool:
        """Whether the gripper holds the named cube."""
        return self.env._is_grasping() > 0.5

    def cube(self, color: str) -> np.ndarray:
        """Position in metres and quaternion (w, x, y, z) of a cube: `(7,)`."""
        address = self.env._slots[COLORS.index(color)].qpos_addr
        return self.data.qpos[address : address + 7].copy()

    @property
    def poses(self) -> np.ndarray:
        """Float32 `(24,)`: the fingertips' position, then position and quaternion of the red, blue and green cube."""
        return np.concatenate([self.fingertips, *map(self.cube, COLORS)]).astype(np.float32)

    def gripper_view(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the gripper and its camera are in a state `(6,)`.

        Returns:
            Axes of the gripper `(3, 3)`, one a column, and the position between its fingertips in metres `(3,)`; then
            those of the wrist camera, which looks along the opposite of its third axis.
        """
        data = self._scratch
        data.qpos[self.env._qpos_addrs] = self._as_radians(state)
        mujoco.mj_kinematics(self.model, data)
        mujoco.mj_camlight(self.model, data)
        tips, camera = self.env._tcp_site_id, self.env._wrist_cam_id
        axes = data.site_xmat[tips].reshape(3, 3), data.cam_xmat[camera].reshape(3, 3)
        return axes[0].copy(), data.site_xpos[tips].copy(), axes[1].copy(), data.cam_xpos[camera].copy()

    def images(self) -> list[np.ndarray]:
        return [self._render(camera, IMAGE_SIZE, CELL_SIZE, None) for camera in self._cameras]

    def film(self) -> np.ndarray:
        return self._render(_free_camera(**FILM_VIEW), FRAME_SIZE, FILM_CELL_SIZE, 1024)

    def _render(
        self, camera: mujoco.MjvCamera | str, size: int, cell_size: float, shadow_size: int | None
    ) -> np.ndarray:
        """An image of `size` pixels a side, rendered at twice the size."""
        if size not in self._renderers:
            if self.full_render and size == IMAGE_SIZE:
                renderer = Renderer(self.model, 2 * size, 2 * size)
            else:
                meshes = [self.model.mesh(i).name for i in range(self.model.nmesh)]
                renderer = fast_renderer(self.model, 2 * size, dict.fromkeys(meshes, cell_size), shadow_size)
            self._renderers[size] = renderer
        self._renderers[size].update_scene(self.data, camera)
        return _halved(self._renderers[size].render())

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self.env.close()


def _halved(pixels: np.ndarray) -> np.ndarray:
    """The rounded means of squares of two by two pixels, seven times as fast as `mean`: uint8 `(2h, 2w, 3)`."""
    sums = pixels[::2, ::2].astype(np.uint16)
    for row, column in ((0, 1), (1, 0), (1, 1)):
        sums += pixels[row::2, column::2]
    return ((sums + 2) // 4).astype(np.uint8)


def _free_camera(lookat: np.ndarray, distance: float, azimuth: float, elevation: float) -> mujoco.MjvCamera:
    """A camera `distance` metres from the point that it looks at; angles in degrees."""
    camera = mujoco.MjvCamera()
    camera.type, camera.lookat[:] = mujoco.mjtCamera.mjCAMERA_FREE, lookat
    camera.distance, camera.azimuth, camera.elevation = distance, azimuth, elevation
    return camera


def cube_poses(poses: np.ndarray) -> np.ndarray:
    """Position and quaternion of the cubes in the order of `COLORS`, `(..., 3, 7)`, of [`SO101Scene.poses`]."""
    return poses[..., 3:].reshape(*poses.shape[:-1], len(COLORS), 7)
