"""The versions that the tests run on: a lock, and bounds that it satisfies."""

from __future__ import annotations

import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import versions
from versions import LOCK, ROOT, Unreachable, beside, locked, normalised, oldest, requirements


def test_the_lock_satisfies_pyproject():
    known = locked()
    assert len(requirements()) > 25
    for requirement in requirements():
        assert normalised(requirement.name) in known, f"'{requirement}' is not in {LOCK.name}: python tests/versions.py lock"
        assert requirement.specifier.contains(known[normalised(requirement.name)]), requirement


def test_the_lock_pins_versions_alone():
    """No address, path or editable install of the machine that wrote it."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert [str(Requirement(line)) for line in lines] == lines
    assert all([spec.operator for spec in Requirement(line).specifier] == ["=="] for line in lines)


def test_the_oldest_set_is_the_lower_bounds(monkeypatch):
    pins = [Requirement(pin) for pin in oldest()]
    assert [pin.name for pin in pins] == [requirement.name for requirement in requirements()]
    for pin in pins:
        assert Version(next(iter(pin.specifier)).version) <= Version(locked()[normalised(pin.name)]), pin
    monkeypatch.setattr(versions, "requirements", lambda: [Requirement("torch")])
    with pytest.raises(ValueError, match="'torch' needs one lower bound"):
        oldest()


def test_packages_that_cannot_be_fetched_are_told(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    before = set(ROOT.glob(".venv-beside*"))
    with pytest.raises(Unreachable, match="pip cannot install eqldm-of-nobody==1: ERROR: No matching distribution"):
        beside("eqldm-of-nobody==1")
    assert set(ROOT.glob(".venv-beside*")) <= before | set(ROOT.glob(".venv-beside-new-*"))


def test_python_is_the_one_that_is_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bound, newest = project["requires-python"], [line.rpartition(" :: ")[2] for line in project["classifiers"]]
    assert newest == ["3.11", "3.12", "3.13"] and "Python 3.11 to 3.13" in (ROOT / "docs" / "gpu.md").read_text()
    assert bound == ">=3.11" and "3.11 or newer" in (ROOT / "README.md").read_text() and sys.version_info >= (3, 11)
    assert "(3, 11)" in (ROOT / "Makefile").read_text()
