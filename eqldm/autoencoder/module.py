"""The LightningModule of stage 1, and `train_autoencoder`, which runs it from options to exported model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from eqldm.autoencoder.discriminator import PatchDiscriminator
from eqldm.autoencoder.equivariance import (
    IDENTITY_TRANSFORM,
    TransformGroup,
    consistency_loss,
    draw_groups,
    draw_resize,
    latent_error,
    psnr,
    spread_loss,
)
from eqldm.autoencoder.fold import fold_channels
from eqldm.autoencoder.losses import (
    adaptive_weight,
    gradient_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss,
    load_lpips,
)
from eqldm.config import AutoencoderConfig, accumulation
from eqldm.construction import check_autoencoder, make
from eqldm.data.module import ShardData
from eqldm.data.order import position_generator
from eqldm.data.samples import PictureSamples
from eqldm.model_folder import downsampling, load_vae, save_model_folder
from eqldm.training.callbacks import Unchecked
from eqldm.training.machine import check_machine
from eqldm.training.run_folder import finish_run, finished_model, hardware, prepare_run, run_card
from eqldm.training.trainer import fit, make_optimizer, make_schedule, make_trainer
from eqldm.views import D4, transform_each

STATISTICS_MOMENTUM = 0.9  # of the running latent statistics, which the consistency term uses


class Autoencoder(pl.LightningModule):
    """Trains a diffusers AutoencoderKL: reconstruction + KL + equivariance (+ PatchGAN). Manual optimization.

    Batches: `{x: [B, 3, H, W] in [-1, 1], position: [B], key}`. Everything random is drawn from (seed, position).
    """

    def __init__(self, config: AutoencoderConfig, vae: AutoencoderKL):
        super().__init__()
        self.automatic_optimization = False
        self.config, self.vae = config, vae
        loss = config.loss
        self.discriminator: PatchDiscriminator | None = None
        if loss.adversarial_weight > 0:
            torch.manual_seed(config.run.seed)
            self.discriminator = PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers)
        self.lpips = [load_lpips()] if loss.perceptual_weight > 0 else []  # in a list: neither trained nor checkpointed
        channels = vae.config.latent_channels
        # Running means per channel of z, of z^2 and of (E(T x) - T E(x))^2; all zero until they are measured
        self.register_buffer("latent_moments", torch.zeros(3, channels))
        self.measured = False  # whether they are: asked of a GPU until then, and not at every step
        self.unchecked = Unchecked()
        self.moments: Tensor | float = 0.0  # of this process and step: no buffer, which DDP may share and the EMA average
        if config.run.channels_last:
            self.vae.to(memory_format=torch.channels_last)
        if config.run.compile:
            self.vae.encoder.compile()
            # Not the decoder as a whole: the adaptive weight takes gradients at its last layer alone, and twice of one graph
            for block in (self.vae.decoder.mid_block, *self.vae.decoder.up_blocks):
                block.compile()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.trainer.global_step

    def configure_optimizers(self):
        options = self.config.optimizer
        optimizers = [make_optimizer(self.vae.parameters(), options)]
        if self.discriminator is not None:
            rate = self.config.loss.discriminator_learning_rate or options.learning_rate
            optimizers.append(make_optimizer(self.discriminator.parameters(), replace(options, learning_rate=rate)))
        return optimizers, [make_schedule(optimizer, self.config) for optimizer in optimizers]

    def on_fit_start(self) -> None:
        for network in self.lpips:
            network.to(self.device)

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Under manual optimization Lightning's logs count batches: let them count optimizer steps, as everywhere
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.step

    def training_step(self, batch: dict, batch_idx: int) -> None:
        adversarial = self.discriminator is not None and self.step >= self.config.loss.adversarial_start
        x = self._crop(batch["x"], batch["position"].tolist())
        parts = accumulation(self.config)
        pictures, terms = self._generator_terms(x, batch, "transform", adversarial)
        self.unchecked.add(terms, batch["key"])  # looked at before the optimizers' step
        self.manual_backward(terms["loss"] / parts)
        if adversarial:
            if self.config.equivariance.preset == "eqvae_paper":  # its two steps draw different transforms
                with torch.no_grad():
                    pictures, _ = self._generator_terms(x, batch, "transform/discriminator", adversarial=False)
            own = self._discriminator_terms(pictures)
            self.unchecked.add(own, batch["key"])
            terms |= own
            self.manual_backward(terms["discriminator"] / parts)
        if self._completes_step(batch):
            self._step(adversarial, batch["key"])
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()}, prog_bar=False)
        self.log("loss", terms["loss"].detach(), prog_bar=True, logger=False)

    def _crop(self, x: Tensor, positions: list[int]) -> Tensor:
        """Each picture's square of this step, anywhere in it; the whole pictures where the options say so."""
        size, until = self.config.crop_size, self.config.crop_until
        if size is None or (until is not None and self.step >= until):
            return x
        crops = []
        for picture, position in zip(x, positions):
            generator = position_generator(self.config.run.seed, position, "crop")
            top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in picture.shape[-2:])
            crops.append(picture[:, top : top + size, left : left + size])
        return torch.stack(crops)

    def _completes_step(self, batch: dict) -> bool:
        """Whether this micro-batch is the last of its optimizer step, read off its position in the stream."""
        batch_size = self.config.data.batch_size
        micro_batches = accumulation(self.config)
        share = batch_size // micro_batches
        return (int(batch["position"][0]) % batch_size) // share == micro_batches - 1

    def _step(self, adversarial: bool, keys: list[str]) -> None:
        optimizers, schedules = self.optimizers(), self.lr_schedulers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        schedules = schedules if isinstance(schedules, list) else [schedules]
        networks = {"vae": self.vae, **({"discriminator": self.discriminator} if adversarial else {})}
        clip = self.config.optimizer.clip_norm
        norms = {f"grad_norm_{n}": torch.nn.utils.clip_grad_norm_(net.parameters(), clip) for n, net in networks.items()}
        self.unchecked.add(norms, keys)
        self.unchecked.check(self.step)
        self.log_dict({f"train/{name}": norm for name, norm in norms.items()})
        for i in range(len(networks)):
            # The trainer counts its own optimizers' steps: only the first may count, a step is a step of the VAE.
            (optimizers[i] if i == 0 else optimizers[i].optimizer).step()
            optimizers[i].zero_grad(set_to_none=True)
        for schedule in schedules:
            schedule.step()
        self._update_latent_statistics()

    def _generator_terms(
        self, x: Tensor, batch: dict, purpose: str, adversarial: bool
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """The loss terms of a micro-batch, and the (decoded, target) pairs of its groups."""
        config, positions, seed = self.config, batch["position"].tolist(), self.config.run.seed
        side = x.shape[-1] // downsampling(self.vae)
        resize = draw_resize(config.equivariance, seed, self.step, side, purpose)
        x, area = (x, 1.0) if resize is None else (resize(x), resize.height * resize.width)
        posterior = self.vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.stack([torch.randn(mean.shape[1:], generator=position_generator(seed, p, "vae")) for p in positions])
        z = mean + (0.5 * logvar).exp() * noise.to(mean)
        groups = draw_groups(config.equivariance, seed, self.step, positions, mean.shape[-1], purpose)
        if config.equivariance.implicit_weight > 0:
            regularised = any(t != IDENTITY_TRANSFORM for g in groups for t in g.transforms)
            weight = area * (config.equivariance.implicit_weight if regularised else 1)
            pairs = [(self.vae.decode(transform_group(g, z)).sample.float(), transform_group(g, x)) for g in groups]
            shares = [weight * g.weight * len(g.rows) / len(x) for g in groups]
        else:
            pairs, shares = [(self.vae.decode(z).sample.float(), x)], [1.0]

        difference = None
        terms = self._reconstruction_terms(pairs, shares)
        terms["kl"] = kl_loss(mean, logvar)
        terms["loss"] = terms["reconstruction"] + config.loss.kl_weight * area * terms["kl"]
        if config.equivariance.consistency_weight > 0:
            terms["consistency"], difference = self._consistency(x, mean, groups)
            terms["loss"] = terms["loss"] + config.equivariance.consistency_weight * terms["consistency"]
        if adversarial:
            self._add_adversarial(terms, pairs, shares)
        self._observe(mean.detach(), difference)
        return pairs, terms

    def _add_adversarial(self, terms: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]], shares: list[float]) -> None:
        """Adds the generator's side of the PatchGAN to the terms, with its adaptive weight."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        logits = [(share, hinge_generator_loss(self.discriminator(y))) for share, (y, _) in zip(shares, pairs)]
        self.discriminator.requires_grad_(True)
        terms["adversarial"] = sum((share * value for share, value in logits), torch.zeros((), device=self.device))
        # Of this process's micro-batch, as in VQGAN: with a PatchGAN, how the batch is split changes the result slightly
        factor = adaptive_weight(terms["reconstruction"], terms["adversarial"], self.vae.decoder.conv_out.weight)
        terms["adaptive_weight"] = factor
        terms["loss"] = terms["loss"] + self.config.loss.adversarial_weight * factor * terms["adversarial"]

    def _reconstruction_terms(self, pairs: list[tuple[Tensor, Tensor]], shares: list[float]) -> dict[str, Tensor]:
        loss = self.config.loss
        measures = {
            "l1": (loss.l1_weight, lambda y, x: (y - x).abs().mean()),
            "l2": (loss.l2_weight, lambda y, x: (y - x).square().mean()),
            "gradient": (loss.gradient_weight, gradient_loss),
            "lpips": (loss.perceptual_weight, lambda y, x: self.lpips[0](y, x).mean()),
        }
        terms = {
            name: sum(share * measure(y, x) for share, (y, x) in zip(shares, pairs))
            for name, (weight, measure) in measures.items()
            if weight > 0
        }
        terms["reconstruction"] = sum(measures[name][0] * value for name, value in terms.items())
        return terms

    @property
    def latent_variance(self) -> Tensor:
        """[C] running variance of the latents' channels; 0 until it is measured."""
        mean, square, _ = self.latent_moments
        return (square - mean.square()).clamp_min(1e-8) * square.any()

    def _consistency(self, x: Tensor, mean: Tensor, groups: list[TransformGroup]) -> tuple[Tensor, Tensor]:
        """The consistency term, 0 at the first step, which measures the variance; and [C] the mean of (E(T x) - T E(x))^2."""
        variance = self.latent_variance
        known = self.measured = self.measured or bool(variance.any())
        total, difference = mean.new_zeros(()), mean.new_zeros(mean.shape[1])
        for group in groups:
            encoded = self.vae.encode(transform_group(group, x)).latent_dist.mean.float()
            transformed = transform_group(group, mean)
            share = len(group.rows) / len(x)
            difference = difference + share * (encoded - transformed).detach().square().mean((0, 2, 3))
            if known:
                total = total + share * consistency_loss(encoded, transformed, variance)
        if known:
            total = total + spread_loss(mean, self.latent_moments[0], variance, self.latent_moments[2])
        return total, difference

    def _discriminator_terms(self, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The discriminator's loss; of its logits the means on real and on fake pictures, and the share on the right side of 0."""
        assert self.discriminator is not None
        count = sum(len(y) for y, _ in pairs)
        terms: dict[str, Tensor] = {}
        for y, x in pairs:
            real, fake = self.discriminator(x), self.discriminator(y.detach())
            found = {
                "discriminator": hinge_discriminator_loss(real, fake),
                "logits_real": real.detach().mean(),
                "logits_fake": fake.detach().mean(),
                "discriminator_accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2,
            }
            terms = {name: terms.get(name, 0.0) + len(y) / count * value for name, value in found.items()}
        return terms

    @torch.no_grad()
    def _observe(self, mean: Tensor, difference: Tensor | None) -> None:
        """Adds a micro-batch to the moments of this step: per channel count, sum, sum of squares, and of squared differences."""
        values = mean.double().transpose(0, 1).flatten(1)
        count = torch.full_like(values[:, 0], values.shape[1])
        differences = torch.zeros_like(count) if difference is None else difference.double() * count
        self.moments = self.moments + torch.stack([count, values.sum(1), values.square().sum(1), differences])

    @torch.no_grad()
    def _update_latent_statistics(self) -> None:
        """Moves the running statistics towards this step's, over the whole global batch."""
        count, *sums = self.trainer.strategy.reduce(self.moments, reduce_op="sum")
        found = torch.stack([total / count for total in sums]).float()
        self.measured = self.measured or bool(self.latent_moments.any())
        self.latent_moments.copy_(self.latent_moments.lerp(found, 1 - STATISTICS_MOMENTUM) if self.measured else found)
        self.moments = 0.0
        self.log("train/latent_std", self.latent_variance.sqrt().mean())

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x, count = batch["x"], len(batch["x"])
        z = self.vae.encode(x).latent_dist.mean
        self._log_val("val/reconstruction/psnr", psnr(self.vae.decode(z).sample, x), count)
        mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
        for view in D4[1:4]:  # the rotations: a look during training, the evaluation measures every view
            turned = self.vae.encode(view(x)).latent_dist.mean
            error = latent_error((turned - mean) / std, view((z - mean) / std))
            self._log_val(f"val/equivariance/{view.name}/latent_error", error, count)
            self._log_val(f"val/equivariance/{view.name}/psnr", psnr(self.vae.decode(view(z)).sample, view(x)), count)

    def _log_val(self, name: str, values: Tensor, count: int) -> None:
        self.log(name, values.mean(), batch_size=count, sync_dist=True)


def transform_group(group: TransformGroup, x: Tensor) -> Tensor:
    """The group's rows of `x` [B, C, H, W], each under its own transform."""
    return transform_each(group.transforms, x[group.rows])


def build_vae(config: AutoencoderConfig, image_size: int) -> AutoencoderKL:
    """The VAE that training starts from. Raises ValueError where the architecture does not fit the pictures."""
    if config.init == "pretrained":
        assert config.model is not None  # its options require it
        vae = load_vae(config.model)
    else:
        torch.manual_seed(config.run.seed)
        vae = make(AutoencoderKL, "architecture", {"sample_size": image_size, **config.architecture})
    factor = downsampling(vae)
    if image_size % factor:
        raise ValueError(f"pictures of {image_size} px do not divide by the VAE's f = {factor}: make shards of another size")
    if config.crop_size is not None and (config.crop_size > image_size or config.crop_size % factor):
        raise ValueError(f"crop_size: got {config.crop_size} px, wanted a multiple of f = {factor} up to the pictures' {image_size} px")
    if config.init == "scratch":
        check_autoencoder(config.architecture, image_size)
    return vae.train()


ABOUT = "An autoencoder trained so that its latents turn with the picture, with normalised latents (scaling_factor 1)."


def prepare_autoencoder(config: AutoencoderConfig) -> tuple[Autoencoder, ShardData]:
    """What stage 1 trains, as it starts, and its data.

    Raises: ValueError where the pictures are not square, or too small for the discriminator; as the data module, `build_vae`.
    """
    data, sides = ShardData(config), []
    for samples in (data.train_samples, data.val_samples):
        assert isinstance(samples, PictureSamples)  # without a VAE's hash latents are refused
        height, width = samples.image_size
        if height != width:  # rotations swap the sides; validation looks at them whatever the options
            raise ValueError(
                f"pictures of '{samples.shards.folder}' are {height} x {width} px, wanted squares: make the shards with "
                "data/make_shards.py --size"
            )
        sides.append(width)
    module = Autoencoder(config, build_vae(config, sides[0]))
    if module.discriminator is not None:
        _check_discriminator(config, module.discriminator, config.crop_size or sides[0])
    return module, data


def export_autoencoder(module: Autoencoder, data: ShardData, device: torch.device, folder: Path, card: str) -> Path:
    """Write the module's VAE as a model folder, folded as the options say, its latents measured on the device."""
    config, vae = module.config, module.vae.eval().to(device)
    if config.fold.num_images:
        assert isinstance(data.train_samples, PictureSamples)
        align = load_vae(config.fold.align_to).to(device) if config.fold.align_to else None
        keep_origin = config.equivariance.negate_prob > 0  # an offset would end D(-z) = -D(z)
        fold_channels(vae, data.train_samples, config.fold.num_images, align, keep_origin)
    return save_model_folder(folder, card, vae=vae.cpu())


def train_autoencoder(config: AutoencoderConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Runs stage 1, or resumes it; exports the EMA weights, folded, to `RUN/model`. Returns that folder.

    Raises: as `prepare_autoencoder`, `prepare_run`; FloatingPointError from the NaN guard.
    """
    if done := finished_model(config):
        return done
    check_machine(config.run)
    module, data = prepare_autoencoder(config)
    checkpoint = prepare_run(config)
    unused = module.discriminator is not None
    trainer = make_trainer(config, automatic_accumulation=False, callbacks=callbacks, unused_parameters=unused)
    fit(trainer, module, data, checkpoint)
    run, device = Path(config.run.dir), trainer.strategy.root_device
    if trainer.is_global_zero:
        card = run_card(config, run, ABOUT, config.run.num_steps, hardware(config, device))
        export_autoencoder(module, data, device, run / "model", card)  # Lightning has moved it to the CPU
        finish_run(config, trainer)
    trainer.strategy.barrier()
    return run / "model"


def _check_discriminator(config: AutoencoderConfig, discriminator: PatchDiscriminator, image_size: int) -> None:
    """Raises ValueError, before step 0, where the smallest rescaled pictures are too small for the discriminator."""
    eq = config.equivariance
    paper = eq.preset == "eqvae_paper"
    smallest = 0.25 if paper else eq.rescale_smallest if eq.rescale_prob > 0 else 1.0
    if image_size * smallest < discriminator.smallest:
        raise ValueError(
            f"pictures of {image_size} px are rescaled down to {image_size * smallest:g} px, and a discriminator of "
            f"{config.loss.discriminator_layers} layers needs {discriminator.smallest}: use fewer loss.discriminator_layers, "
            "or larger pictures"
        )
