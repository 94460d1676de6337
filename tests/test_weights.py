"""Files from others are opened without running what they hold: a pickle that would write a file, given to every place that loads one."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from eqldm.autoencoder.losses import load_lpips
from eqldm.data.samples import LatentSamples, pack_array
from eqldm.data.shards import INDEX, ShardSet, write_index, write_manifest, write_shard
from eqldm.evaluation.clip import Clip
from eqldm.evaluation.compare import Measured
from eqldm.evaluation.features import inception_features, timm_features
from eqldm.evaluation.judge import SHIPPED, Judge
from eqldm.model_folder import Networks, load_scheduler, load_text, load_unet, load_vae
from eqldm.single_file import read_single_file
from eqldm.training.callbacks import AtomicCheckpointIO
from eqldm.training.run_folder import checkpoint_step
from eqldm.training.zero import check_checkpoint
from eqldm.weights import read_json, read_weights

ROOT = Path(__file__).parents[1]


class Writes:
    """Pickled, it writes a file where it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.write_text, (self.mark, "run"))


def bare(path: Path, mark: Path) -> Path:
    """A pickle as Python writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Writes(mark)))
    return path


def saved(path: Path, mark: Path) -> Path:
    """A pickle as torch.save writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": Writes(mark)}, path)
    return path


def legacy(path: Path, mark: Path) -> Path:
    """A pickle as torch.save wrote it before 1.6."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": Writes(mark)}, path, _use_new_zipfile_serialization=False)
    return path


PICKLES = (bare, saved, legacy)


@pytest.fixture
def copied(tmp_path, tiny_model_folder) -> Callable[[], Path]:
    """A model folder to be spoilt."""
    return lambda: shutil.copytree(tiny_model_folder, tmp_path / "model")


def code(folder: Path, mark: Path) -> None:
    """Python beside the weights, as `auto_map` would name it."""
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').write('run')\nclass Evil: pass\n")


def settings(path: Path, **changes) -> Path:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """torch's hub folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", pytest.fail)
    return tmp_path / "torch" / "hub" / "checkpoints"


FILES = {  # a loader of one file, and the name that the file has
    "weights": ("weights.pth", read_weights),
    "single file .ckpt": ("vae.ckpt", read_single_file),
    "single file .pt": ("vae.pt", load_vae),
    "single file .safetensors": ("vae.safetensors", load_vae),
    "inception": ("inception.pth", inception_features),
    "timm": ("backbone.pth", lambda path: timm_features("resnet10t", path)),
    "timm .safetensors": ("backbone.safetensors", lambda path: timm_features("resnet10t", path)),
    "checkpoint": ("last.ckpt", AtomicCheckpointIO().load_checkpoint),
    "a checkpoint's step": ("last.ckpt", checkpoint_step),
    "ZeRO's checkpoint": ("checkpoint/mp_rank_00_model_states.pt", lambda path: check_checkpoint(path.parents[1])),
    "compared results": ("resampled.safetensors", lambda path: Measured.open(path.parent)),
}


def refused(load: Callable, mark: Path, named: str) -> None:
    """Nothing was run, and one line names the file (or its folder)."""
    with pytest.raises((ValueError, OSError)) as caught:
        load()
    assert not mark.exists(), "the file was run"
    assert named in str(caught.value) and "\n" not in str(caught.value).strip(), str(caught.value)


@pytest.mark.parametrize("make", PICKLES)
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_not_run(name, make, tmp_path):
    file, load = FILES[name]
    mark, path = tmp_path / "mark", make(tmp_path / "theirs" / file, tmp_path / "mark")
    for beside in ("metrics.json", "about.json"):
        (path.parent / beside).write_text("{}")
    refused(lambda: load(path), mark, str(path))


@pytest.mark.parametrize("make", PICKLES)
def test_lpips_weights_are_not_run(make, tmp_path, hub):
    """torchvision would open them with Python's pickle."""
    path = make(hub / "vgg16-397923af.pth", tmp_path / "mark")
    refused(load_lpips, tmp_path / "mark", str(path))


NETWORKS = {
    "vae": ("diffusion_pytorch_model", load_vae),
    "unet": ("diffusion_pytorch_model", load_unet),
    "text_encoder": ("pytorch_model", load_text),
}


@pytest.mark.parametrize("make", PICKLES)
@pytest.mark.parametrize("part", NETWORKS)
def test_a_model_folder_is_not_run(part, make, tmp_path, copied):
    """Pickled weights in place of safetensors, under that name, and as a shard of them."""
    stem, load = NETWORKS[part]
    mark, folder = tmp_path / "mark", copied()
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    make(folder / part / f"{stem}.bin", mark)
    refused(lambda: load(folder), mark, str(folder / part))
    make(weights, mark)
    refused(lambda: load(folder), mark, str(folder / part))
    weights.unlink()
    index = {"metadata": {}, "weight_map": {"conv_in.weight": f"{stem}.bin"}}
    settings(folder / part / f"{weights.name}.index.json", **index)
    refused(lambda: load(folder), mark, str(folder / part))


SETTINGS = {
    "vae": ("config.json", load_vae),
    "unet": ("config.json", load_unet),
    "text_encoder": ("config.json", load_text),
    "tokenizer": ("tokenizer_config.json", load_text),
}
AUTO = {"auto_map": {name: "evil.Evil" for name in ("AutoModel", "AutoConfig")} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}


@pytest.mark.parametrize("part", SETTINGS)
def test_settings_name_no_code(part, tmp_path, copied):
    name, load = SETTINGS[part]
    mark, folder = tmp_path / "mark", copied()
    path, before = folder / part / name, (folder / part / name).read_text()
    code(path.parent, mark)
    for foreign in (AUTO, {"attn_implementation": "some/kernel"}, {"quantization_config": {"quant_method": "bitsandbytes"}}):
        path.write_text(before)
        settings(path, **foreign)
        refused(lambda: load(folder), mark, str(path))
    path.write_text(before)
    adapter = settings(path.parent / "adapter_config.json", base_model_name_or_path="some/model")
    refused(lambda: load(folder), mark, str(adapter))


def test_a_pipeline_of_its_own_is_not_run(tmp_path, copied):
    mark, folder = tmp_path / "mark", copied()
    code(folder, mark)
    settings(folder / "model_index.json", _class_name=["evil", "Evil"], unet=["evil", "Evil"], vae=["evil", "Evil"])
    Networks.open(folder), load_vae(folder)
    assert not mark.exists()
    for name in ("evil.Evil", "__version__", "StableDiffusionPipeline", ["evil", "Evil"], None, 3):
        settings(folder / "scheduler" / "scheduler_config.json", _class_name=name)
        refused(lambda: load_scheduler(folder), mark, "is no diffusers scheduler")


@pytest.mark.parametrize("make", PICKLES)
def test_clip_is_not_run(make, tmp_path, tiny_model_folder):
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    folder, mark = tmp_path / "clip", tmp_path / "mark"
    CLIPModel(CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 8, "patch_size": 8})).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    for path in (tiny_model_folder / "tokenizer").iterdir():
        shutil.copy(path, folder)
    before = (folder / "tokenizer_config.json").read_text()
    code(folder, mark)
    refused(lambda: Clip(folder) and Clip(settings(folder / "tokenizer_config.json", **AUTO).parent), mark, str(folder))
    (folder / "tokenizer_config.json").write_text(before)
    Clip(folder)
    make(folder / "model.safetensors", mark)
    refused(lambda: Clip(folder), mark, str(folder))
    (folder / "model.safetensors").unlink()
    make(folder / "pytorch_model.bin", mark)
    refused(lambda: Clip(folder), mark, str(folder))


@pytest.mark.parametrize("make", PICKLES)
def test_a_judge_is_not_run(make, tmp_path):
    folder, mark = shutil.copytree(SHIPPED, tmp_path / "judge"), tmp_path / "mark"
    make(folder / "model.safetensors", mark)
    refused(lambda: Judge.open(folder), mark, str(folder))


@pytest.mark.parametrize("foreign", [
    {"checkpoint_path": "{evil}"}, {"pretrained": True}, {"pretrained_cfg": {"file": "{evil}"}},
    {"pretrained_cfg_overlay": {"file": "{evil}"}}, {"cache_dir": "/"}, {"pretrained_strict": False}, {"features_only": True},
    {"num_classes": 5}, {"channels": "many"}, {"channels": []},
    {"channels": [10**9] * 4}, {"channels": [True]}, {"drop_rate": float("nan")}, {"block": "BasicBlock"}, {"depths": [1]},
])  # fmt: skip
def test_a_judge_gives_timm_sizes_alone(foreign, tmp_path):
    folder, mark = shutil.copytree(SHIPPED, tmp_path / "judge"), tmp_path / "mark"
    evil = saved(tmp_path / "evil.pth", mark)
    args = json.loads(json.dumps(foreign).replace("{evil}", str(evil)))
    settings(folder / "config.json", args={"channels": [32, 64, 96, 128], **args})
    refused(lambda: Judge.open(folder), mark, f"{folder / 'config.json'}': architecture_args")


@pytest.mark.parametrize("changes", [
    *({"architecture": name} for name in ("hf-hub:some/model", "local-dir:{here}", "hf_hub:some/model", "resnet19", "", None, [])),
    *({"image_size": size} for size in (0, -1, 10**9, 1.5, "64", None, True)), {"args": [1]}, {"args": None},
])  # fmt: skip
def test_a_judge_is_of_timms_own_architectures(changes, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "judge")
    changes = json.loads(json.dumps(changes).replace("{here}", str(folder)))
    settings(folder / "config.json", **changes)
    refused(lambda: Judge.open(folder), tmp_path / "mark", str(folder / "config.json"))


def test_a_judges_weights_fit_its_config(tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "judge")
    settings(folder / "config.json", architecture="resnet34")
    refused(lambda: Judge.open(folder), tmp_path / "mark", "are not those of its config.json")
    settings(folder / "config.json", architecture="resnet18", args={"channels": [32, 64, 96, 64]})
    refused(lambda: Judge.open(folder), tmp_path / "mark", "are not those of its config.json")


def object_array(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Writes(mark)], object), allow_pickle=True)
    return buffer.getvalue()


@pytest.fixture
def latents(tmp_path) -> Callable[..., Path]:
    """`latents(name=bytes)`: a folder of one latent, with those files in place of its own."""

    def make(**files: bytes) -> Path:
        folder = tmp_path / "latents"
        folder.mkdir(exist_ok=True)
        sample = {
            "__key__": "a",
            "moments.npy": pack_array(torch.zeros(8, 2, 2)),
            "prompt_embeds.npy": pack_array(torch.zeros(2, 2)),
            "txt": "a",
        }
        entry = write_shard(folder / "latents-000000.tar", [{**sample, **{f"{name}.npy": value for name, value in files.items()}}])
        write_manifest(folder, [entry], kind="latents", vae_hash="x", text_hash="y")
        return folder

    return make


@pytest.mark.parametrize("name", ["moments", "prompt_embeds"])
def test_arrays_of_shards_are_not_run(name, tmp_path, latents):
    mark = tmp_path / "mark"
    folder = latents(**{name: object_array(mark)})
    refused(lambda: LatentSamples(folder)[0], mark, f"{name}.npy")
    folder = latents(**{name: pickle.dumps(Writes(mark))})
    refused(lambda: LatentSamples(folder)[0], mark, f"{name}.npy")


def test_the_index_of_shards_is_not_run(tmp_path, latents):
    mark, folder = tmp_path / "mark", latents()
    manifest = json.loads((folder / "manifest.json").read_text())
    write_index(folder, manifest["shards"])
    for path in sorted((folder / INDEX).rglob("*.npy")):
        before = path.read_bytes()
        path.write_bytes(object_array(mark))
        refused(lambda: ShardSet.open(folder), mark, str(path))
        path.write_bytes(before)
    ShardSet.open(folder)


def test_files_that_are_cut_off_are_named(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(100)}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        load = partial(read_weights, tmp_path / name)
        assert read_weights(tmp_path / name)["a"].shape == (100,)
        content = (tmp_path / name).read_bytes()
        for length in (0, 5, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:length])
            refused(load, tmp_path / "mark", name)
    for text in ("", "{", "[1]", "null", '"a"', "\x00", "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        refused(lambda: read_json(tmp_path / "a.json"), tmp_path / "mark", "a.json")


UNSAFE = {"torch.load", "pickle.load", "pickle.loads", "torch.jit.load", "torch.hub.load", "joblib.load", "yaml.load", "yaml.unsafe_load"}


def test_pickles_are_opened_in_one_place():
    """Whatever else loads a file goes through `eqldm.weights`, or is in the tests above."""
    for path in [*(ROOT / "eqldm").rglob("*.py"), *(ROOT / "data").glob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNSAFE or path.name == "weights.py", f"{path}:{node.lineno} opens pickles"
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno} runs code"
                assert given.get("allow_pickle", "False") == "False" and (
                    given.get("weights_only", "True") in ("True", "weights_only")
                    or ast.unparse(node.func).endswith(".dump_checkpoint")  # which writes, and writes no more than weights without it
                )
                if ast.unparse(node.func).endswith("from_pretrained"):
                    assert given.get("local_files_only") == "True", f"{path}:{node.lineno} may go to the network"
