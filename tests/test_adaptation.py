"""What stage 2 starts from and trains: pretrained networks, low-rank updates and their merging, the text encoder."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from eqldm.config import DiffusionConfig, LoRAConfig
from eqldm.diffusion.adaptation import build_networks, merge_lora, save_lora
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import Networks, load_vae

SMALL_UNET = {
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "block_out_channels": [8],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
CAPTIONS = ["the letter a"]


def build(folder, image_size: int = 32, **options) -> Networks:
    options = {"init": "pretrained", "model": str(folder), "vae": str(folder), **options}
    return build_networks(DiffusionConfig(**options), load_vae(folder), image_size, CAPTIONS)


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 900]), torch.randn(2, 8, 16, generator=generator)


def trainable(network: torch.nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def test_pretrained_is_what_the_folder_holds(tiny_model_folder):
    networks = build(tiny_model_folder)
    stored = UNet2DConditionModel.from_pretrained(tiny_model_folder, subfolder="unet")
    assert all(torch.equal(a, b) for a, b in zip(networks.unet.state_dict().values(), stored.state_dict().values(), strict=True))
    with torch.no_grad():  # the attention of the CPU is another one than diffusers' default
        torch.testing.assert_close(networks.unet(*inputs()).sample, stored(*inputs()).sample)
    assert networks.scheduler.config.beta_end == 0.012
    assert len(trainable(networks.unet)) == len(list(networks.unet.parameters()))


def test_channels_must_fit(tmp_path, make_tiny_vae, make_model_folder):
    folder = make_model_folder(tmp_path / "model")
    vae = make_tiny_vae(latent_channels=8)
    with pytest.raises(ValueError, match="takes 4 latent channels, the VAE of 'other' gives 8.*init=scratch"):
        build_networks(DiffusionConfig(init="pretrained", model=str(folder), vae="other"), vae, 32, CAPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 32}, "reads prompts of 32 numbers a token, and its text encoder gives 16"),
        (
            {"out_channels": 8},
            r"another family than Stable Diffusion 1.x and 2.x: unet: latents of \[4, 8, 8\] come back as \[8, 8, 8\]",
        ),
        ({"num_class_embeds": 3}, "of another family than .*class_labels should be provided"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40},
            "of another family than Stable Diffusion 1.x and 2.x",
        ),
    ],
)
def test_a_unet_of_another_family_is_told_before_the_first_step(tmp_path, make_model_folder, changes, message):
    model = make_model_folder(tmp_path / "m")
    old = UNet2DConditionModel.load_config(model / "unet")
    kept = {name: value for name, value in old.items() if not name.startswith("_")}
    UNet2DConditionModel(**{**kept, **changes}).save_pretrained(model / "unet")
    with pytest.raises(ValueError, match=message):
        build(model)


def test_scratch_fits_the_vae_and_the_seed(tiny_model_folder):
    options = {"init": "scratch", "model": None, "unet": SMALL_UNET, "text_encoder": {"hidden_size": 12}, "train_text_encoder": True}
    networks, again = (build(tiny_model_folder, image_size=48, **options) for _ in range(2))
    assert type(networks.scheduler) is DDIMScheduler
    config = networks.unet.config
    assert (config.sample_size, config.in_channels, config.out_channels, config.cross_attention_dim) == (12, 4, 4, 12)
    assert networks.tokenizer.model_max_length == 5
    for name in ("unet", "text_encoder"):
        pairs = zip(getattr(networks, name).parameters(), getattr(again, name).parameters())
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("changes", [{}, {"unet": SMALL_UNET, "scheduler": {"prediction_type": "v_prediction"}}])
def test_a_scratch_unet_meets_the_models_text_encoder(tiny_model_folder, changes):
    networks, stored = build(tiny_model_folder, init="scratch_unet", **changes), Networks.open(tiny_model_folder)
    for one, other in zip(networks.text_encoder.parameters(), stored.text_encoder.parameters(), strict=True):
        assert torch.equal(one, other)
    assert networks.tokenizer.get_vocab() == stored.tokenizer.get_vocab()
    assert list(networks.unet.config.block_out_channels) == ([8] if changes else list(stored.unet.config.block_out_channels))
    assert Objective.of(networks.scheduler).prediction == ("v_prediction" if changes else "epsilon")
    z, t, embeds = inputs()
    assert torch.equal(networks.unet(z, t, embeds).sample, networks.unet(z, t, embeds.flip(0)).sample)  # it starts unconditional
    assert not torch.equal(networks.unet(z, t, embeds).sample, stored.unet(z, t, embeds).sample)


def test_sizes_that_follow_are_not_given(tiny_model_folder):
    with pytest.raises(ValueError, match="unet.cross_attention_dim follows from the latents and the text encoder: drop it"):
        build(tiny_model_folder, init="scratch_unet", unet={**SMALL_UNET, "cross_attention_dim": 16})


@pytest.mark.parametrize("trained", [False, True])
def test_text_encoder_is_frozen_or_trained(tiny_model_folder, trained):
    networks = build(tiny_model_folder, train_text_encoder=trained)
    assert bool(trainable(networks.text_encoder)) is trained


def test_only_lora_weights_train(tiny_model_folder):
    networks = build(tiny_model_folder, adapt="lora", lora=LoRAConfig(rank=2, alpha=4))
    names = trainable(networks.unet)
    assert names and all("lora_" in name for name in names)
    targets = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert targets == {"to_q", "to_k", "to_v", "0", "conv1", "conv2", "conv_in", "conv_out"}
    plain = UNet2DConditionModel.from_pretrained(tiny_model_folder, subfolder="unet")
    with torch.no_grad():  # an update starts at zero
        torch.testing.assert_close(networks.unet(*inputs()).sample, plain(*inputs()).sample)


def test_merged_lora_is_a_plain_unet_with_equal_outputs(tiny_model_folder, tmp_path):
    networks = build(tiny_model_folder, adapt="lora", lora=LoRAConfig(rank=2, alpha=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in networks.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        adapted = networks.unet(*inputs()).sample
        merge_lora(networks.unet)
        merged = networks.unet(*inputs()).sample
    plain = UNet2DConditionModel.from_pretrained(tiny_model_folder, subfolder="unet")
    assert list(networks.unet.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    networks.unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs()).sample, adapted, atol=1e-5, rtol=1e-5)
        assert (adapted - plain(*inputs()).sample).abs().mean() > 1e-2


def test_targets_that_match_nothing(tiny_model_folder):
    with pytest.raises(ValueError, match=r"lora.targets \['query', 'q'\] match no module of the UNet"):
        build(tiny_model_folder, adapt="lora", lora=LoRAConfig(targets=["to_q", "query", "q"]))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_scheduler_that_states_no_clipping_does_not_clip(tiny_model_folder, name):
    """diffusers' default clips to the range of pictures, [-1, 1], which latents leave."""
    options = {"init": "scratch", "model": None, "unet": SMALL_UNET, "train_text_encoder": True}
    networks = build(tiny_model_folder, scheduler={"_class_name": name, "prediction_type": "v_prediction"}, **options)
    assert networks.scheduler.config.clip_sample is False
    assert Objective.of(networks.scheduler).prediction == "v_prediction"


def test_gradient_checkpointing_changes_no_gradient(tiny_model_folder):
    gradients = []
    for option in (False, True):
        unet = build(tiny_model_folder, gradient_checkpointing=option).unet
        assert unet.is_gradient_checkpointing is option
        unet.train()
        unet(*inputs()).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_text_enters_a_scratch_unet_from_zero_and_can_grow(tiny_model_folder):
    unet_options = {**SMALL_UNET, "addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    text_options = {"hidden_size": 16, "num_attention_heads": 4}
    options = {"init": "scratch", "model": None, "unet": unet_options, "text_encoder": text_options, "train_text_encoder": True}
    unet = build(tiny_model_folder, **options).unet
    z, t, embeds = inputs()
    torch.testing.assert_close(unet(z, t, embeds).sample, unet(z, t, embeds.flip(0)).sample, rtol=0, atol=0)
    unet(z, t, embeds).sample.square().mean().backward()
    doors = [m.weight.grad for n, m in unet.named_modules() if n.endswith("attn2.to_out.0") or n == "add_embedding.norm2"]
    assert len(doors) == 5 and all(bool(gradient.any()) for gradient in doors)


def test_equal_updates_are_equal_bytes(tiny_model_folder, tmp_path):
    """safetensors writes its metadata in another order each time."""
    unet = build(tiny_model_folder, adapt="lora", lora=LoRAConfig(rank=2, alpha=4)).unet
    for number in range(6):
        save_lora(unet, tmp_path / str(number))
    assert len({path.read_bytes() for path in tmp_path.rglob("*.safetensors")}) == 1
