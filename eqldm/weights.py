"""Files of weights and of settings, opened without running anything that they hold.

A pickle may run any code when it is opened. Here it is opened by torch's reader of weights alone, which refuses what is none. Some
libraries open theirs with Python's own: what is left to them goes through `read_weights` first.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

DAMAGED = (RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError, struct.error)  # what torch raises of such


def read_json(path: str | Path, way_out: str = ": fetch it again") -> dict[str, Any]:
    """The object of a JSON file, such as a config.json. Raises ValueError that names a file that holds none; FileNotFoundError.

    way_out: ends what is said of one that is cut off.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is no JSON file, or is cut off ({error}){way_out}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds a JSON {type(found).__name__}, wanted an object with names")
    return found


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU: a `.safetensors`, or a pickled state_dict, alone or under that name.

    Raises ValueError, naming the file, where it holds more than weights, none, or is cut off; FileNotFoundError.
    """
    if Path(path).suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise cut_off(path, error) from error
    found = read_pickle(path)
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(weight, Tensor) for weight in found.values()):
        raise ValueError(f"'{path}' holds no weights by name: wanted a state_dict")
    return found


def read_pickle(path: str | Path, mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU, if it is tensors and plain values alone. Raises as `read_weights`."""
    try:
        with warnings.catch_warnings():  # of pickles that are none of torch's, before they are refused
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class|function) (\S+)", str(error))
        if named is None:
            raise ValueError(
                f"'{path}' is no PyTorch file (a web page, a git-lfs pointer?), or no file of weights alone, and is not opened: "
                "fetch it again"
            ) from error
        raise ValueError(
            f"'{path}' is a pickle that holds more than weights ({named[1]}), and opening it could run any code (weights_only refuses it). "
            "Get the .safetensors of it, or have somebody who trusts it save its state_dict alone"
        ) from error
    except DAMAGED as error:
        raise cut_off(path, error) from error


def cut_off(path: str | Path, error: Exception) -> ValueError:
    """What to raise of a file that cannot be read for its bytes."""
    about = " ".join(str(error).split())
    return ValueError(f"'{path}' cannot be read, it may be cut off ({about[:160]}): fetch it again")
