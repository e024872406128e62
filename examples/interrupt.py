"""Ctrl-C, or a package that is not installed, ends a script with one line.

Each script imports this before its libraries, which take seconds.
"""

import sys

# What to install for a package that only some scripts need.
INSTALL = {
    '-e ".[robot]"': ("matplotlib", "tensorboard"),
    '-e ".[examples]"': ("gymnasium", "gym_pusht", "pymunk"),
    '-e ".[metaworld]"': ("metaworld", "mujoco"),
    '-e ".[deployment]"': ("onnx", "onnxscript", "onnxruntime"),
    '-e ".[serve]"': ("msgpack", "websockets"),
    '-e ".[app]"': ("gradio",),
    '"lerobot[feetech]==0.6.1"    # in an environment of Python 3.12 or 3.13': ("lerobot", "draccus"),
}


def excepthook(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)  # what shells expect after Ctrl-C
    for requirement, packages in INSTALL.items():
        if issubclass(kind, ModuleNotFoundError) and error.name.partition(".")[0] in packages:
            print(f"{error}. This script needs: pip install {requirement}", file=sys.stderr)
            sys.exit(1)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = excepthook
