"""The options of a command: a parser whose errors are one line, and the `type` of an option that is a number."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

from eqldm.atomic import DISK_FULL, NotWritten
from eqldm.ranges import MANY, Range


class Parser(argparse.ArgumentParser):
    """As argparse's, but an error is one line, half of a name is not guessed about, and what an option given twice loses is told."""

    def __init__(self, about: str | None):
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit status 2."""
        text = " ".join(message.split())
        self.exit(2, f"error: {text if len(text) <= 1000 else text[:500] + '...' + text[-500:]}\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:  # which argparse takes out, and an empty list for a value
            raise argparse.ArgumentError(action, "got '--', wanted a value")
        return super()._get_values(action, arg_strings)  # type: ignore[misc]

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse's; an unknown option is told with the one that it may stand for."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = get_close_matches(name, self._option_string_actions, 1)
            hint = f". Did you mean {near[0]}?" if near else " (--help lists the options)"
            what = "there is no option" if unknown[0].startswith("-") else "of no option is"
            self.error(f"{what} {shown(name)}{hint}")
        return found


class _Once(argparse._StoreAction):
    """Stores an option's value. Another one that follows takes its place, which is said; a list that follows may be meant to add to it."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[override]
        if values != (given := getattr(self, "given", values)):
            if isinstance(values, list):
                raise argparse.ArgumentError(self, f"given twice, {shown(given)} and {shown(values)}: give all after it at once")
            print(f"note: {option_string} is given twice, {shown(given)} and {shown(values)}: the last one holds", file=sys.stderr)
        self.given = values
        super().__call__(parser, namespace, values, option_string)


def error_line(error: Exception) -> str:
    """What a command ends with for an error. Of a full disk that was met outside of `atomic`, in a log for one, it says the way out."""
    text = " ".join(str(error).splitlines())
    if isinstance(error, OSError) and not isinstance(error, NotWritten) and error.errno in DISK_FULL:
        if error.strerror == os.strerror(error.errno):  # the system's words alone
            text = str(NotWritten(f"'{error.filename}'" if error.filename else "what this command writes", error))
    return f"error: {text}"


def whole(low: int | Range, high: int = MANY) -> Callable[[str], int]:
    """The `type` of an option that is a whole number from low to high, or of a range."""
    return lambda text: _number(text, int, low if isinstance(low, Range) else Range(low, high))


def real(wanted: Range) -> Callable[[str], float]:
    """The `type` of an option that is a finite number of a range."""
    return lambda text: _number(text, float, wanted)


def _number(text: str, kind: type, wanted: Range) -> Any:
    """Of plain digits: what Python takes beside them, 1_000 and the digits of other scripts, is a slip here."""
    try:
        value = kind(text) if re.fullmatch(r"[a-z0-9.+-]+", text, re.IGNORECASE | re.ASCII) else None
    except ValueError:  # also for thousands of digits
        value = None
    if value is None:
        raise argparse.ArgumentTypeError(f"got {shown(text)}, wanted a {'whole ' * (kind is int)}number, {wanted}")
    if value not in wanted:
        raise argparse.ArgumentTypeError(f"got {text[:40]}, wanted {wanted}")
    return value


def shown(value: Any) -> str:
    """What was given, for a message: of a long text its beginning."""
    text = str(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
