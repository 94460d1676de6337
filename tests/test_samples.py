"""Samples by position: decoding, unreadable pictures, captions, latents, and the batches that training sees."""

from __future__ import annotations

import csv
import io
import json
import zlib
from itertools import islice

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger

from conftest import picture_bytes
from eqldm.config import DataConfig, JudgeConfig, RunConfig
from eqldm.data.module import ShardData, SkippedReport
from eqldm.data.order import StreamSampler, epoch_order
from eqldm.data.readers import reader
from eqldm.data.samples import UNREADABLE, LatentSamples, PictureSamples, collate, decode_picture, pack_array, tensor_to_picture
from eqldm.data.shards import write_manifest, write_shard


def png(width: int, height: int, header_bytes: int = 13) -> bytes:
    """The start of a PNG of any size, its header cut to some bytes."""
    header = b"IHDR" + (width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0")[:header_bytes]
    return b"\x89PNG\r\n\x1a\n" + header_bytes.to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")


def write_set(folder, samples: list[dict], **about):
    folder.mkdir(exist_ok=True)
    write_manifest(folder, [write_shard(folder / "x.tar", samples)], **about)
    return folder


def test_pictures_come_with_caption_label_key_and_position(make_picture_shards, tmp_path):
    samples = PictureSamples(make_picture_shards(tmp_path, count=10, shard_size=4), seed=3, window=2, need_captions=True)
    assert len(samples) == 10 and samples.image_size == (32, 32)
    for position in (0, 9, 10, 25):
        number = epoch_order(np.array([0, 4, 8, 10]), 3, position // 10, 2)[position % 10]
        sample = samples[position]
        assert torch.equal(sample.pop("x"), decode_picture(picture_bytes(number)))
        assert sample == {
            "caption": f"picture {number}", "label": number % 3, "key": f"{number:09d}", "position": position, "skipped": []
        }  # fmt: skip
    assert [PictureSamples(tmp_path)[p]["key"] for p in (0, 9, 10)] == ["000000000", "000000009", "000000000"]


def test_a_picture_and_its_tensor_are_inverse():
    x = decode_picture(picture_bytes(0))
    assert x.dtype == torch.float32 and x.shape == (3, 32, 32) and -1 <= x.min() < x.max() <= 1
    assert torch.equal(decode_picture_of(tensor_to_picture(x)), x)
    assert tensor_to_picture(torch.full((3, 1, 1), 5.0)).getpixel((0, 0)) == (255, 255, 255)


def decode_picture_of(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("content", [b"", b"no picture", picture_bytes(0)[:500], png(32, 32), png(32, 32, 5), png(60000, 60000)],
                         ids=["empty", "text", "half", "header only", "short header", "bomb"])  # fmt: skip
def test_bytes_that_are_no_picture_are_skipped(tmp_path, content):
    with pytest.raises(UNREADABLE):
        decode_picture(content)
    folder = write_set(tmp_path, [{"__key__": "bad", "png": content}, {"__key__": "good", "png": picture_bytes(1)}])
    sample = PictureSamples(folder)[0]
    assert (sample["key"], sample["skipped"], sample["label"], sample["caption"]) == ("good", ["bad"], -1, "")


def test_the_next_readable_picture_takes_an_unreadable_ones_place(make_picture_shards, tmp_path):
    samples = PictureSamples(make_picture_shards(tmp_path, count=6, shard_size=4, corrupt=(0, 3, 4)))
    batch = collate([samples[position] for position in range(6)])
    assert batch["key"] == [f"00000000{n}" for n in (1, 1, 2, 5, 5, 5)]
    assert batch["skipped"] == [f"00000000{n}" for n in (0, 3, 4, 4)]
    assert batch["position"].tolist() == list(range(6)) and batch["label"].tolist() == [1, 1, 2, 2, 2, 2]
    assert batch["x"].shape == (6, 3, 32, 32)


def test_too_many_unreadable_pictures_are_an_error(make_picture_shards, tmp_path):
    with pytest.raises(ValueError, match="all': none of its first .* can be decoded"):
        PictureSamples(make_picture_shards(tmp_path / "all", count=5, corrupt=range(5)))
    samples = PictureSamples(make_picture_shards(tmp_path / "most", count=103, size=8, corrupt=range(1, 102)))
    assert samples[3]["key"] == "000000102"
    with pytest.raises(ValueError, match="100 pictures in a row cannot be decoded, from 000000001"):
        samples[1]


def test_a_lost_shard_is_an_error_and_no_unreadable_picture(make_picture_shards, tmp_path):
    samples = PictureSamples(make_picture_shards(tmp_path, count=4, shard_size=2))
    (tmp_path / "pictures-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="pictures-000000.tar"):
        samples[0]


@pytest.mark.parametrize(("samples", "message"), [
    ([{"png": picture_bytes(0), "txt": "one"}, {"png": picture_bytes(1)}, {"png": picture_bytes(2)}],
     "2 of 3 samples have no caption .* the first is '1'"),
    ([{"txt": "one"}], "holds no pictures .* only: txt"),
    ([{"png": picture_bytes(0)}, {"jpg": picture_bytes(1)}], "1 of 2 samples have no .png picture, the first is '1'"),
])  # fmt: skip
def test_a_set_that_cannot_be_trained_on_is_refused_when_opened(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        PictureSamples(write_set(tmp_path, [{"__key__": str(i), **s} for i, s in enumerate(samples)]), need_captions=True)


def test_a_picture_of_another_size_is_refused(tmp_path):
    samples = PictureSamples(write_set(tmp_path, [{"__key__": f"{s}", "png": picture_bytes(0, s)} for s in (32, 40)]))
    with pytest.raises(ValueError, match=r"picture '40' of .* is \(40, 40\), the first one \(32, 32\)"):
        samples[1]


def jsons(*values: object) -> list[bytes]:
    return [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]


@pytest.mark.parametrize(
    "content", jsons(*({"label": label} for label in (None, "a", True, 1.0, [1], 2**70)), [1], "a", None, b"{", b"\xff")
)
def test_a_label_that_is_none_is_named(tmp_path, content):
    """In one line, also where it is met by a worker."""
    folder = write_set(tmp_path, [{"__key__": f"{n}", "png": picture_bytes(n), "json": c} for n, c in enumerate((b"{}", content))])
    samples = PictureSamples(folder)
    assert samples[0]["label"] == -1
    for workers in (0, 1) if content == b"{" else (0,):
        with pytest.raises(ValueError, match=r"^sample '1' of '.*': (the label in its|its) .json is .*data/make_shards.py") as info:
            list(reader(samples, [[0, 1]], workers))
        assert "\n" not in str(info.value)


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    captions = (b"\xef\xbb\xbfone", "caf\xe9".encode("latin-1"))
    samples = PictureSamples(write_set(tmp_path, [{"__key__": f"{n}", "png": picture_bytes(n), "txt": c} for n, c in enumerate(captions)]))
    assert samples[0]["caption"] == "one"
    with pytest.raises(ValueError, match=r"^sample '1' of '.*': its caption \(.txt\) is not UTF-8"):
        samples[1]


def test_pictures_are_decoded_as_make_shards_decodes_them(tmp_path):
    """16 bits of gray are no white picture, transparency is white, and EXIF turns."""
    gray, clear, turned = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((32, 32), 20000, np.uint16)).save(gray, "png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(clear, "png")
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, :16] = 255
    Image.fromarray(halves).save(turned, "png", exif=exif)
    made = [{"__key__": str(n), "png": each.getvalue()} for n, each in enumerate((clear, turned, gray))]
    samples = PictureSamples(write_set(tmp_path, made))
    assert (samples[0]["x"] == 1).all() and (samples[1]["x"][:, :16] == 1).all() and (samples[1]["x"][:, 16:] == -1).all()
    assert (samples[2]["skipped"], samples[2]["key"]) == (["2"], "0")


@pytest.mark.parametrize(
    ("samples", "extension"), [([("png", "jpg")] * 2, "png"), ([("jpg", "png"), ("jpg",)], "jpg"), ([("bmp",)], "bmp")]
)
def test_of_several_formats_the_one_that_all_have_is_read(tmp_path, samples, extension):
    made = [{"__key__": str(n), **dict.fromkeys(endings, picture_bytes(n))} for n, endings in enumerate(samples)]
    assert PictureSamples(write_set(tmp_path, made)).extension == extension


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_come_back_as_they_were_packed(tmp_path, dtype):
    moments = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(-1, -3)
    packed = [{"__key__": f"{i}", "txt": f"c{i}", "moments.npy": pack_array(m), "prompt_embeds.npy": pack_array(m[0])}
              for i, m in enumerate(moments)]  # fmt: skip
    samples = LatentSamples(write_set(tmp_path, packed, kind="latents", vae_hash="abc"), vae_hash="abc")
    for i, m in enumerate(moments):
        assert samples[i]["moments"].dtype == torch.float32 and torch.equal(samples[i]["moments"], m.float())
        assert torch.equal(samples[i]["prompt_embeds"], m[0].float()) and samples[i]["caption"] == f"c{i}"
    with pytest.raises(ValueError, match=r"another VAE \(hash abc\) than the one configured \(other\)"):
        LatentSamples(tmp_path, vae_hash="other")


def test_latents_need_captions_and_the_right_kind(make_picture_shards, tmp_path):
    with pytest.raises(ValueError, match="holds no latents: encode it first"):
        LatentSamples(make_picture_shards(tmp_path / "pictures", count=2))
    moments = {"__key__": "a", "moments.npy": pack_array(torch.zeros(2, 1, 1))}
    with pytest.raises(ValueError, match="1 of 1 samples have no caption"):
        LatentSamples(write_set(tmp_path / "latents", [moments], kind="latents", vae_hash="abc"))
    with pytest.raises(ValueError, match=r"another VAE \(hash None\)"):  # tars that were indexed, not encoded here
        LatentSamples(write_set(tmp_path / "latents", [{**moments, "txt": ""}], kind="latents"), vae_hash="abc")


def numbers(value) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.full((2, 2, 4), value))
    return buffer.getvalue()


def test_latents_that_do_not_fit_each_other_are_named(tmp_path):
    def latents(name: str, *arrays: bytes, **more: bytes) -> LatentSamples:
        made = [{"__key__": str(n), "txt": "", "moments.npy": array} for n, array in enumerate(arrays)]
        made[0] |= {ending.replace("_npy", ".npy"): array for ending, array in more.items()}
        return LatentSamples(write_set(tmp_path / name, made, kind="latents"))

    array = pack_array(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"latents '1' of .* are \(2, 4, 5\), the first ones \(2, 4, 4\)"):
        latents("shapes", array, pack_array(torch.zeros(2, 4, 5)))[1]
    with pytest.raises(ValueError, match=r"sample '1' of .*: its array .*cannot be read"):
        latents("broken", array, array[:-100])[1]
    for spoilt, message in (
        (numbers(np.float16("nan")), "holds 16 NaN or infinities"),
        (pack_array(torch.full((2, 4, 4), torch.inf).bfloat16()), "holds 32 NaN or infinities"),
        (numbers(1), "is of int64, wanted float16"),
        (numbers("x"), "is of <U1"),
        (b"", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"^sample '1' of .*: its array .moments.npy. .*{message}.*data/make_shards.py"):
            latents("spoilt", array, spoilt)[1]
    with pytest.raises(ValueError, match=r"moments.npy of the first sample is \(4, 4\), wanted \(2 C, h, w\)"):
        latents("flat", pack_array(torch.zeros(4, 4)))
    with pytest.raises(ValueError, match=r"1 of 2 samples have no prompt_embeds.npy, the first is '1'"):
        latents("embeds", array, array, prompt_embeds_npy=array)
    with pytest.raises(ValueError, match=r"1 of 1 samples have no moments.npy, the first is '0'"):
        LatentSamples(write_set(tmp_path / "none", [{"__key__": "0", "txt": "", "npy": array}], kind="latents"))


def test_workers_give_the_same_batches_as_none(make_picture_shards, tmp_path):
    samples = PictureSamples(make_picture_shards(tmp_path, count=10, shard_size=4, corrupt=(2,)), seed=0)

    def batches(workers):
        sampler = StreamSampler(4, 2, 1, 2, start_step=3)
        return list(islice(reader(samples, sampler, workers), 5))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a.pop("x"), b.pop("x")) and torch.equal(a.pop("position"), b.pop("position"))
        assert torch.equal(a.pop("label"), b.pop("label")) and a == b


class Recorder(pl.LightningModule):
    """Trains one number, and notes the positions that it was shown."""

    def __init__(self):
        super().__init__()
        self.weight, self.shown = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.shown.append(batch["position"].tolist())
        return self.weight * batch["x"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, tmp_path, steps: int, data: dict, devices: int = 1, **options) -> Recorder:
    data = DataConfig(str(folder), str(folder), num_workers=0, val_samples=4, **data)
    config = JudgeConfig(data=data, run=RunConfig(str(tmp_path), 0, steps, devices=devices))
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, max_steps=steps, max_epochs=-1, logger=CSVLogger(tmp_path, "", ""), callbacks=[SkippedReport()],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        limit_val_batches=0, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, ShardData(config))
    return module


def skipped(tmp_path) -> list[int]:
    with open(tmp_path / "metrics.csv", newline="") as file:
        return [int(float(row["data/skipped"])) for row in csv.DictReader(file) if row["data/skipped"]]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_skipped_pictures_are_counted_and_reported_each_epoch(make_picture_shards, tmp_path):
    folder = make_picture_shards(tmp_path / "shards", count=12, shard_size=4, corrupt=(1, 5, 6))
    with pytest.warns(UserWarning, match="epoch 0: 3 unreadable pictures were skipped .here: 000000001, 000000005, 000000006"):
        module = fit(folder, tmp_path, steps=6, data={"batch_size": 4, "micro_batch_size": 2}, accumulate_grad_batches=2)
    assert [p for batch in module.shown for p in batch] == list(range(24))
    assert skipped(tmp_path) == [3, 3]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_skipped_pictures_of_one_key_are_counted_each(tmp_path):
    """Tars may repeat keys."""
    folder = tmp_path / "shards"
    folder.mkdir()
    tars = [[{"__key__": str(n), "png": picture_bytes(n) if n else b"no picture", "txt": ""} for n in range(4)] for _ in range(3)]
    write_manifest(folder, [write_shard(folder / f"{n}.tar", samples) for n, samples in enumerate(tars)])
    fit(folder, tmp_path, steps=6, data={"batch_size": 4})
    assert skipped(tmp_path) == [3, 3]


@pytest.mark.slow
def test_processes_that_straddle_the_end_of_an_epoch_report_it_together(make_picture_shards, tmp_path):
    folder = make_picture_shards(tmp_path / "shards", count=12, shard_size=4, corrupt=(1, 5, 6))
    fit(folder, tmp_path, steps=3, data={"batch_size": 8}, devices=2, strategy="ddp_spawn")  # step 1: [8, 12) and [12, 16)
    assert len(skipped(tmp_path)) == 2


def test_a_validation_set_smaller_than_asked_for_is_refused(make_picture_shards, tmp_path):
    folder = str(make_picture_shards(tmp_path, count=6))
    config = JudgeConfig(data=DataConfig(folder, folder, val_samples=7), run=RunConfig("x", 0, 1))
    with pytest.raises(ValueError, match="data.val_samples=7, but .* holds 6 samples"):
        ShardData(config)


def test_a_batch_larger_than_the_set_is_said(make_picture_shards, tmp_path):
    folder = str(make_picture_shards(tmp_path, count=6))
    with pytest.warns(UserWarning, match="data.batch_size=7, but .* holds 6 samples: a step sees some of them more than once"):
        ShardData(JudgeConfig(data=DataConfig(folder, folder, batch_size=7, val_samples=6), run=RunConfig("x", 0, 1)))
