"""Options that are set and that other options of the same run leave without effect: legal, but seldom meant, so they are said."""

from __future__ import annotations

from functools import reduce

from eqldm.config import AutoencoderConfig, DiffusionConfig, StageConfig, micro_batch_size


def without_effect(config: StageConfig) -> list[str]:
    """A sentence on each group of options that changes nothing in this run; [] where all do something."""
    return [*_of_steps(config), *(_of_autoencoder(config) if isinstance(config, AutoencoderConfig) else _of_diffusion(config))]


def _of_steps(config: StageConfig) -> list[str]:
    run, steps, lines = config.run, config.run.num_steps, []
    if run.val_every > steps:
        drawn = " and ".join(name for name in ("sample_prompts", "val_letters") if getattr(config, name, None))
        lines.append(
            f"run.val_every={run.val_every} is past the last step, {steps}: nothing is validated" + f", {drawn} wait for it" * bool(drawn)
        )
    usual = type(run)()  # a short run with the usual options is none that anybody waits for
    if steps < run.checkpoint_every != usual.checkpoint_every:
        lines.append(f"run.checkpoint_every={run.checkpoint_every} is past the last step, {steps}: a run that dies before it begins anew")
    if steps < run.log_every != usual.log_every:
        lines.append(f"run.log_every={run.log_every} is past the last step, {steps}: no loss is logged but the validation's")
    if run.keep_every is not None and run.keep_every > steps:
        lines.append(f"run.keep_every={run.keep_every} is past the last step, {steps}: no checkpoint is kept but the newest")
    if run.devices * run.num_nodes == 1:
        lines += _idle(config, "a process alone waits for no other", "run.timeout_seconds")
    warmup, rest = config.optimizer.warmup_steps, steps - getattr(config, "boundary_steps", 0)
    if warmup >= rest:
        lines.append(
            f"optimizer.warmup_steps={warmup} last as long as the run, {rest} steps: the learning rate ends at {rest / (warmup + 1):.2g} "
            "of its peak"
        )
    return lines


def _of_autoencoder(config: AutoencoderConfig) -> list[str]:
    loss, eq, steps, lines = config.loss, config.equivariance, config.run.num_steps, []
    if not loss.adversarial_weight:
        lines += _idle(
            config,
            "loss.adversarial_weight=0 builds no discriminator",
            "loss.adversarial_start",
            "loss.discriminator_channels",
            "loss.discriminator_layers",
        )
    elif loss.adversarial_start >= steps:
        lines.append(
            f"loss.adversarial_start={loss.adversarial_start} is not before the last step, {steps}: the discriminator is never trained"
        )
    if config.crop_until == 0:
        lines.append(f"crop_size={config.crop_size} has no effect: crop_until=0 ends the crops before the first step")
    elif config.crop_until is not None and config.crop_until >= steps:
        lines.append(f"crop_until={config.crop_until} is not before the last step, {steps}: no whole picture is trained on")
    if eq.preset == "custom":
        if not eq.rescale_prob:
            lines += _idle(
                config,
                "equivariance.rescale_prob=0 rescales nothing",
                *(f"equivariance.{name}" for name in ("rescale_smallest", "anisotropic", "num_groups")),
            )
        elif eq.num_groups > (micro := micro_batch_size(config)):
            lines.append(
                f"equivariance.num_groups={eq.num_groups} is more than the {micro} pictures of a micro-batch: each is its own group"
            )
        if not eq.permute_prob:
            lines += _idle(config, "equivariance.permute_prob=0 permutes nothing", "equivariance.permute_cells")
        lines += _of_transforms(config)
    return lines


def _of_transforms(config: AutoencoderConfig) -> list[str]:
    eq, names = config.equivariance, ("group", "rescale_prob", "permute_prob", "negate_prob")
    drawn = [f"equivariance.{name}" for name in names]
    if eq.group == "none" and not (eq.rescale_prob or eq.permute_prob or eq.negate_prob):
        weights = (f"equivariance.{name}" for name in ("prob", "implicit_weight", "consistency_weight"))
        return _idle(config, f"no transform is drawn ({', '.join(drawn)})", *weights)
    if not eq.prob:
        return _idle(config, "equivariance.prob=0 regularises no step", *drawn)
    if not eq.implicit_weight and not eq.consistency_weight:
        return _idle(config, "equivariance.implicit_weight=0 and consistency_weight=0 leave no loss that sees a transform", *drawn)
    return []


def _of_diffusion(config: StageConfig) -> list[str]:
    lines = []
    if isinstance(config, DiffusionConfig) and not config.train_text_encoder:
        lines += _idle(config, "train_text_encoder=false", "text_encoder_lr_factor")
    elif isinstance(config, DiffusionConfig) and not config.text_encoder_lr_factor:
        lines.append("train_text_encoder=true has no effect: text_encoder_lr_factor=0 leaves the text encoder as it begins")
    if isinstance(config, DiffusionConfig) and config.min_snr_gamma is None:
        lines += _idle(config, "min_snr_gamma is not set", "min_snr_floor")
    return lines


def _idle(config: StageConfig, why: str, *names: str) -> list[str]:
    """A sentence on those of the options that are not as by default, which have no effect; [] where all are."""
    own, default = ([reduce(getattr, name.split("."), each) for name in names] for each in (config, type(config)()))
    changed = [f"{name}={value}" for name, value, usual in zip(names, own, default) if value != usual]
    return [f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} no effect: {why}"] if changed else []
