"""Ctrl-C, or a package that is not installed, ends a script with one line.

Each script imports this before its libraries, which take seconds.
"""

import sys

# The extra of pyproject.toml that has a package which only some scripts need.
EXTRAS = {
    "robot": ("matplotlib", "tensorboard"),
    "examples": ("gymnasium", "gym_pusht", "pymunk"),
    "metaworld": ("metaworld", "mujoco"),
    "deployment": ("onnx", "onnxscript", "onnxruntime"),
    "serve": ("msgpack", "websockets"),
    "app": ("gradio",),
}


def excepthook(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)  # what shells expect after Ctrl-C
    for extra, packages in EXTRAS.items():
        if issubclass(kind, ModuleNotFoundError) and error.name in packages:
            print(f'{error}. This script needs: pip install -e ".[{extra}]"', file=sys.stderr)
            sys.exit(1)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
