"""The LightningModule of stage 2, and `train_diffusion`, which runs it from options to exported model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from transformers import CLIPTokenizer

from eqldm.config import DiffusionConfig
from eqldm.data.module import ShardData, check_image_size
from eqldm.data.order import position_generator
from eqldm.data.samples import LatentSamples, PictureSamples
from eqldm.diffusion.adaptation import build_networks, merge_lora, save_lora
from eqldm.diffusion.conditioning import cut_captions, encode_prompts, looked_at, too_long, unseen_words
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import Networks, Pixels, downsampling, load_vae, normalise, posterior, save_model_folder, text_hash, vae_hash
from eqldm.training.callbacks import Unchecked
from eqldm.training.machine import check_machine
from eqldm.training.run_folder import finish_run, finished_model, hardware, prepare_run, run_card
from eqldm.training.trainer import fit, make_optimizer, make_schedule, make_trainer
from eqldm.training.zero import ZERO


class LatentDiffusion(pl.LightningModule):
    """Trains a UNet (and, if asked, its text encoder) to denoise an autoencoder's latents.

    Batches: `{moments: [B, 2 C, h, w]}` from latent shards or `{x: [B, 3, H, W] in [-1, 1]}` from picture shards, with
    `caption`, `position`, `key`, and `prompt_embeds` [B, L, D] where the shards hold them. Training's bring along what `Draws` draws.
    """

    def __init__(self, config: DiffusionConfig, vae: AutoencoderKL | Pixels, networks: Networks):
        super().__init__()
        self.config, self.unchecked = config, Unchecked()
        self.unet = networks.unet.train()
        self.text_encoder = networks.text_encoder if config.train_text_encoder else None
        # In a list: neither trained, nor averaged, nor in the checkpoints.
        self.frozen = [vae.requires_grad_(False).eval(), networks.text_encoder.train(config.train_text_encoder)]
        self.tokenizer, self.scheduler = networks.tokenizer, networks.scheduler
        self.objective = Objective.of(networks.scheduler, config.min_snr_gamma, config.min_snr_floor)
        self.unweighted = Objective.of(networks.scheduler)  # of the validation: it compares, whatever the training's weights
        # DeepSpeed takes contiguous weights alone; the layout of the latents is enough for the convolutions to choose theirs
        if config.run.channels_last and config.run.strategy not in ZERO:
            self.unet.to(memory_format=torch.channels_last)
        if config.run.compile:
            self.unet.compile()

    @property
    def vae(self) -> AutoencoderKL | Pixels:
        return self.frozen[0]

    def on_fit_start(self) -> None:
        for network in self.frozen:
            network.to(self.device)

    def configure_optimizers(self):
        boundary = {*self.unet.conv_in.parameters(), *self.unet.conv_out.parameters()} if self.config.boundary_steps else set()
        trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        parts = [[p for p in trained if p in boundary], [p for p in trained if p not in boundary]]
        groups = [{"params": part} for part in parts if part]
        if self.text_encoder is not None:
            learning_rate = self.config.optimizer.learning_rate * self.config.text_encoder_lr_factor
            groups.append({"params": list(self.text_encoder.parameters()), "lr": learning_rate})
        optimizer = make_optimizer(groups, self.config.optimizer, self.config.run.strategy)
        return [optimizer], [{"scheduler": make_schedule(optimizer, self.config, self.config.boundary_steps), "interval": "step"}]

    def latents(self, batch: dict, seed: int) -> Tensor:
        """Normalised latents z [B, C, h, w], drawn from the posterior with each position's generator."""
        if "moments" in batch:
            distribution = posterior(batch["moments"])
        else:
            with torch.no_grad():
                distribution = self.vae.encode(batch["x"]).latent_dist
        mean, std = distribution.mean.float(), distribution.std.float()
        noise = batch.get("drawn_posterior")
        if noise is None:
            noise = torch.stack([posterior_noise(mean.shape[1:], seed, position) for position in batch["position"].tolist()])
        return normalise(self.vae, mean + std * noise.to(mean))

    def prompt_embeds(self, batch: dict, captions: list[str]) -> Tensor:
        """[B, L, D]. Precomputed embeddings are used where the batch holds them and no caption was dropped."""
        if "prompt_embeds" in batch and self.text_encoder is None:
            dropped = [a != b for a, b in zip(captions, batch["caption"])]
            if not any(dropped):
                return batch["prompt_embeds"]
            with torch.no_grad():
                empty = encode_prompts(self.tokenizer, self.frozen[1], [""])
            return torch.where(torch.tensor(dropped, device=self.device)[:, None, None], empty, batch["prompt_embeds"])
        with torch.set_grad_enabled(self.text_encoder is not None and torch.is_grad_enabled()):
            return encode_prompts(self.tokenizer, self.text_encoder or self.frozen[1], captions)

    def draws(self, samples: PictureSamples | LatentSamples) -> Draws:
        """What its training draws for each of the samples."""
        if isinstance(samples, LatentSamples):
            double, *sides = samples[0]["moments"].shape
            shape = (double // 2, *sides)
        else:
            shape = (self.vae.config.latent_channels, *(side // downsampling(self.vae) for side in samples.image_size))
        return Draws(replace(self.objective), self.config.run.seed, shape)  # an objective without copies on a device

    def denoising_loss(self, batch: dict, seed: int, objective: Objective, caption_dropout: float = 0.0) -> Tensor:
        """[B] the objective's loss at one (t, noise) per sample, drawn from (seed, position). A training's readers have drawn them,
        by its seed and objective."""
        z = self.latents(batch, seed)
        t, eps, captions = draw(batch, z, seed, objective, caption_dropout)
        noisy = objective.add_noise(z, eps, t)
        if self.config.run.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        output = self.unet(noisy, t, self.prompt_embeds(batch, captions)).sample
        return objective.loss(output, z, eps, t)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = self.denoising_loss(batch, self.config.run.seed, self.objective, self.config.caption_dropout).mean()
        self.unchecked.add({"loss": loss}, batch["key"])  # looked at before the optimizer's step
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        loss = self.denoising_loss(batch, 0, self.unweighted)
        self.log("val/loss", loss.mean(), batch_size=len(loss), sync_dist=True, prog_bar=True)

    def export(self, folder: Path, card: str, lora: Path) -> Path:
        """Write the whole model folder, low-rank updates merged, and these by themselves to the folder `lora`."""
        if self.config.adapt == "lora":
            save_lora(self.unet, lora)
            merge_lora(self.unet)
        return save_model_folder(
            folder,
            card,
            vae=self.vae.cpu(),
            unet=self.unet.cpu().eval(),
            text_encoder=(self.text_encoder or self.frozen[1]).cpu().eval(),
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
        )


def draw(batch: dict, z: Tensor, seed: int, objective: Objective, caption_dropout: float = 0.0) -> tuple[Tensor, Tensor, list[str]]:
    """Of latents z [B, C, h, w]: (timesteps [B], noise [B, C, h, w], captions), drawn from (seed, position)."""
    if "drawn_t" in batch:
        t, eps, shares = (batch[name] for name in ("drawn_t", "drawn_eps", "drawn_share"))
    else:
        t, eps, shares = map(torch.stack, zip(*(denoising_draws(z.shape[1:], seed, p, objective) for p in batch["position"].tolist())))
    captions = ["" if share < caption_dropout else caption for share, caption in zip(shares.tolist(), batch["caption"])]
    return t.to(z.device), eps.to(z), captions


def denoising_draws(shape: Sequence[int], seed: int, position: int, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(timestep [], noise [C, h, w], number [] from 0 to 1: below the share of dropped captions, this one is dropped)."""
    generator = position_generator(seed, position, "denoise")
    return objective.draw_time(generator), torch.randn(tuple(shape), generator=generator), torch.rand((), generator=generator)


def posterior_noise(shape: Sequence[int], seed: int, position: int) -> Tensor:
    """[C, h, w]."""
    return torch.randn(tuple(shape), generator=position_generator(seed, position, "posterior"))


@dataclass(frozen=True)
class Draws:
    """What a training step draws for a sample, from (seed, position) alone: the processes that read the data do it, beside the step.

    A sample takes some 80 µs of a core, a batch of 256 so 20 ms that the step would wait for.
    shape: (C, h, w) of a latent.
    """

    objective: Objective
    seed: int
    shape: tuple[int, ...]

    def __call__(self, position: int) -> dict[str, Tensor]:
        t, eps, share = denoising_draws(self.shape, self.seed, position, self.objective)
        noise = posterior_noise(self.shape, self.seed, position)
        return {"drawn_t": t, "drawn_eps": eps, "drawn_share": share, "drawn_posterior": noise}


def prepare_diffusion(config: DiffusionConfig) -> tuple[LatentDiffusion, ShardData]:
    """What stage 2 trains, as it starts, and its data.

    Raises: ValueError where they, the VAE or the options do not fit each other; as the data module, `build_networks`.
    """
    vae = Pixels() if config.vae == "pixels" else load_vae(config.vae)
    if vae.config.get("shift_factor"):
        raise ValueError(
            f"the VAE of '{config.vae}' has a shift_factor, which Stable Diffusion's pipeline does not undo: fold it in with "
            "python -m eqldm.autoencoder.fold, and encode with the folded VAE"
        )
    data = ShardData(config, need_captions=True, vae_hash=vae_hash(vae))
    image_size = _image_size(data.train_samples, vae)
    check_image_size(config, config.data.train, (image_size, image_size))
    networks = build_networks(config, vae, image_size, _captions(data.train_samples))
    if not config.train_text_encoder:
        for samples in (data.train_samples, data.val_samples):
            if isinstance(samples, LatentSamples):
                samples.check_text_encoder(text_hash(networks.tokenizer, networks.text_encoder))
    cut = too_long(networks.tokenizer, config.sample_prompts)
    if cut:
        raise ValueError(f"sample_prompts longer than the model's {networks.tokenizer.model_max_length} tokens: {cut[0]!r}")
    module = LatentDiffusion(config, vae, networks)
    data.draws = module.draws(data.train_samples)
    return module, data


def about(config: DiffusionConfig) -> str:
    """What the card says of the model."""
    return f"A UNet trained on the latents of the VAE of `{config.vae}`."


def train_diffusion(config: DiffusionConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Runs stage 2, or resumes it; exports the EMA weights to `RUN/model`, a folder stock diffusers opens. Returns it.

    Raises: as `prepare_diffusion`, `prepare_run`; FloatingPointError from the NaN guard.
    """
    if done := finished_model(config):
        return done
    check_machine(config.run)
    module, data = prepare_diffusion(config)
    _report_texts(config, module.tokenizer, data)
    checkpoint = prepare_run(config)
    trainer = make_trainer(config, automatic_accumulation=True, callbacks=callbacks)
    fit(trainer, module, data, checkpoint)
    run = Path(config.run.dir)
    if trainer.is_global_zero:
        card = run_card(config, run, about(config), config.run.num_steps, hardware(config, trainer.strategy.root_device))
        module.export(run / "model", card, run / "lora")
        finish_run(config, trainer)
    trainer.strategy.barrier()
    return run / "model"


@rank_zero_only
def _report_texts(config: DiffusionConfig, tokenizer: CLIPTokenizer, data: ShardData) -> None:
    """Says what is cut of the captions, and, from scratch, which words training does not show."""
    captions = {option: looked_at(samples.shards) for option, samples in (("train", data.train_samples), ("val", data.val_samples))}
    lines = [
        cut_captions(tokenizer, captions["train"], len(data.train_samples), config.data.train),
        cut_captions(tokenizer, captions["val"], len(data.val_samples), config.data.val),
    ]
    if config.init == "scratch":
        lines += [
            unseen_words(tokenizer, captions["train"], captions["val"], f"'{config.data.val}'"),
            unseen_words(tokenizer, captions["train"], config.sample_prompts, "sample_prompts"),
        ]
    for line in filter(None, lines):
        print(line)


def _image_size(samples, vae: AutoencoderKL | Pixels) -> int:
    if isinstance(samples, LatentSamples):
        return samples[0]["moments"].shape[-1] * downsampling(vae)
    return samples.image_size[0]


def _captions(samples):
    """The captions of the whole set, for a new tokenizer."""
    for number in range(len(samples)):
        yield samples.shards.read(number, "txt").decode()
