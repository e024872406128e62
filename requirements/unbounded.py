"""Print what pyproject.toml depends on, without upper bounds: what `make test-newest` installs the newest releases of.

Of Transformers pre-releases count too.
"""

from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"].values()
for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
    requirement = Requirement(line)
    floors = [spec for spec in requirement.specifier if spec.operator not in ("<", "<=", "!=", "~=")]
    if requirement.name == "transformers":
        floors = [f"{spec}.dev0" for spec in floors]
    requirement.specifier = SpecifierSet(",".join(map(str, floors)))
    print(requirement)
