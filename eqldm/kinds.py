"""What the options of a config may be given as. YAML and omegaconf make of almost anything almost anything: a folder `True` of `dir: yes`,
8 of 010, 90 of 1:30, the environment's secrets of `${oc.env:...}`. What was not meant is refused by the option's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Optional, get_args, get_origin, get_type_hints

import yaml

UNMEANT = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+)")  # in YAML an octal number, or one to the base of 60


def option_type(stage: type, key: str) -> Any:
    """The type of the option of a dotted key; None for a key that is none."""
    kind: Any = stage
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def is_text(kind: Any) -> bool:
    """Whether the type of an option is text."""
    return kind in (str, Optional[str])


def check_kinds(kind: Any, given: Any, prefix: str = "") -> None:
    """Raises ValueError, naming the option, where what is given of a dataclass is of another kind than its fields."""
    for name, hint in get_type_hints(kind).items():
        value, key = given.get(name), prefix + name
        if is_dataclass(hint) and isinstance(value, dict):
            check_kinds(hint, value, f"{key}.")
        elif (is_dataclass(hint) or get_origin(hint) is dict) and not isinstance(value, dict | None):
            raise ValueError(f"{key}: got {value!r}, wanted options by name: {key}.NAME=VALUE")
        elif get_origin(hint) is list:
            if not isinstance(value, list | None):
                raise ValueError(f"{key}: got {value!r}, wanted a list: {key}=[...]")
            for each in value or ():
                _check_value(key, get_args(hint)[0], each)
        else:
            _check_value(key, hint, value)


def _check_value(key: str, hint: Any, value: Any) -> None:
    if is_text(hint) and not isinstance(value, str | None):
        raise ValueError(f"{key}: got {value}, which YAML reads as {_called(value)}: wanted a text, so put it in quotes")
    if hint is bool and not isinstance(value, bool | str | None):
        raise ValueError(f"{key}: got {value}, wanted true or false")
    if {int, float} & {hint, *get_args(hint)} and isinstance(value, str) and not value.isascii():
        raise ValueError(f"{key}: got {value!r}, wanted a number in digits 0 to 9")


def _called(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "options by name"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def check_references(given: Any, key: str = "") -> None:
    """Raises ValueError, naming the option, for `${...}` that is more than another option's name: such may read this machine's environment
    into a run folder and a model's card, and whoever wrote a config need not be who runs it."""
    if isinstance(given, str) and re.search(r"\$\{[^}]*:", given):
        raise ValueError(f"{key}: got {given!r}, wanted ${{...}} with the name of another option alone, such as ${{data.train}}")
    for name, value in given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, Sequence | set) else ():
        if not isinstance(given, str):
            check_references(value, f"{key}.{name}".removeprefix(".") if isinstance(given, dict) else key)


def check_numbers(text: str, key: str = "") -> None:
    """Raises ValueError, naming the option, for numbers that YAML reads otherwise than they look. text: a YAML document, of that key."""
    try:
        _check_numbers(yaml.compose(text, Loader=yaml.SafeLoader), key, set())
    except RecursionError as error:
        raise ValueError(f"{key or 'the options'}: lists within lists without end, wanted a few") from error


def _check_numbers(node: yaml.Node | None, key: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias: of few anchors, documents beyond all memory can be made
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and len(node.value) > 100:
        raise ValueError(f"{key}: got a number of {len(node.value)} digits")
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and UNMEANT.fullmatch(node.value):
        base = 60 if ":" in node.value else 8
        raise ValueError(f"{key}: got {node.value[:40]}, which YAML reads to the base of {base}: wanted a plain number, or text in quotes")
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            _check_numbers(value, f"{key}.{name.value}".removeprefix("."), seen)
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_numbers(value, key, seen)


def check_given_once(items: Sequence[str]) -> None:
    """Raises ValueError where a command gives an option twice, `key=value`, with other values."""
    given: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if equals and given.setdefault(key, value) != value:
            raise ValueError(f"{key}: given twice, {given[key]} and {value}: give it once")
