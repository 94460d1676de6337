"""The studio, a page to make anagrams in: python -m eqldm.studio [--model FOLDER]

Choose a model, prompts and views, see pictures form step by step in all their views, keep the good seeds, and take them away as PNG, MP4
and a gallery. Needs the extra `studio` (Gradio): pip install -e .[studio]. Only this machine can open it, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eqldm.anagram.animation import animate, write_animation
from eqldm.anagram.gallery import Shown, write_gallery
from eqldm.anagram.options import REDUCTIONS, Options
from eqldm.anagram.sampling import SCHEDULERS, Sampler
from eqldm.data.samples import tensor_to_picture
from eqldm.model_folder import PRETRAINED
from eqldm.sample import DEFAULT, DEFAULTS, command, write_picture
from eqldm.views import View, parse_view
from eqldm.views.zoo import FORMS, SIMPLE

try:
    import gradio as gr
except ImportError:  # the extra `studio` is not installed: `main` says so
    gr = None

PREVIEWS = 10  # of a picture that forms
OWN = "the model's own"


@dataclass(frozen=True, eq=False)
class Made:
    """A picture x [3, H, W] in [-1, 1], and all that makes it again."""

    x: Tensor
    seed: int
    prompts: list[str]
    views: list[View]
    settings: dict
    batch: list[int]

    @property
    def command(self) -> str:
        return command(self.settings, self.batch)


@lru_cache(maxsize=2)
def sampler_of(model: str) -> Sampler:
    """Opened once."""
    return Sampler.open(model, precision="auto")


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def make(model: str, prompts: list[str], names: list[str], seeds: list[int], **options) -> Iterator[list[Made]]:
    """The pictures of seeds as they form, then as they are. Raises ValueError, FileNotFoundError for what does not fit."""
    sampler = sampler_of(model)
    views = [parse_view(name, sampler.side()) for name in names]
    chosen = Options(**options)
    chosen.check(len(views))
    sampler.check(prompts, views)
    sampler.check_negation(views)
    sampler.solver(chosen.scheduler, chosen.blend, chosen.time_travel)
    settings = {
        **DEFAULTS, **options, "guidance_scale": [options["guidance_scale"]], "negative_prompt": [options["negative_prompt"]],
        "model": model, "prompts": prompts, "views": [view.name for view in views], "device": str(sampler.device),
        "precision": sampler.precision, "scheduler": options["scheduler"] or type(sampler.networks.scheduler).__name__,
    }  # fmt: skip

    def made(pictures: Tensor) -> list[Made]:
        return [Made(x, seed, prompts, views, settings, seeds) for seed, x in zip(seeds, pictures)]

    estimates: queue.Queue[Tensor | BaseException | None] = queue.Queue()

    def work() -> None:
        try:
            estimates.put(sampler.decode(sampler.latents(prompts, views, seeds, watch=estimates.put, **options)))
        except BaseException as error:  # is raised where the pictures are waited for
            estimates.put(error)
        estimates.put(None)

    threading.Thread(target=work, daemon=True).start()
    every, last = max(1, chosen.num_calls // PREVIEWS), None
    for number, found in enumerate(iter(estimates.get, None)):
        if isinstance(found, BaseException):
            raise found
        last = found
        if found.shape[1] != 3 and number % every == 0:
            yield made(sampler.decode(found))
    yield made(last)


def as_shown(pictures: Sequence[Made]) -> list[tuple[Image.Image, str]]:
    """Each picture in each of its views, enlarged where it is small, with what it should read as."""
    shown = []
    for made in pictures:
        for view, prompt in zip(made.views, made.prompts):
            picture = tensor_to_picture(view(made.x))
            factor = max(1, 256 // picture.width)
            picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
            shown.append((picture, f"seed {made.seed}, {view.name}: {prompt}"))
    return shown


def columns_of(views: Sequence[View]) -> int:
    """As many as are a whole number of pictures in all their views, and fit beside each other."""
    return len(views) * max(1, 4 // len(views))


def export(kept: Sequence[Made], folder: Path, films: bool) -> Path:
    """Writes PNG, JSON, perhaps MP4 and a gallery, a folder for each set of settings; returns one archive of all."""
    groups: dict[str, list[Made]] = {}
    for made in kept:
        groups.setdefault(json.dumps(made.settings), []).append(made)
    for number, group in enumerate(groups.values(), 1):
        out = folder / f"anagrams-{number}"
        out.mkdir(parents=True)
        for made in group:
            write_picture(out, made.x, {**made.settings, "seed": made.seed, "command": made.command})
            if films:
                write_animation(list(animate(made.x, made.views, made.prompts)), out / f"{made.seed}.mp4", "mp4")
        shown = [Shown(made.x, f"seed {made.seed}", made.command) for made in group]
        write_gallery(out / "index.html", shown, group[0].views, group[0].prompts)
    return Path(shutil.make_archive(str(folder), "zip", folder))


def build(model: str):
    """The page."""

    def sample(model, prompts, views, seed, count, steps, scale, negative, style, scheduler, reduction, travel):
        options = {
            "num_inference_steps": int(steps), "guidance_scale": float(scale), "negative_prompt": negative, "style": style,
            "scheduler": None if scheduler == OWN else scheduler, "reduction": reduction, "time_travel": int(travel),
        }  # fmt: skip
        seeds = list(range(int(seed), int(seed) + int(count)))
        try:
            for pictures in make(model, lines(prompts), lines(views), seeds, **options):
                yield gr.Gallery(as_shown(pictures), columns=columns_of(pictures[0].views)), [], ""  # none can be kept before it is whole
            yield gr.skip(), pictures, f"{len(seeds)} pictures. Click those that are to be kept."
        except (ValueError, OSError) as error:
            yield gr.skip(), [], f"**{error}**"

    def keep(pictures, kept, chosen: gr.SelectData):
        made = pictures[chosen.index // len(pictures[0].views)] if pictures else None
        if made is not None:
            others = [other for other in kept if (other.command, other.seed) != (made.command, made.seed)]
            kept = others if len(others) < len(kept) else [*kept, made]
        return kept, as_shown(kept), f"{len(kept)} kept"

    def take(kept, films):
        if not kept:
            return None, "Nothing is kept yet: click a picture first."
        try:
            return str(export(kept, Path(tempfile.mkdtemp()) / "anagrams", films)), f"{len(kept)} pictures"
        except OSError as error:
            return None, f"**{error}**"

    known = ", ".join([*SIMPLE, *(form.text(name) for name, form in FORMS.items())])
    with gr.Blocks(title="eqldm studio", analytics_enabled=False) as page:
        pictures, kept = gr.State([]), gr.State([])
        gr.Markdown("# eqldm studio\nOne picture, several readings: one prompt for each view.")
        with gr.Row():
            with gr.Column(scale=1):
                prompts = gr.Textbox("the letter A\nthe letter V", label="Prompts, one a line", lines=3)
                views = gr.Textbox("identity\nrotate_180", label="Views, one a line", lines=3, info=known)
                with gr.Row():
                    seed, count = gr.Number(0, label="First seed", precision=0), gr.Slider(1, 16, 4, step=1, label="Pictures")
                with gr.Accordion("More", open=False):
                    folder = gr.Textbox(model, label="Model folder")
                    steps, scale = gr.Slider(1, 100, 30, step=1, label="Steps"), gr.Slider(1, 15, 5, label="Guidance")
                    negative, style = gr.Textbox("", label="Negative prompt"), gr.Textbox("", label="Style, before each prompt")
                    scheduler = gr.Dropdown([OWN, *SCHEDULERS], value=OWN, label="Scheduler")
                    reduction = gr.Dropdown([name for name in REDUCTIONS if name != "weighted"], value="mean", label="Reduction")
                    travel = gr.Slider(1, 4, 1, step=1, label="Time travel")
                button, note = gr.Button("Sample", variant="primary"), gr.Markdown("")
            with gr.Column(scale=2):
                forming = gr.Gallery(
                    label="Pictures, each in its views", columns=4, height="auto", allow_preview=False, format="png", elem_id="forming"
                )
                shown = gr.Gallery(label="Kept", columns=6, height="auto", allow_preview=False, format="png", elem_id="kept")
                number = gr.Markdown("0 kept")
                with gr.Row():
                    films, away = gr.Checkbox(True, label="with MP4"), gr.Button("Take them away")
                file = gr.File(label="PNG, JSON, MP4 and gallery")
        inputs = [folder, prompts, views, seed, count, steps, scale, negative, style, scheduler, reduction, travel]
        button.click(sample, inputs, [forming, pictures, note], concurrency_limit=1)
        forming.select(keep, [pictures, kept], [kept, shown, number])
        away.click(take, [kept, films], [file, number], concurrency_limit=1)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PRETRAINED / DEFAULT), help="model folder (default: the shipped glyphs-eq)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in, who may then open any folder")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    args = parser.parse_args()
    if gr is None:
        sys.exit("error: the studio needs Gradio: pip install -e .[studio]")
    try:
        sampler_of(args.model)
        page = build(args.model)
        page.launch(server_name=args.host, server_port=args.port, share=False, footer_links=[])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
