"""The pictures that models are evaluated on: shards, here or elsewhere, or simply a folder of pictures."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from eqldm.data.listing import describe_left_out, num_lost
from eqldm.data.pictures import UnfitPicture, read_picture
from eqldm.data.samples import MAX_SKIPS, PictureSamples, picture_to_tensor
from eqldm.data.shards import holds_shards
from eqldm.data.sources import PictureFolder


class FolderSamples(Dataset):
    """`samples[k]` as `PictureSamples` gives it, of the first `limit` pictures of a folder and its subfolders in an order that does not
    depend on them (by a hash of their names: folders are often sorted by class), resized and cropped to the square in their middle.

    Captions are those of side-car files or metadata (see data/make_shards.py), else empty. label: -1.
    """

    def __init__(self, folder: str | Path, image_size: int, limit: int):
        """Raises ValueError, FileNotFoundError where the folder holds no pictures."""
        self.source = PictureFolder.open(folder, allow_missing_captions=True)
        if num_lost(self.source.left_out):
            warnings.warn(f"{self.source}: left out {describe_left_out(self.source.left_out)}", stacklevel=2)
        without = len(self.source.names) - len(self.source.captions)
        if self.source.absent or (without and self.source.captions):  # a folder without any captions is meant to be one
            absent = [f"{item['file']} ({item['reason']})" for item in self.source.absent[:3]]
            unknown = f"; captions of no picture: {len(self.source.absent)}, such as {', '.join(absent)}" if absent else ""
            warnings.warn(f"{self.source}: {without} of {len(self.source.names)} pictures have no caption{unknown}", stacklevel=2)
        names = sorted(self.source.names, key=lambda name: hashlib.sha256(name.encode()).digest())
        self.names, self.image_size = names[:limit], (image_size, image_size)
        digest = hashlib.sha256(f"{image_size}".encode())
        for name in self.names:
            digest.update(f"{name}\n{self.source.caption(name)}\n".encode())
            digest.update(self.source.read(name))
        self.digest = digest.hexdigest()  # of all that is shown

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> dict:
        number, skipped = position, []
        for _ in range(min(MAX_SKIPS, len(self))):
            name = self.names[number]
            try:
                picture = read_picture(self.source.read(name))
                if min(picture.size) < self.image_size[0]:
                    raise UnfitPicture("too small")
                break
            except UnfitPicture:
                skipped.append(name)
                number = (number + 1) % len(self)
        else:
            size = self.image_size[0]
            raise ValueError(f"{self.source}: {len(skipped)} pictures in a row cannot be read, or are below {size} x {size}")
        x = picture_to_tensor(ImageOps.fit(picture, self.image_size, Image.Resampling.LANCZOS))
        return {"x": x, "caption": self.source.caption(name), "label": -1, "key": name, "position": position, "skipped": skipped}


Pictures = PictureSamples | FolderSamples


def count_notes(samples: Pictures, wanted: int) -> list[str]:
    """What a reader must know of how many pictures are measured, of so many wanted."""
    held, order = len(samples), ""
    if isinstance(samples, FolderSamples):  # it opens no more than are wanted
        held, order = len(samples.source.names), ", in an order by a hash of their names"
    if (count := min(wanted, len(samples))) < held:
        return [f"The first {count} of {held} pictures{order}."]
    return [f"--num-images {wanted}: there are {held} pictures, and all are measured."] if held < wanted else []


def open_pictures(data: str, image_size: int | None, limit: int) -> Pictures:
    """Those of a shard folder, of its address, or of a folder of pictures, of which `limit` are looked at.

    image_size: of the squares that a folder's pictures are cut to. Raises ValueError where it is missing, or does not fit the shards;
    as `PictureSamples`.
    """
    folder = Path(data)
    if holds_shards(data) or not folder.is_dir() or any(folder.glob("*.tar")):
        samples = PictureSamples(data)
        if image_size not in (None, samples.image_size[0]):
            raise ValueError(f"--image-size {image_size}: '{data}' is a shard folder, whose pictures are {samples.image_size[0]} px")
        return samples
    if image_size is None:
        raise ValueError(
            f"--data '{data}' is a folder of pictures: give --image-size, the pixels a side that they are resized and cropped to"
        )
    return FolderSamples(data, image_size, limit)
