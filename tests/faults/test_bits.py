"""One flipped bit anywhere in a folder of shards: found by --check; and a set is read as it was, or refused in one line."""

from __future__ import annotations

import random
import shutil

import pytest

from eqldm.data.integrity import check_folder
from eqldm.data.samples import LatentSamples, PictureSamples, pack_array
from eqldm.data.shards import MANIFEST, write_manifest, write_shard


@pytest.fixture(scope="module")
def sets(make_picture_shards, tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("sets")
    latents = folder / "latents"
    latents.mkdir()
    samples = [{"__key__": str(n), "txt": "a", "moments.npy": pack_array(torch.randn(8, 2, 2))} for n in range(8)]
    entries = [write_shard(latents / f"{first}.tar", samples[first : first + 4]) for first in (0, 4)]
    write_manifest(latents, entries, kind="latents")
    return {"pictures": make_picture_shards(folder / "pictures", count=12, size=16, shard_size=4), "latents": latents}


@pytest.mark.parametrize("kind", ["pictures", "latents"])
@pytest.mark.fault("a bit flipped in a tar, an index or a manifest", tries=40)
def test_a_flipped_bit(sets, tmp_path, kind, seed):
    rng, folder = random.Random(seed), shutil.copytree(sets[kind], tmp_path / "set")
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    try:
        wrong = check_folder(folder)[0]
    except ValueError as error:
        wrong = [str(error)]
        assert path.name == MANIFEST and "\n" not in str(error)
    assert wrong or path.name in (MANIFEST, "about.json")  # of what is stated beside digests
    try:
        found = {"pictures": PictureSamples, "latents": LatentSamples}[kind](folder)
        [found[n] for n in range(len(found))]
    except (ValueError, OSError) as error:
        assert "\n" not in str(error), error
