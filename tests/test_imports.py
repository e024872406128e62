"""Imports of the package point one way: a module knows only what lies below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    ["checks_smolandfast", "files_smolandfast", "grammar_smolandfast"],
    ["configuration_smolandfast", "tokenization_fast_action", "normalization_smolandfast", "prompt_smolandfast"],
    ["processing_smolandfast", "generation_smolandfast"],
    ["modeling_smolandfast"],
    ["training", "deployment"],
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [path for path in ROOT.glob("*.py") if path.name != "__init__.py"]
FILES += [path for folder in LAYERS[-1] for path in (ROOT / folder).glob("*.py")]


def imported_names(path: Path) -> set[str]:
    """The modules and folders of this package that a file imports; those of its own folder are left out."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    own_level = 1 if path.parent == ROOT else 2
    relative = {node.module.partition(".")[0] for node in nodes if node.level == own_level}
    absolute = {node.module.split(".")[1] for node in nodes if (node.module or "").startswith("smolandfast.")}
    return relative | absolute


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_the_layers_below_it(path):
    own = path.stem if path.parent == ROOT else path.parent.name
    assert all(LEVELS[name] < LEVELS[own] for name in imported_names(path)), imported_names(path)
