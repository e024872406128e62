"""Ctrl-C ends a script with one line. Each script imports this before its libraries, which take seconds."""

import sys


def excepthook(kind, error, traceback) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print("\nInterrupted.", file=sys.stderr)
    sys.exit(130)  # what shells expect after Ctrl-C


sys.excepthook = excepthook
