"""Rendering with MuJoCo, without a screen and with less detail than its models have.

Import it before any other package imports MuJoCo, which chooses its OpenGL then.
"""

import copy
import os
import sys
from ctypes.util import find_library

import numpy as np

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "osmesa")
if os.environ.get("MUJOCO_GL") == "osmesa" and find_library("OSMesa") is None:
    raise ImportError(
        "MuJoCo needs OSMesa to render without a screen: run `apt install libosmesa6`, or set MUJOCO_GL=egl or glfw."
    )
import mujoco  # noqa: E402


class Renderer(mujoco.Renderer):
    """A renderer next to others. MuJoCo's frees its buffers in the context that was used last, even another's."""

    def close(self, is_finalizing=sys.is_finalizing) -> None:  # bound here: at Python's exit, `sys` is None
        if self._gl_context and not is_finalizing():  # there is no public API
            self._gl_context.make_current()
        super().close()


def fast_renderer(
    model: mujoco.MjModel, size: int, cell_sizes: dict[str, float], shadow_size: int | None = None
) -> Renderer:
    """A renderer of `size` pixels a side with fewer triangles, without smoothing and reflections.

    Args:
        cell_sizes: See [`simplified`].
        shadow_size: Pixels along each side of the shadow map; None renders no shadows.
    """
    model = simplified(model, cell_sizes)
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
    model.vis.global_.offheight = max(model.vis.global_.offheight, size)
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = shadow_size or 1
    renderer = Renderer(model, size, size)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadow_size is not None
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    return renderer


def simplified(model: mujoco.MjModel, cell_sizes: dict[str, float]) -> mujoco.MjModel:
    """A copy for rendering, some of whose meshes have fewer triangles.

    Vertex clustering (Rossignac and Borrel 1993): the corners in each cell of a grid become one.

    Args:
        cell_sizes: Sides of the cells in metres, by the meshes' names.
    """
    model = copy.copy(model)
    for name, size in cell_sizes.items():
        i = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_MESH, name)
        if i < 0:
            continue
        corners = model.mesh_vert[model.mesh_vertadr[i] :][: model.mesh_vertnum[i]]
        cells = np.floor(corners / size)
        _, first, cell = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        triangles = slice(model.mesh_faceadr[i], model.mesh_faceadr[i] + model.mesh_facenum[i])
        faces = first[cell.ravel()[model.mesh_face[triangles]]]  # (triangles, 3)
        whole = np.flatnonzero((faces != np.roll(faces, 1, axis=1)).all(axis=1))
        _, once = np.unique(np.sort(faces[whole], axis=1), axis=0, return_index=True)
        kept = whole[np.sort(once)]
        for array, values in ((model.mesh_face, faces), (model.mesh_facenormal, model.mesh_facenormal[triangles])):
            array[triangles][: len(kept)] = values[kept]
        model.mesh_facenum[i] = len(kept)
    return model
