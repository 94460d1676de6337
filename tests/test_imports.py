"""Imports go one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("views", "kinds", "paths", "ranges", "weights", "text_files", "markdown", "lock", "processes", "gate", "precision"),
    ("atomic", "command", "config", "model_card", "single_file"),
    ("unused",),
    ("model_folder",), ("construction",), ("data",), ("training",), ("autoencoder",), ("diffusion",), ("anagram",), ("evaluation",),
    ("run_model", "form"),
)  # fmt: skip
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
PACKAGE = sorted(path for path in (ROOT / "eqldm").rglob("*.py"))
ENTRY_POINTS = [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "data").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]


def part(path: Path) -> str:
    """The part of the package that a module belongs to: `views`, `data`, ..., `evaluate`; "" for eqldm/__init__.py."""
    name = path.relative_to(ROOT / "eqldm").parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def parts_imported(path: Path) -> set[str]:
    """The parts of eqldm that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, line {node.lineno}"
            names |= {node.module} if node.module != "eqldm" else {f"eqldm.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("eqldm.")} - {"__version__"}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_its_own_layer_or_below(path):
    if part(path) in (
        "",
        "budget",
        "evaluate",
        "sample",
        "studio",
        "swap",
        "export",
    ):  # the package itself imports nothing, the entry points may import all
        assert part(path) or not parts_imported(path)
        return
    assert part(path) in LAYER_OF, f"{path} is in no layer: name it in LAYERS, in the order of the design"
    own = LAYER_OF[part(path)]
    above = {name for name in parts_imported(path) if LAYER_OF.get(name, len(LAYERS)) > own}
    assert not above, f"{path.relative_to(ROOT)} imports from above its layer: {', '.join(sorted(above))}"
    assert own > 0 or parts_imported(path) <= {part(path)}, f"{path.relative_to(ROOT)} is at the bottom and must import nothing of eqldm"


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_entry_points_import_parts_that_exist(path):
    assert parts_imported(path) <= LAYER_OF.keys() | {"budget", "sample", "export"}


def test_importing_the_package_loads_no_torch_and_prints_nothing():
    code = "import eqldm, sys; assert not {'torch', 'diffusers', 'pytorch_lightning'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
