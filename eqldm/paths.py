"""Paths that people give, as options of a command or of a config: `~` is their home, and what can be no path is refused."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

ADDRESS = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # of data elsewhere: they are no paths of this machine


def expanded(text: str) -> str:
    """A path with `~` and `~user` replaced, or an address as it is. Raises ValueError, which does not name the option, for no path."""
    if not text:
        raise ValueError("got nothing, wanted a path")
    if text != text.strip() or any(ord(character) < 32 for character in text):
        raise ValueError(f"got {text!r}, which begins or ends in a blank, or has a line break: wanted a path")
    if ADDRESS.match(text):
        return text
    if longest := next((part for part in text.split("/") if len(os.fsencode(part)) > 255), ""):
        raise ValueError(f"got a name of {len(longest)} characters, {longest[:40]!r}...: wanted a path, whose names have 255 at most")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        raise ValueError(f"got {text!r}, and there is no such user's home") from error


def place_option(text: str) -> str:
    """The `type` of an option that is a path or an address, or a name that has no `~`."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_option(text: str) -> Path:
    """The `type` of an option that is a path of this machine."""
    return Path(place_option(text))


def check_folder(option: str, folder: str | Path) -> None:
    """Raises OSError, naming the option, where no folder can be written there: a file has its name, or that of one above it, or the
    nearest folder that there is lets nobody write. Nothing is made."""
    folder = Path(folder)
    for nearest in (folder, *folder.absolute().parents):
        if nearest.is_dir():
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(f"{option}: '{nearest}' does not let you write, so '{folder}' cannot be: give another folder")
            return
        if nearest.exists() or nearest.is_symlink():
            raise NotADirectoryError(f"{option}: '{nearest}' is no folder, so '{folder}' cannot be one: give another")
