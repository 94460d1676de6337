"""Samples by stream position: pictures from shards, or latents from shards, decoded and ready to batch."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from eqldm.data.cache import check_cache
from eqldm.data.contents import MAX_SKIPS, UnfitSample, array_of, caption_of, label_of, picture_extension
from eqldm.data.integrity import check_some
from eqldm.data.order import epoch_order, epoch_shards
from eqldm.data.pictures import UnfitPicture, read_picture
from eqldm.data.remote import is_remote
from eqldm.data.shards import ShardSet

UNREADABLE = (UnfitPicture,)  # what is skipped, and counted
MEND = "mend it, or make the shards anew (data/make_shards.py --tars; --index names all such samples)"


def decode_picture(content: bytes) -> Tensor:
    """[3, H, W] float32 in [-1, 1], by the rules of `read_picture`. Raises UnfitPicture where the bytes are no picture."""
    return picture_to_tensor(read_picture(content))


def picture_to_tensor(image: Image.Image) -> Tensor:
    """A PIL picture as [3, H, W] float32 in [-1, 1]."""
    return from_bytes(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def tensor_to_picture(x: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] (clamped) as a PIL picture: the inverse of `picture_to_tensor`."""
    return Image.fromarray(to_bytes(x).permute(1, 2, 0).cpu().numpy())


def to_bytes(x: Tensor) -> Tensor:
    """Values in [-1, 1] (clamped), of any shape, as uint8."""
    return x.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """uint8 of any shape as float32 in [-1, 1]: the inverse of `to_bytes`."""
    return pixels.float().div_(127.5).sub_(1)


class ShardSamples(Dataset):
    """What both kinds share: the shards, and which sample a stream position shows.

    seed: of the order; None keeps the order of the shards (validation).  window: shards shuffled together.
    """

    turns: list[int] | None = None  # the shards that this process reads, in turn, where it does not read all

    def __init__(self, folder: str | Path, seed: int | None, window: int):
        self.shards, self.seed, self.window = ShardSet.open(folder), seed, window
        if is_remote(folder):  # a window is read, the next one comes, and the slowest reader may be in the one before
            check_cache(folder, self.shards.manifest["shards"], 2 if seed is None else 3 * window)
        else:
            check_some(Path(folder), self.shards.digest)
        self._orders: dict[int, np.ndarray] = {}  # of the last two epochs: a batch may straddle them
        self._asked = range(0)  # the positions of the window whose tars, and the next one's, were asked for

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def digest(self) -> str:
        """Of all contents: two sets are the same where it is."""
        return self.shards.digest

    def number(self, position: int) -> int:
        """The sample that a stream position shows."""
        if is_remote(self.shards.folder) and get_worker_info() is not None and position not in self._asked:
            self._fetch_ahead(position)
        epoch, place = divmod(position, len(self))
        if self.seed is None:
            return place
        if epoch not in self._orders:
            self._orders = {k: order for k, order in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = epoch_order(self.shards.starts, self.seed, epoch, self.window)
        return int(self._orders[epoch][place])

    def windows(self, position: int) -> tuple[range, list[int], list[int]]:
        """The stream positions of the window that one lies in, its shards, and the next window's."""
        starts, (epoch, place) = self.shards.starts, divmod(position, len(self))
        num_shards = len(starts) - 1
        if self.seed is None:
            shard = self.shards.shard_of(place)
            turns = range(num_shards) if self.turns is None else self.turns
            following = list(turns[turns.index(shard) + 1 :][:1]) if shard in turns else []
            return range(starts[shard], starts[shard + 1]), [shard], following
        shards = epoch_shards(num_shards, self.seed, epoch).tolist()
        ends = np.cumsum(np.diff(starts)[shards]) + epoch * len(self)
        first = int(np.searchsorted(ends, position, side="right")) // self.window * self.window
        last = min(first + self.window, num_shards)
        following = shards[last:] or epoch_shards(num_shards, self.seed, epoch + 1).tolist()
        return range(ends[first - 1] if first else epoch * len(self), ends[last - 1]), shards[first:last], following[: self.window]

    def _fetch_ahead(self, position: int) -> None:
        self._asked, *windows = self.windows(position)
        shards = []
        for window in windows:
            first = os.getpid() % max(1, len(window))  # readers begin with different ones
            shards += window[first:] + window[:first]
        self.shards.fetch_ahead(shards)


class PictureSamples(ShardSamples):
    """`samples[position]` is `{x, caption, label, key, position, skipped}`; an unreadable picture's place is taken by the
    next readable one of the shard, and its key is listed under `skipped`.

    seed None keeps the order of the shards (validation). `label` is -1 where the shards carry none.
    """

    def __init__(self, folder: str | Path, seed: int | None = None, window: int = 16, need_captions: bool = False):
        super().__init__(folder, seed, window)
        extension = picture_extension({ending: int(self.shards.has(ending).sum()) for ending in self.shards.places})
        if extension is None:
            held = ", ".join(self.shards.places)
            raise ValueError(f"data set '{folder}' holds no pictures (png, jpg, webp), only: {held}. Is it a latent folder?")
        self.extension = extension
        have = self.shards.has(extension)
        if not have.all():
            raise ValueError(
                f"data set '{folder}': {(~have).sum()} of {len(have)} samples have no .{self.extension} picture, the first is "
                f"'{self.shards.keys[~have][0]}': a set keeps its pictures in one format"
            )
        if need_captions:
            _check_captions(self.shards)
        height, width = decode_picture(self.shards.read(self._first_readable(), self.extension)).shape[-2:]
        self.image_size = (height, width)

    def _first_readable(self) -> int:
        for number in range(min(len(self.shards), MAX_SKIPS)):
            content = self.shards.read(number, self.extension)  # outside: a lost shard is no unreadable picture
            try:
                decode_picture(content)
                return number
            except UNREADABLE:
                continue
        raise ValueError(f"data set '{self.shards.folder}': none of its first {MAX_SKIPS} pictures can be decoded")

    def __getitem__(self, position: int) -> dict:
        number, skipped = self.number(position), []
        for _ in range(MAX_SKIPS):
            content = self.shards.read(number, self.extension)
            try:
                x = decode_picture(content)
                break
            except UNREADABLE:
                skipped.append(str(self.shards.keys[number]))
                number = (number + 1) % len(self.shards)
        else:
            raise UnfitSample(f"data set '{self.shards.folder}': {MAX_SKIPS} pictures in a row cannot be decoded, from {skipped[0]}")
        if tuple(x.shape[-2:]) != self.image_size:
            raise UnfitSample(
                f"picture '{self.shards.keys[number]}' of '{self.shards.folder}' is {tuple(x.shape[-2:])}, the first one "
                f"{self.image_size}: make the shards with data/make_shards.py --size"
            )
        return {
            "x": x,
            "caption": _caption(self.shards, number),
            "label": _read_as(label_of, self.shards, number, "json") if self.shards.holds(number, "json") else -1,
            "key": str(self.shards.keys[number]),
            "position": position,
            "skipped": skipped,
        }


class LatentSamples(ShardSamples):
    """`samples[position]` is `{moments, caption, key, position, skipped}`, and `prompt_embeds` where the shards hold them.

    moments: [2 C, h, w] float32, the posterior's mean and log-variance as `AutoencoderKL.encode` gives them.
    Raises ValueError where `vae_hash` is given and the shards were made with another VAE.
    """

    def __init__(self, folder: str | Path, seed: int | None = None, window: int = 16, vae_hash: str | None = None):
        super().__init__(folder, seed, window)
        if self.shards.manifest.get("kind") != "latents":
            raise ValueError(f"data set '{folder}' holds no latents: encode it first with data/encode_latents.py")
        made_with = self.shards.manifest.get("vae_hash")
        if vae_hash is not None and made_with != vae_hash:
            raise ValueError(
                f"latents '{folder}' were made with another VAE (hash {made_with}) than the one configured ({vae_hash}): "
                "encode the pictures anew with data/encode_latents.py, or set vae= to the VAE that made them"
            )
        for name in {"moments.npy", *self.shards.places} & {"moments.npy", "prompt_embeds.npy"}:
            have = self.shards.has(name)
            if not have.all():
                raise ValueError(
                    f"latents '{folder}': {(~have).sum()} of {len(have)} samples have no {name}, the first is "
                    f"'{self.shards.keys[~have][0]}': encode the pictures anew with data/encode_latents.py"
                )
        _check_captions(self.shards)
        self.shape = read_array(self.shards, 0, "moments.npy").shape
        if len(self.shape) != 3 or self.shape[0] % 2:
            raise ValueError(
                f"latents '{folder}': moments.npy of the first sample is {tuple(self.shape)}, wanted (2 C, h, w), means and "
                "log-variances: encode the pictures with data/encode_latents.py"
            )
        held = "prompt_embeds.npy" in self.shards.places
        self.embeds_shape = read_array(self.shards, 0, "prompt_embeds.npy").shape if held else None

    def check_text_encoder(self, text_hash: str) -> None:
        """Raises ValueError where the shards hold prompt embeddings of another text encoder."""
        made_with = self.shards.manifest.get("text_hash")
        if made_with not in (None, text_hash):
            raise ValueError(
                f"latents '{self.shards.folder}' hold prompt embeddings of another text encoder (hash {made_with}) than the "
                f"model's ({text_hash}): encode anew with data/encode_latents.py --text-model, or without --prompt-embeds"
            )

    def __getitem__(self, position: int) -> dict:
        number = self.number(position)
        moments = read_array(self.shards, number, "moments.npy")
        if moments.shape != self.shape:
            raise UnfitSample(
                f"latents '{self.shards.keys[number]}' of '{self.shards.folder}' are {tuple(moments.shape)}, the first ones "
                f"{tuple(self.shape)}: encode pictures of one size with data/encode_latents.py"
            )
        sample = {
            "moments": moments,
            "caption": _caption(self.shards, number),
            "key": str(self.shards.keys[number]),
            "position": position,
            "skipped": [],
        }
        if self.embeds_shape is not None:
            sample["prompt_embeds"] = embeds = read_array(self.shards, number, "prompt_embeds.npy")
            if embeds.shape != self.embeds_shape:
                raise UnfitSample(
                    f"prompt embeddings of '{self.shards.keys[number]}' of '{self.shards.folder}' are {tuple(embeds.shape)}, the first "
                    f"ones {tuple(self.embeds_shape)}: encode the pictures anew with data/encode_latents.py"
                )
        return sample


def pack_array(x: Tensor) -> bytes:
    """An array file for a shard. NumPy has no bfloat16: its bits are kept as int16, float16 stays itself."""
    buffer = io.BytesIO()
    np.save(buffer, x.contiguous().view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.contiguous().numpy())
    return buffer.getvalue()


def read_array(shards: ShardSet, number: int, extension: str) -> Tensor:
    """float32 tensor of an array file that `pack_array` wrote. Raises UnfitSample where it is none, or not finite."""
    array = torch.from_numpy(_read_as(partial(array_of, name=extension), shards, number, extension))
    return (array.view(torch.bfloat16) if array.dtype == torch.int16 else array).float()


def collate(samples: list[dict]) -> dict:
    """Tensors stacked, numbers as int64 tensors, text as lists, skipped keys joined; `replaced`: whether each place was taken by another
    picture, for keys do not tell: two tars may have the same ones."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name, values in batch.items():
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(values[0], int):
            batch[name] = torch.tensor(values)
    batch["replaced"] = [bool(keys) for keys in batch["skipped"]]
    batch["skipped"] = [key for keys in batch["skipped"] for key in keys]
    return batch


def _caption(shards: ShardSet, number: int) -> str:
    return _read_as(caption_of, shards, number, "txt") if shards.holds(number, "txt") else ""


def _read_as(parse: Callable[[bytes], Any], shards: ShardSet, number: int, extension: str) -> Any:
    """What a file of a sample holds. Raises UnfitSample where it is not what it should be."""
    content = shards.read(number, extension)
    try:
        return parse(content)
    except ValueError as error:
        raise UnfitSample(f"sample '{shards.keys[number]}' of '{shards.folder}': {error}: {MEND}") from error


def _check_captions(shards: ShardSet) -> None:
    have = shards.has("txt")
    if not have.all():
        first = shards.keys[~have][0]
        raise ValueError(
            f"data set '{shards.folder}': {(~have).sum()} of {len(have)} samples have no caption (.txt), the first is "
            f"'{first}'. Training on text needs captions: make the shards with data/make_shards.py from captioned pictures"
        )
