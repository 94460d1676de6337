"""Runs the tests on another set of versions than the lock's.

    python tests/versions.py oldest [pytest arguments]    # the lowest version that pyproject.toml allows of each requirement
    python tests/versions.py newest [pytest arguments]    # the newest that pip finds
    python tests/versions.py lock                         # writes requirements.lock anew, from the .venv that make setup made

Each set gets a virtual environment of its own, `.venv-oldest` or `.venv-newest`, with the Python that runs this script. The lock holds
what a run of `newest` that passed has installed: to renew it, remove `.venv`, run `make test-all LOCK=`, then `versions.py lock`.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = "# The versions that the tests run on, for pip's -c: written by python tests/versions.py lock\n"


def requirements() -> list[Requirement]:
    """All that pyproject.toml asks for, with every extra, eqldm itself left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [found for found in map(Requirement, lines) if found.name != "eqldm"]


def oldest() -> list[str]:
    """`name==version` of each requirement's lower bound. Raises ValueError where one has none."""
    pins = []
    for requirement in requirements():
        bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"pyproject.toml: '{requirement}' needs one lower bound, such as >=1.0")
        pins.append(f"{requirement.name}=={bounds[0]}")
    return pins


def locked() -> dict[str, str]:
    """The lock's versions by name, as pip normalises names."""
    lines = [line.partition("#")[0].strip() for line in LOCK.read_text().splitlines()]
    return {normalised(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def differences() -> list[tuple[str, str, str]]:
    """`(name, the lock's version, the installed one)` of the requirements that are installed in another version than the lock's, or "none"
    where they are not."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    found = {normalised(requirement.name) for requirement in requirements() if requirement.marker is None or requirement.marker.evaluate()}
    triples = [(name, locked()[name], installed(name)) for name in sorted(found)]
    return [(name, wanted, now) for name, wanted, now in triples if wanted != now]


def normalised(name: str) -> str:
    """A package's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def write_lock() -> None:
    """The lock, from what `.venv` holds."""
    python = ROOT / ".venv" / "bin" / "python"
    freeze = [python, "-m", "pip", "freeze", "--exclude-editable", "--disable-pip-version-check"]
    frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    LOCK.write_text(HEADER + frozen)


class Unreachable(Exception):
    """pip could not fetch packages: why."""


def beside(*pins: str) -> Path:
    """A folder with packages of other versions, without what they depend on: in front of PYTHONPATH they hide those of the environment,
    whose torch stays. Installed once. Raises Unreachable."""
    folder = ROOT / f".venv-beside-{pins[0].replace('==', '-')}-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".venv-beside-new-") as partial:  # another process may install the same
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "1"]
        done = subprocess.run([*install, "--timeout", "20", "--target", f"{partial}/in", *pins], capture_output=True, text=True)
        if done.returncode:
            raise Unreachable(f"pip cannot install {' '.join(pins)}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        try:
            os.rename(f"{partial}/in", folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def run_tests(which: str, arguments: list[str]) -> int:
    """Makes the environment where it is not there yet, installs the set, and runs pytest; returns its exit status."""
    folder = ROOT / f".venv-{which}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", f"{ROOT}[dev]"]
    if which == "oldest":
        pins = folder / "oldest.txt"
        pins.write_text("\n".join(oldest()) + "\n")
        install += ["-c", pins]
    else:
        install += ["--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run(install, check=True)
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT).returncode


def main() -> None:
    which, *arguments = sys.argv[1:] or [""]
    if which == "lock":
        write_lock()
    elif which in ("oldest", "newest"):
        sys.exit(run_tests(which, arguments))
    else:
        sys.exit(f"error: got '{which}', wanted oldest, newest or lock\n\n{__doc__}")


if __name__ == "__main__":
    main()
