"""Shards from a folder of pictures: captions, crops, what is skipped, and manifests for tars of other origin."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from eqldm.data.shards import MANIFEST, ShardSet, read_manifest, write_shard

make_shards_script = importlib.import_module("make_shards")
make_shards, index_folder, main = (getattr(make_shards_script, name) for name in ("make_shards", "index_folder", "main"))


def picture(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pictures with side-car captions, two of them in a subfolder."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for number in range(7):
        name = root / ("more" if number >= 5 else ".") / f"{number}.png"
        picture(seed=number).save(name)
        name.with_suffix(".txt").write_text(f"picture {number}\n")
    return root


def read(out: Path, number: int, extension: str = "png") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(ShardSet.open(out).read(number, extension))))


def test_side_cars_and_stock_webdataset(folder, tmp_path):
    manifest = make_shards(folder, tmp_path / "out", 32, format="png", shard_size=3)
    assert manifest["kind"] == "pictures" and manifest["image_size"] == 32
    assert [entry["count"] for entry in manifest["shards"]] == [3, 3, 1] and manifest["skipped"] == []
    urls = [str(tmp_path / "out" / entry["name"]) for entry in manifest["shards"]]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    assert [caption for _, caption, _ in samples] == [f"picture {number}" for number in range(7)]
    assert [about["file"] for _, _, about in samples][4:] == ["4.png", "more/5.png", "more/6.png"]
    for number, (shown, _, _) in enumerate(samples):  # already 32 px high: the centre crop is the picture's own pixels
        assert np.array_equal(np.asarray(shown), np.asarray(picture(seed=number))[:, 4:36])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tmp_path, kind):
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        picture().save(root / "sub" / name)
    if kind == "jsonl":
        rows = [{"file_name": "a.png", "text": "an a"}, {"file_name": "b.jpg", "text": "a \u00e9"}, {"file_name": "gone.png", "text": "x"}]
        content = "\n".join(map(json.dumps, rows)) + "\n\n"
    else:
        content = 'file_name,caption\na.png,an a\nb.jpg,"a \u00e9"\ngone.png,x\n'
    (root / "sub" / f"metadata.{kind}").write_text(content, encoding="utf-8")
    manifest = make_shards(root, tmp_path / "out", 16)
    samples = ShardSet.open(tmp_path / "out")
    assert [samples.read(number, "txt").decode() for number in range(2)] == ["an a", "a \u00e9"]
    assert manifest["skipped"] == [{"file": "sub/gone.png", "reason": f"named in sub/metadata.{kind}, but not there"}]
    (root / "sub" / "a.txt").write_text("something else")
    with pytest.raises(ValueError, match=r"'sub/a.png' has two captions"):
        make_shards(root, tmp_path / "out2", 16)


def test_metadata_errors(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file,text\na.png,x\n")
    with pytest.raises(ValueError, match=r"columns \['file', 'text'\], wanted 'file_name'"):
        make_shards(tmp_path, tmp_path / "out", 16)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{oops\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        make_shards(tmp_path, tmp_path / "out", 16)


def test_bytes_do_not_depend_on_workers(folder, tmp_path):
    picture().save(folder / "several.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "several.png", "text": list("abcdefgh")}))
    for workers in (1, 2):
        make_shards(folder, tmp_path / str(workers), 16, crop="random", shard_size=2, workers=workers)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).rglob("*") if path.is_file()} for n in "12")
    assert one == two and len(one) == 4 + 1 + 6  # tars, manifest, index


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_formats(folder, tmp_path, format):
    make_shards(folder, tmp_path / "out", 16, format=format)
    content = ShardSet.open(tmp_path / "out").read(0, format)
    opened = Image.open(io.BytesIO(content))
    assert opened.size == (16, 16) and opened.format == {"jpg": "JPEG"}.get(format, format.upper())
    assert b"Exif" not in content


def test_random_crops_depend_on_seed_and_name_only(folder, tmp_path):
    def lefts(out: str, seed: int) -> dict[str, int]:
        make_shards(folder, tmp_path / out, 32, crop="random", seed=seed, format="png")
        samples = ShardSet.open(tmp_path / out)
        abouts = [json.loads(samples.read(number, "json")) for number in range(len(samples))]
        return {about["file"]: about["crop_left"] for about in abouts}

    first, other = lefts("first", 0), lefts("other", 1)
    assert first != other and len(set(first.values())) > 1 and max(first.values()) <= 8
    (folder / "1.png").unlink()
    assert lefts("fewer", 0) == {name: left for name, left in first.items() if name != "1.png"}


def test_corrupt_and_small_pictures_are_skipped_and_listed(folder, tmp_path, capsys):
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "1.png").write_bytes(b"no picture")
    picture(100, 15).save(folder / "2.png")
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(folder / "3.png")
    manifest = make_shards(folder, tmp_path / "out", 16, shard_size=2)
    reasons = {item["file"]: item["reason"] for item in manifest["skipped"]}
    assert list(reasons) == ["0.png", "1.png", "2.png", "3.png"] and manifest["count"] == 3
    assert reasons["0.png"].startswith("corrupt") and reasons["1.png"].startswith("corrupt")
    assert str(folder) not in json.dumps(manifest)
    assert reasons["2.png"] == "too small: 100x15, wanted at least 16x16 (or --upscale)"
    assert "more than 8 bits" in reasons["3.png"]
    assert "skipped: {'corrupt': 2, 'too small': 1" in capsys.readouterr().err
    assert len(ShardSet.open(tmp_path / "out")) == 3 and not (tmp_path / "out" / "pictures-000000.tar").exists()
    assert make_shards(folder, tmp_path / "up", 16, upscale=True)["count"] == 4


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="none of the pictures of"):
        make_shards(tmp_path, tmp_path / "out", 16)


def test_missing_captions(folder, tmp_path):
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"2 of 7 pictures .* no caption: 3.png, 4.png. .*--allow-missing-captions"):
        make_shards(folder, tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()
    manifest = make_shards(folder, tmp_path / "out", 16, allow_missing_captions=True)
    assert manifest["count"] == 7 and sum(entry["without_caption"] for entry in manifest["shards"]) == 2
    assert ShardSet.open(tmp_path / "out").read(3, "txt") == b""


def test_orientation_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise to be shown upright
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32] = 255  # white on the left in the file: on top when shown
    Image.fromarray(halves).save(tmp_path / "a.png", exif=exif)
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[:32] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "b.png")
    make_shards(tmp_path, tmp_path / "out", 64, format="png", allow_missing_captions=True)
    turned, flat = read(tmp_path / "out", 0), read(tmp_path / "out", 1)
    assert (turned[:32] == 255).all() and (turned[32:] == 0).all()
    assert (flat[:32] == (255, 0, 0)).all() and (flat[32:] == 255).all()


def test_second_run_does_nothing_unless_the_pictures_changed(folder, tmp_path):
    make_shards(folder, tmp_path / "out", 16)
    before = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    make_shards(folder, tmp_path / "out", 16)
    assert before == (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(ValueError, match="other options: source_sha256"):
        make_shards(folder, tmp_path / "out", 16)
    make_shards(folder, tmp_path / "out", 16, overwrite=True)
    assert ShardSet.open(tmp_path / "out").read(0, "txt") == b"another caption"


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    picture(width, height).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path) -> Path:
    """Two tars as img2dataset writes them: pictures of any size, `.json` of all, also of what could not be fetched."""
    root = tmp_path / "laion"
    root.mkdir()
    samples = [
        {"__key__": "000000000", "jpg": jpeg(40, 32), "txt": "a caption", "json": {"caption": "not this one"}},
        {"__key__": "000000001", "json": {"caption": "gone", "status": "failed_to_download"}},
        {"__key__": "000000002", "webp": jpeg(32, 32), "json": {"caption": "of the json"}},
        {"__key__": "000000003", "jpg": jpeg(100, 32), "txt": "a panorama"},
        {"__key__": "000000004", "jpg": jpeg(40, 8), "txt": "a ribbon"},
        {"__key__": "000000005", "jpg": b"no picture", "txt": "broken"},
        {"__key__": "000000006", "jpg": jpeg(32, 40), "json": {"caption": None}},
    ]
    for number, part in enumerate((samples[:4], samples[4:])):
        write_shard(root / f"{number:05d}.tar", part)
    return root


def test_tars_of_pictures_of_any_size(tars, tmp_path):
    arguments = ["--tars", str(tars), "--out", str(tmp_path / "out"), "--size", "16", "--max-aspect", "2.5", "--workers", "2"]
    assert main(arguments) == 0
    manifest, shards = read_manifest(tmp_path / "out"), ShardSet.open(tmp_path / "out")
    assert [shards.read(number, "txt") for number in range(len(shards))] == [b"a caption", b"of the json"]
    assert shards.keys.tolist() == ["000000000", "000000002"] and read(tmp_path / "out", 1, "jpg").shape == (16, 16, 3)
    reasons = {item["file"]: item["reason"].split(":")[0] for item in manifest["skipped"]}
    assert reasons == {
        "00000.tar/000000001": "no picture",
        "00000.tar/000000003": "too long",
        "00001.tar/000000004": "too long",
        "00001.tar/000000005": "corrupt",
        "00001.tar/000000006": "no caption (or --allow-missing-captions)",
    }
    assert main([*arguments, "--overwrite", "--allow-missing-captions"]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest["count"] == 3 and sum(entry["without_caption"] for entry in manifest["shards"]) == 1


def test_a_broken_tar_is_named(tars, tmp_path, capsys):
    path = tars / "00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    assert main(["--tars", str(tars), "--out", str(tmp_path / "out"), "--size", "16"]) == 2
    assert "00001.tar' is truncated" in capsys.readouterr().err


def test_a_data_set_of_hugging_face(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    pictures = [picture(40, 32, seed=n) for n in range(3)] + [None]
    columns = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, "text": ["one", " ", "three", "four"]}, features=columns)
    rows.save_to_disk(tmp_path / "rows")
    common = ["--out", str(tmp_path / "out"), "--size", "32", "--format", "png", "--shard-size", "2"]
    assert main(["--dataset", str(tmp_path / "rows"), *common, "--workers", "2"]) == 0
    shards, manifest = ShardSet.open(tmp_path / "out"), read_manifest(tmp_path / "out")
    assert [shards.read(number, "txt") for number in range(len(shards))] == [b"one", b"three"]
    assert np.array_equal(read(tmp_path / "out", 1), np.asarray(pictures[2])[:, 4:36])
    assert {item["file"]: item["reason"].split(" (")[0] for item in manifest["skipped"]} == {"row 1": "no caption", "row 3": "no picture"}
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    other = [*common[:1], str(tmp_path / "other"), *common[2:]]
    for words, message in [
        (["splits"], "holds the splits train: give one, such as"),
        (["rows", "--text-column", "caption"], "no column 'caption', only image, text: give --text-column"),
        (["absent"], "absent"),
    ]:
        assert main(["--dataset", str(tmp_path / words[0]), *words[1:], *other]) == 2
        assert message in capsys.readouterr().err


def test_index(tmp_path):
    entry = write_shard(tmp_path / "a.tar", [{"__key__": f"{n}", "jpg": jpeg(24, 24), "txt": "x"} for n in range(3)])
    with tarfile.open(tmp_path / "b.tar", "w") as tar:  # as `tar -cf` names things: a leading folder, dots in it
        for name, content in (("./v1.0/7.jpg", jpeg(24, 24)), ("./v1.0/7.txt", b"seven"), ("./v1.0/8.jpg", jpeg(24, 24))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    manifest = index_folder(tmp_path)
    assert manifest["kind"] == "pictures" and manifest["image_size"] == 24 and manifest["count"] == 5
    assert manifest["shards"][0] == entry
    assert manifest["shards"][1]["sha256"] == hashlib.sha256((tmp_path / "b.tar").read_bytes()).hexdigest()
    samples = ShardSet.open(tmp_path)
    assert samples.read(3, "txt") == b"seven" and samples.has("txt").tolist() == [True] * 4 + [False]
    with pytest.raises(ValueError, match="has a manifest.json already"):
        index_folder(tmp_path)
    assert index_folder(tmp_path, overwrite=True) == read_manifest(tmp_path)


def test_index_tells_kinds(tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "0", "npy": np.zeros(3)}])
    manifest = index_folder(tmp_path)
    assert manifest["kind"] == "latents" and "image_size" not in manifest
    write_shard(tmp_path / "b.tar", [{"__key__": "0", "jpg": jpeg(8, 8)}])
    with pytest.raises(ValueError, match="must hold one kind"):
        index_folder(tmp_path, overwrite=True)
    (tmp_path / "b.tar").unlink()
    write_shard(tmp_path / "b.tar", [{"__key__": "0", "flac": b""}])
    with pytest.raises(ValueError, match=r"neither pictures nor latents.*\['flac'\]"):
        index_folder(tmp_path, overwrite=True)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="b.tar"):
        index_folder(tmp_path, overwrite=True)


def test_errors_are_one_line_with_exit_code_2(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    common = ["--out", str(tmp_path / "out"), "--size", "16"]
    for arguments, message in [
        (["--pictures", str(tmp_path / "empty"), *common], "holds no pictures"),
        (["--pictures", str(tmp_path / "absent"), *common], "is not a folder"),
        (["--pictures", str(folder), *common, "--format", "png", "--quality", "80"], "png has no quality"),
        (["--index", str(tmp_path / "empty")], "holds no tars"),
        (["--tars", str(tmp_path / "empty"), *common], "holds no tars"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert not (tmp_path / "out").exists()
    assert main(["--pictures", str(folder), *common]) == 0 and read_manifest(tmp_path / "out")["count"] == 7


@pytest.mark.parametrize(("words", "message"), [
    (["--index", "x", "--size", "64"], "--size is no option of --index"),
    (["--index", "x", "--pictures", "y"], "--pictures is no option of --index"),
    (["--index", "x", "--workers", "0"], "--workers: got 0, wanted at least 1"),
    (["--pictures", "x", "--out", "y", "--quality", "0"], "--quality: got 0, wanted at least 1, up to 100"),
    (["--pictures", "x", "--out", "y", "--size", "0"], "--size: got 0, wanted at least 1"),
    (["--pictures", "x", "--out", "y", "--max-aspect", "0.5"], "--max-aspect: got 0.5, wanted at least 1"),
    (["--pictures", "x", "--out", "y", "--quick"], "--quick is no option of --pictures"),
    (["--pictures", "x", "--out", "y", "--text-column", "z"], "--text-column is no option of --pictures"),
    (["--tars", "x", "--out", "y", "--shard-size", "7"], "--shard-size is no option of --tars"),
])  # fmt: skip
def test_an_option_that_nothing_would_read_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err
