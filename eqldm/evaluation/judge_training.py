"""Trains the judge (stage `judge` of train.py).

Its 27th answer, "no letter", is learnt from glyphs turned by the symmetries of the square: a turned R is no R, nor any other letter.
`READS_AS` (see `lookalikes`) names the turned letters that are letters (H, N as Z, M as W), and `UNCERTAIN` those that readers disagree
on, which training leaves out. (Left to find the lookalikes by itself, the judge tells them by the font's small asymmetries, and refuses a
third of the upright Os.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, rotate

from eqldm.config import JudgeConfig
from eqldm.data.module import ShardData
from eqldm.data.order import position_generator
from eqldm.data.samples import PictureSamples
from eqldm.evaluation.judge import LETTERS, NO_LETTER, make_network, save_judge
from eqldm.evaluation.letter_pictures import (
    BLURS,
    CONTRASTS,
    GHOST_WEIGHTS,
    JOINED,
    KEPT,
    MIXED_WEIGHTS,
    blurred,
    faded,
    hides,
    ink_of,
    joined,
    joins,
    kept,
    mixed,
    painted,
)
from eqldm.evaluation.lookalikes import READS_AS, UNCERTAIN
from eqldm.model_folder import PRETRAINED, decode, downsampling, encode, load_vae
from eqldm.training.callbacks import check_finite
from eqldm.training.machine import check_machine
from eqldm.training.run_folder import finish_run, finished_model, prepare_run
from eqldm.training.trainer import fit, make_optimizer, make_schedule, make_trainer
from eqldm.views import D4


def turned_label(label: int, symmetry: str) -> int | None:
    """The label of a letter turned by a symmetry of the square: a letter's, `NO_LETTER`, or None where readers disagree."""
    letter = LETTERS[label]
    if letter in UNCERTAIN.get(symmetry, ()):
        return None
    reading = READS_AS[symmetry].get(letter)
    return NO_LETTER if reading is None else LETTERS.index(reading)


KINDS = ("half", "mixed", "ghost", "faded", "blurred")
"""What a picture may be besides turned; see `Drawing`."""
VAES = ("glyphs-base", "glyphs-eq")  # shipped; what models draw has gone through them


class Drawing:
    """Draws what the judge is shown of a picture. samples: where the second letters of `half`, `mixed` and `ghost` come from."""

    def __init__(self, samples: PictureSamples | None = None):
        self.samples = samples

    def draw(self, kind: str, x: Tensor, label: int, position: int, generator: torch.Generator) -> tuple[Tensor, int] | None:
        """The picture x [3, H, W] as one of KINDS, and its label then; None where there is none that readers agree on.

        `half`      one half of the letter, or a half each of two letters, that is no letter
        `mixed`     the average of two letters, the second one turned at times: no letter
        `ghost`     the letter with another one faintly behind it, turned at times
        `faded`     the letter in low contrast
        `blurred`   the letter out of focus
        """
        if kind == "faded":
            return faded(x, _between(*CONTRASTS, generator)), label
        if kind == "blurred":
            return blurred(x, _between(*BLURS, generator)), label
        ink = ink_of(x)
        if kind == "half":
            return None if (half := self._half(ink, LETTERS[label], position, generator)) is None else (painted(half, x), NO_LETTER)
        for other, _ in self._others(position, generator):
            view = D4[int(torch.randint(len(D4), (), generator=generator))]
            second = view(other[None])[0]
            if kind == "ghost":
                return painted(mixed(second, ink, _between(*GHOST_WEIGHTS, generator)), x), label
            if not hides(ink, second):
                return painted(mixed(ink, second, _between(*MIXED_WEIGHTS, generator)), x), NO_LETTER
        return None

    def _half(self, ink: Tensor, letter: str, position: int, generator: torch.Generator) -> Tensor | None:
        found = [kept(ink, side) for side, letters in KEPT.items() if letter in letters]
        for other, label in self._others(position, generator):
            found += [joined(ink, other, side) for side in JOINED if joins(side, letter, LETTERS[label])]
            found += [joined(other, ink, side) for side in JOINED if joins(side, LETTERS[label], letter)]
        return found[int(torch.randint(len(found), (), generator=generator))] if found else None

    def _others(self, position: int, generator: torch.Generator, count: int = 4) -> Iterator[tuple[Tensor, int]]:
        """(ink, label) of a few pictures near a stream position, which are another draw of letters in each epoch."""
        assert self.samples is not None
        for step in torch.randint(1, 64, (count,), generator=generator).tolist():
            sample = self.samples[position + step]
            yield ink_of(sample["x"]), sample["label"]


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


class JudgeTraining(pl.LightningModule):
    """Trains the classifier on slightly turned and noisy glyphs. Batches: `{x: [B, 3, H, W] in [-1, 1], label: [B]}`.

    train, val: the samples that the batches are of.  vaes: through which some pictures go (`round_trip_share`).
    """

    def __init__(
        self, config: JudgeConfig, network: nn.Module, train: PictureSamples | None = None, val: PictureSamples | None = None,
        vaes: Sequence[AutoencoderKL] = (),
    ):  # fmt: skip
        super().__init__()
        self.config, self.network = config, network
        self.train_drawing, self.val_drawing = Drawing(train), Drawing(val)
        self.vaes = tuple(vaes)  # a tuple is no module's list: they are neither trained nor kept

    def configure_optimizers(self):
        optimizer = make_optimizer(self.network.parameters(), self.config.optimizer)
        return [optimizer], [{"scheduler": make_schedule(optimizer, self.config), "interval": "step"}]

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        pairs = zip(batch["x"], batch["label"].tolist(), batch["position"].tolist())
        pictures, labels, noise, plain = zip(*(self._augment(x, label, position) for x, label, position in pairs))
        x = self._round_trips(torch.stack(pictures), batch["position"].tolist()) + torch.stack(noise)
        loss = F.cross_entropy(self.network(x).float(), torch.tensor(labels, device=self.device))
        check_finite({"loss": loss.detach()}, self.trainer.global_step, batch["key"])
        self.log("train/loss", loss.detach(), prog_bar=True)
        if self.config.half_share or self.config.mixed_share:  # the shares that are trained are smaller by these pictures
            self.log("train/share_left_plain", sum(plain) / len(plain))
        return loss

    def _augment(self, x: Tensor, label: int, position: int) -> tuple[Tensor, int, Tensor, bool]:
        """The picture turned a little; at times also turned by a symmetry, halved or mixed; and then faint, faded or blurred. Its label
        then, the noise that is to be added, and whether it stayed plain for want of a half or mixture that is no letter."""
        config = self.config
        generator = position_generator(config.run.seed, position, "augment")
        angle = (2 * float(torch.rand((), generator=generator)) - 1) * config.rotation_degrees
        edge = x[:, :2].mean((1, 2)).tolist()
        x = rotate(x, angle, InterpolationMode.BILINEAR, fill=edge)
        drawn = float(torch.rand((), generator=generator))
        if drawn < config.turned_share:
            view = D4[int(torch.randint(1, len(D4), (), generator=generator))]
            if (reading := turned_label(label, view.name)) is not None:
                x, label = view(x), reading
        noise = config.noise * torch.randn(x.shape, generator=generator).to(x)
        x, label, plain = self._drawn(x, label, position, drawn - config.turned_share)
        return x, label, noise, plain

    def _drawn(self, x: Tensor, label: int, position: int, drawn: float) -> tuple[Tensor, int, bool]:
        """The picture halved or mixed, where the number drawn falls into their shares, and as models draw it; its label, and whether there
        was no such half or mixture. These have a generator of their own, so that a judge without them is what it was."""
        config = self.config
        generator = position_generator(config.run.seed, position, "kinds")
        kinds = []
        if 0 <= drawn < config.half_share + config.mixed_share:
            kinds.append("half" if drawn < config.half_share else "mixed")
        for kind, share in (("ghost", config.ghost_share), ("faded", config.faded_share), ("blurred", config.blurred_share)):
            chosen = float(torch.rand((), generator=generator)) < share
            kinds += [kind] if chosen and not (kind == "ghost" and kinds) else []  # three letters on each other are not asked for
        plain = False
        for kind in kinds:
            found = self.train_drawing.draw(kind, x, label, position, generator)
            plain |= found is None and kind in ("half", "mixed")
            x, label = found or (x, label)
        return x, label, plain

    @torch.no_grad()
    def _round_trips(self, x: Tensor, positions: list[int]) -> Tensor:
        """x [B, 3, H, W], of which some pictures (`round_trip_share`) went through one of the VAEs."""
        if not self.config.round_trip_share:
            return x
        drawn = torch.stack([torch.rand(2, generator=position_generator(self.config.run.seed, p, "round trip")) for p in positions])
        through = (drawn[:, 1] * len(self.vaes)).long()
        chosen = drawn[:, 0] < self.config.round_trip_share
        for number, vae in enumerate(self.vaes):
            rows = (chosen & (through == number)).nonzero()[:, 0].to(x.device)
            if len(rows):
                x = x.index_copy(0, rows, _round_trip(vae, x[rows]))
        return x

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Logs `val/accuracy` on upright letters, `val/accuracy/turned` on all their turned forms that readers agree on, and
        `val/accuracy/KIND` on one drawing of each kind, also of kinds that this judge was not trained on. Letters that have no drawing of
        a kind (most have no half) do not count in it. Drawings depend on the position in the data alone, so judges with the same
        validation data see the same ones. `val/accuracy/round_trip` is there only where training has it, which opens the VAEs."""
        labels, keys = batch["label"].tolist(), batch["position"].tolist()
        self._score("val/accuracy", batch["x"], labels, prog_bar=True)
        turned = [(view(x), turned_label(label, view.name)) for view in D4[1:] for x, label in zip(batch["x"], labels)]
        self._score("val/accuracy/turned", *_columns([(x, label) for x, label in turned if label is not None]))
        for kind in KINDS:
            made = (
                self.val_drawing.draw(kind, x, label, position, position_generator(0, position, f"val/{kind}"))
                for x, label, position in zip(batch["x"], labels, keys)
            )
            if found := [each for each in made if each is not None]:
                self._score(f"val/accuracy/{kind}", *_columns(found))
        for vae in self.vaes:  # one name, so their mean
            self._score("val/accuracy/round_trip", _round_trip(vae, batch["x"]), labels)

    def _score(self, name: str, x: Tensor, labels: Sequence[int], **options) -> None:
        right = (self.network(x).argmax(1) == torch.tensor(labels, device=self.device)).float()
        self.log(name, right.mean(), batch_size=len(labels), sync_dist=True, **options)


def _columns(pairs: list[tuple[Tensor, int]]) -> tuple[Tensor, list[int]]:
    pictures, labels = zip(*pairs)
    return torch.stack(pictures), list(labels)


@torch.no_grad()
def _round_trip(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """[B, 3, H, W]: D(E(x)), as a model's decoder draws it."""
    return decode(vae.to(x.device), encode(vae, x)).clamp(-1, 1).to(x)


def prepare_judge(config: JudgeConfig) -> tuple[JudgeTraining, ShardData]:
    """What the stage trains, as it starts, and its data. Raises as the data module, and ValueError where the pictures carry no labels, or
    the VAEs do not take them."""
    data = ShardData(config)
    for folder, samples in ((config.data.train, data.train_samples), (config.data.val, data.val_samples)):
        if samples[0]["label"] < 0:
            raise ValueError(f"data set '{folder}' has no labels: the judge learns from glyph shards (data/glyphs.py)")
    train, val = data.train_samples, data.val_samples
    assert isinstance(train, PictureSamples) and isinstance(val, PictureSamples)  # no latents are asked for
    vaes = [load_vae(PRETRAINED / name) for name in VAES] if config.round_trip_share else []
    for vae, samples in product(vaes, (train, val)):
        if any(side % downsampling(vae) for side in samples.image_size):
            raise ValueError(
                f"round_trip_share: pictures are {samples.image_size[0]} x {samples.image_size[1]}, and the VAEs take multiples of "
                f"{downsampling(vae)}: make them so (data/glyphs.py --size), or set it to 0"
            )
    torch.manual_seed(config.run.seed)
    return JudgeTraining(config, make_network(config.architecture, dict(config.architecture_args)), train, val, vaes), data


def export_judge(module: JudgeTraining, data: ShardData, folder: Path) -> None:
    """Write the judge's folder."""
    config, samples = module.config, data.train_samples
    assert isinstance(samples, PictureSamples)  # `prepare_judge` asks for no latents
    about = {"architecture": config.architecture, "args": dict(config.architecture_args), "image_size": samples.image_size[0]}
    save_judge(folder, module.network, about)


def train_judge(config: JudgeConfig) -> Path:
    """Trains the judge, or resumes; writes `RUN/model` and returns it. Raises as the other stages and `prepare_judge`."""
    if done := finished_model(config):
        return done
    check_machine(config.run)
    module, data = prepare_judge(config)
    checkpoint = prepare_run(config)
    trainer = make_trainer(config, automatic_accumulation=True)
    fit(trainer, module, data, checkpoint)
    folder = Path(config.run.dir) / "model"
    if trainer.is_global_zero:
        export_judge(module, data, folder)
        finish_run(config, trainer)
    trainer.strategy.barrier()
    return folder
