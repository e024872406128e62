"""Name the installed releases that requirements/locked.txt does not have; exit with 1 where there are none.

Where `make test-newest` fails, these are the cause to look at: with the locked ones the same tests pass.
"""

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

lines = (Path(__file__).parent / "locked.txt").read_text(encoding="utf-8").splitlines()
locked = {r.name: r.specifier for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()}
installed = {canonicalize_name(found.metadata["Name"]): Version(found.version) for found in distributions()}
newer = [
    f"{name} {version} (locked{locked[name]})"
    for name, version in sorted(installed.items())
    if name in locked and version not in locked[name]
]
print("Not the locked releases:", ", ".join(newer) or "none")
sys.exit(not newer)
