"""What a run will need: counts against networks that are really built, run and trained; and the configs of real scale."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from eqldm.budget import Budget, _diffusion, budget, counting, main, operations, report
from eqldm.config import AutoencoderConfig, load_config
from eqldm.data.shards import write_manifest, write_shard
from eqldm.diffusion.adaptation import build_networks
from eqldm.diffusion.conditioning import TEXT_ENCODER
from eqldm.diffusion.module import train_diffusion
from eqldm.model_folder import config_hash, load_unet, load_vae
from eqldm.training.run_folder import LAST
from eqldm.training.speed import GPUS

ROOT = Path(__file__).parents[1]
SD15 = sorted((ROOT / "configs" / "sd15").glob("*.yaml"))


@pytest.fixture
def tiny(tmp_path, tiny_model_folder, write_tiny_unet_options):
    """`tiny(*overrides)`: options of the tiny model, whose shards are not made yet."""
    path = write_tiny_unet_options(tmp_path / "options.yaml", Path("absent"), tiny_model_folder, num_steps=10)
    return lambda *overrides: load_config(path, ["data.image_size=32", *overrides])


def kept_bytes(unet: torch.nn.Module, count: int) -> int:
    """Bytes that a real forward pass keeps, in float32, weights left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss = unet(torch.randn(count, 4, 8, 8), torch.zeros(count, dtype=torch.long), torch.randn(count, 8, 16)).sample.square().mean()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


def test_counts_are_those_of_the_networks(tiny, tiny_model_folder):
    need, unet = budget(tiny()), load_unet(tiny_model_folder)
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert need.networks["unet"] == (count, count)
    assert need.networks["vae"] == (sum(parameter.numel() for parameter in load_vae(tiny_model_folder).parameters()), 0)
    assert need.networks["text_encoder"][1] == 0
    # under bf16 a picture keeps between half and all of what it keeps in float32
    whole = kept_bytes(unet.train(), 3) - kept_bytes(unet.train(), 2)
    assert 0.5 * whole <= need.activations <= whole
    assert need.casts <= 2 * count + 1e5
    assert need.disk["latents of 1 M pictures"] == 1e6 * 8 * 8 * 8 * 2


@pytest.mark.slow
def test_low_rank_updates_and_checkpointed_gradients(tiny, tiny_model_folder):
    plain, lora, checkpointed = budget(tiny()), budget(tiny("adapt=lora", "lora.rank=2")), budget(tiny("gradient_checkpointing=true"))
    config = tiny("adapt=lora", "lora.rank=2")
    unet = build_networks(config, load_vae(tiny_model_folder), 32, []).unet
    assert lora.networks["unet"] == tuple(sum(p.numel() for p in unet.parameters() if p.requires_grad or every) for every in (True, False))
    assert checkpointed.activations < plain.activations and checkpointed.operations > plain.operations
    assert lora.memory("ddp", 1, 1) < plain.memory("ddp", 1, 1)


def test_memory_by_strategy():
    """Bytes for each trained parameter: 16 in one process, 20 with the EMA, and what ZeRO shards of them."""
    need = Budget(
        {"unet": (1000, 1000), "vae": (10, 0)}, averaged=1000, operations=1, activations=7, casts=2000, encoding=0, disk={}, notes=()
    )
    rest, buckets = 40 + 2000 + 21, 8 * 1000
    assert need.memory("ddp", 8, 3) == need.memory("ddp", 1, 3) == 20 * 1000 + rest
    assert need.memory("zero1", 8, 3) == 4 * 1000 + 4 * 1000 + 16 * 1000 / 8 + buckets + rest
    assert need.memory("zero2", 8, 3) == 4 * 1000 + 20 * 1000 / 8 + buckets + rest
    assert need.memory("zero3", 8, 3) == 4 * 1000 + 20 * 1000 / 8 + buckets + rest  # all of a small network stays gathered
    assert replace(need, averaged=0).memory("ddp", 1, 0) == 16 * 1000 + 40 + 2000
    assert need.memory("zero2", 8, 3) - replace(need, averaged=0).memory("zero2", 8, 3) == 4 * 1000 / 8


def tensor_bytes(tree) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    return sum(map(tensor_bytes, tree.values() if isinstance(tree, dict) else tree)) if isinstance(tree, (dict, list, tuple)) else 0


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_told(tiny, tmp_path, tiny_pictures):
    for name, options in {"full": [], "lora": ["adapt=lora", "lora.rank=2"], "plain": ["optimizer.ema_decay=0"]}.items():
        where = [f"data.train={tiny_pictures}", f"data.val={tiny_pictures}"]
        config = tiny(*where, *options, "run.num_steps=1", f"run.dir={tmp_path / name}")
        train_diffusion(config)
        held = tensor_bytes(torch.load(tmp_path / name / LAST, weights_only=True))
        assert held == pytest.approx(budget(config).disk["a checkpoint"], rel=0.05), name
    need = budget(tiny("run.num_steps=4000", "run.checkpoint_every=500", "run.keep_every=1000"))
    assert need.disk["4 kept, the newest and the one being written"] == 6 * need.disk["a checkpoint"]


def test_shards_tell_the_size(tiny, tiny_pictures):
    assert budget(tiny("data.image_size=null", f"data.train={tiny_pictures}")) == budget(tiny())
    with pytest.raises(FileNotFoundError, match="'absent' holds no shards yet: set data.image_size"):
        budget(tiny("data.image_size=null"))


@pytest.mark.parametrize("reads", ["the autoencoder", "a pixel model"])
def test_latents_are_not_counted_for_what_trains_on_pictures(tiny, tmp_path, reads):
    entry = write_shard(tmp_path / "train-000000.tar", [{"__key__": "0", "moments.npy": b"", "txt": ""}])
    write_manifest(tmp_path, [entry], kind="latents")
    config = AutoencoderConfig() if reads == "the autoencoder" else tiny("vae=pixels")
    config.data.train = str(tmp_path)
    with pytest.raises(ValueError, match="holds no pictures .* Is it a latent folder"):
        budget(config)


def test_a_unet_from_scratch_without_options_is_the_librarys_own(tiny):
    config = replace(tiny("train_text_encoder=true"), init="scratch", model=None)
    config.validate()
    with torch.device("meta"):
        networks, _, _ = _diffusion(config, 32, notes := [])
        own = UNet2DConditionModel(sample_size=8, cross_attention_dim=TEXT_ENCODER["hidden_size"])
    assert config_hash(networks["unet"].config) == config_hash(own.config) and not any("Stable Diffusion" in note for note in notes)


def test_the_judge_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["budget", str(ROOT / "configs" / "glyphs" / "judge.yaml")])
    with pytest.raises(SystemExit, match="^error: config '.*judge.yaml': stage is 'judge', .* wanted autoencoder or diffusion$"):
        main()


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem != "vae_d4")) for path in SD15])
def test_configs_of_real_scale(path):
    """Full-size networks, in seconds; the header's hours and pictures are the report's."""
    config = load_config(path)
    need = budget(config)
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    unet = need.networks.get("unet")
    assert need.networks["vae"][0] == 83_653_863  # Stable Diffusion 1.5's
    assert unet is None or unet[0] - (unet[1] if config.adapt == "lora" else 0) == 859_520_964
    pictures = config.run.num_steps * config.data.batch_size
    assert int(re.search(r"pictures\s+(\d+) M", header)[1]) == pytest.approx(pictures / 1e6, rel=0.06)
    hours, count = map(int, re.search(r"(\d+) hours on (\d+) A100", header).groups())
    assert count == config.run.devices
    assert operations(config) == need.operations  # none of them checkpoints gradients
    lines = report(config, need)
    row = next(line for line in lines if line.startswith("| A100"))
    assert float(row.split("|")[2 if count == 1 else 3].split()[0]) == pytest.approx(hours, rel=0.06)
    assert need.memory("ddp", count, config.data.micro_batch_size) < 0.9 * GPUS["A100"][0] * 1e9
    if path.stem != "eqvae_paper":  # vae_d4's tables are nearly its own
        page = (ROOT / "docs" / "cluster.md").read_text()
        documented = page.split(f"`python -m eqldm.budget configs/sd15/{path.name}`:\n\n")[1].splitlines()[: len(lines)]
        assert_reads_alike("\n".join(lines), "\n".join(documented))


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def assert_reads_alike(found: str, documented: str) -> None:
    """The same words, and numbers that differ by at most 3 % or one in their last digit: torch versions count a little differently."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", documented), "put the report's new tables into docs/cluster.md"
    for new, old in zip(NUMBER.findall(found), NUMBER.findall(documented)):
        last = 10.0 ** -len(old.partition(".")[2])
        assert float(new) == pytest.approx(float(old), rel=0.03, abs=1.01 * last), f"docs/cluster.md says {old} where the report says {new}"


@pytest.mark.parametrize("fake", [False, True])
def test_attention_is_counted(fake):
    """softmax(q kᵀ) v is two products of matrices; its backward pass, which forms the scores again, five."""
    batch, heads, queries, keys, width = 2, 3, 16, 24, 8
    with FakeTensorMode() if fake else nullcontext():
        q, k, v = (torch.randn(batch, heads, n, width, requires_grad=True) for n in (queries, keys, keys))
        with counting() as counter:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        forward = 4 * batch * heads * queries * keys * width
        assert counter.get_total_flops() == forward
        with counting() as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2.5 * forward


def test_attention_without_a_formula_is_refused(monkeypatch):
    """It would count as nothing, and hours and `train/mfu` would come out too low without a word."""
    counter = partial(FlopCounterMode, display=False)
    monkeypatch.setattr("eqldm.budget.FlopCounterMode", lambda custom_mapping, **_: counter())
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setitem(flop_registry, attention, None)
    monkeypatch.delitem(flop_registry, attention)  # newer torch knows it
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention_for_cpu.* are not known to this torch"):
        with counting():
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
