"""What is declared, locked and tested are the same releases."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import smolandfast.configuration_smolandfast as configuration_smolandfast

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].values()
DECLARED = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS) for line in lines]


def pins(name: str, python: str) -> dict[str, str]:
    """The releases that a file of requirements/ chooses on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "implementation_name": "cpython"}
    found = map(Requirement, (ROOT / "requirements" / name).read_text().splitlines())
    chosen = [r for r in found if r.marker is None or r.marker.evaluate(environment)]
    assert all(re.fullmatch(r"==[\w.+]+", str(r.specifier)) for r in chosen)
    versions = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in chosen}
    assert len(versions) == len(chosen), "two releases of one package"
    return versions


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ["locked.txt", "oldest.txt"])
def test_every_requirement_is_pinned_to_a_release_that_is_allowed(name, python):
    versions = pins(name, python)
    for requirement in DECLARED:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("python", PYTHONS)
def test_the_oldest_releases_are_the_declared_floors(python):
    versions = pins("oldest.txt", python)
    for requirement in DECLARED:
        floor = [spec for spec in requirement.specifier if spec.operator in (">=", "==")]
        assert len(floor) == 1, f"{requirement} has no floor"
        found = SpecifierSet(f"=={versions[canonicalize_name(requirement.name)]}")
        assert floor[0].version in found


def test_a_space_installs_what_is_declared():
    lines = (ROOT / "examples/app/requirements.txt").read_text().splitlines()
    declared = {requirement.name: requirement for requirement in DECLARED}
    for requirement in (Requirement(line) for line in lines if not line.startswith("#")):
        assert requirement == declared[requirement.name]


def test_no_file_names_a_place_to_download_from():
    for path in (ROOT / "requirements").glob("*.txt"):
        assert "/" not in path.read_text()


def test_the_models_code_knows_the_range_that_is_declared():
    (transformers,) = [r for r in DECLARED if r.name == "transformers"]
    assert transformers.specifier == SpecifierSet(configuration_smolandfast.TESTED_TRANSFORMERS)
