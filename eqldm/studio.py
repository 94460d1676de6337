"""The studio, a page to make anagrams in: python -m eqldm.studio [--model FOLDER]

Choose a model, prompts, and views or parts, see pictures form step by step in all of them, keep the good seeds, and take them away as PNG,
MP4 and a gallery. Needs the extra `studio` (Gradio): pip install -e .[studio]. Only this machine can open it, unless --host says otherwise;
it answers to no other names than this machine's and those of --allow-host.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eqldm.anagram.animation import write_animation
from eqldm.anagram.gallery import Shown
from eqldm.anagram.options import Options
from eqldm.anagram.recipes import Anagram, Composition, Recipe, released
from eqldm.anagram.sampling import Sampler
from eqldm.command import Parser, error_line, whole
from eqldm.data.samples import tensor_to_picture
from eqldm.form import CHOICES, KINDS, MOST_CHARACTERS, NUMBERS, OWN, PARTS, VIEWS, read_form
from eqldm.gate import MOST_BYTES, Gate, check_listening, is_everywhere, names_of
from eqldm.model_folder import PRETRAINED
from eqldm.paths import place_option
from eqldm.sample import DEFAULT, SWITCHES, check_seeds, command, hashes, record, write_picture
from eqldm.views import components
from eqldm.views.zoo import FORMS, SIMPLE

try:
    import gradio as gr
except ImportError:  # the extra `studio` is not installed: `main` says so
    gr = None

PREVIEWS = 10  # of a picture that forms
MOST_WAITING = 32  # clicks that wait for their turn
MOST_SESSIONS = 100  # pages that are open, whose pictures are held


class Stopped(Exception):
    """The one who looks on has seen enough."""


@dataclass(frozen=True, eq=False)
class Made:
    """A picture x [3, H, W] in [-1, 1], and all that makes it again."""

    x: Tensor
    seed: int
    recipe: Recipe
    settings: dict
    batch: list[int]

    @property
    def command(self) -> str:
        return command(self.settings, self.batch)


def sampler_of(model: str) -> tuple[Sampler, Mapping[str, str]]:
    """A model, and the hashes of its weights; opened once, and again where the folder has changed since."""
    found = Path(model).rglob("*") if (Path(model) / "unet").is_dir() else ()  # never through all of what is no model, such as /
    files = sorted(path for path in found if path.is_file())
    return _opened(model, tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@lru_cache(maxsize=2)
def _opened(model: str, files: tuple) -> tuple[Sampler, Mapping[str, str]]:
    sampler = Sampler.open(model, precision="auto")
    return sampler, hashes(sampler)


def told(error: Exception) -> str:
    """What the page says of an error: the line that sample.py would print, of one that was not foreseen what it was and where more is."""
    text = " ".join(str(error).encode(errors="replace").decode().split())
    if isinstance(error, ValueError | OSError):
        text = text if len(text) <= 1000 else f"{text[:500]} ... {text[-500:]}"  # it may quote what was typed
    else:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text[:300]} (not foreseen; the terminal of the studio shows where)"
    return "**error: " + re.sub(r"([\\`*_\[\]<>#~|&@]|:(?=//)|(?<=www)\.)", r"\\\1", text) + "**"  # as it is: no Markdown, HTML or link


def make(
    model: str, prompts: list[str], asked: Sequence[str] | str, seeds: list[int], options: Options, stop: threading.Event | None = None
) -> Iterator[list[Made]]:
    """The pictures of seeds as they form, then as they are. asked: views, or components by name.  stop: ends it; the step at hand is done.

    Raises ValueError, FileNotFoundError for what does not fit; `Stopped`.
    """
    if not seeds:
        raise ValueError("no pictures are asked for: wanted one or more")
    check_seeds(seeds[0], len(seeds))
    sampler, known = sampler_of(model)
    recipe = Composition(sampler, prompts, asked, options) if isinstance(asked, str) else Anagram(sampler, prompts, asked, options)
    settings = record(model, recipe, known, dict.fromkeys(SWITCHES, False))
    stop, shows = stop or threading.Event(), released(recipe)
    every = max(1, sampler.num_calls(options) // PREVIEWS)  # before the thread, which a tokenizer that both use would confuse

    def made(pictures: Tensor) -> list[Made]:
        return [Made(x, seed, shows, settings, seeds) for seed, x in zip(seeds, pictures)]

    found: queue.Queue[tuple[bool, Tensor] | BaseException | None] = queue.Queue()  # whether it is the end; an estimate, or pictures

    def watch(estimate: Tensor) -> None:
        if stop.is_set():
            raise Stopped
        found.put((False, estimate))

    def work() -> None:
        try:
            found.put((True, recipe.sample(seeds, watch=watch)))
        except BaseException as error:  # is raised where the pictures are waited for
            found.put(error)
        found.put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        number = 0
        while (each := found.get()) is not None:
            if isinstance(each, BaseException):
                raise each
            done, x = each
            if stop.is_set() and not done:
                raise Stopped
            if done or number % every == 0:
                yield made(x if done else recipe.preview(x))
            number += 1
    finally:  # nobody waits for the rest
        stop.set()


def as_shown(pictures: Sequence[Made]) -> list[tuple[Image.Image, str]]:
    """Each picture from all its sides, enlarged where it is small, with what it should read as."""
    shown = []
    for made in pictures:
        for heading, face in zip(made.recipe.headings, made.recipe.sides(made.x)):
            picture = tensor_to_picture(face)
            factor = max(1, 256 // picture.width)
            picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
            shown.append((picture, f"seed {made.seed}, {heading}"))
    return shown


def sides_of(made: Made) -> int:
    """In how many pictures it is shown."""
    return len(made.recipe.headings)


def export(kept: Sequence[Made], folder: Path, films: bool) -> Path:
    """Writes PNG, JSON, perhaps MP4 and a gallery, a folder for each batch; returns one archive of all.

    Raises OSError that says what to do where it cannot be written; nothing is left then."""
    try:
        return _export(kept, folder, films)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        Path(f"{folder}.zip").unlink(missing_ok=True)
        why = error.strerror or str(error)
        raise OSError(f"'{folder.parent}' cannot be written to ({why}): make room, or start the studio with TMPDIR=DIR") from error


def _export(kept: Sequence[Made], folder: Path, films: bool) -> Path:
    groups: dict[str, list[Made]] = {}
    for made in kept:
        groups.setdefault(json.dumps([made.settings, made.batch]), []).append(made)
    for number, group in enumerate(groups.values(), 1):
        out = folder / f"anagrams-{number}"
        out.mkdir(parents=True)
        for made in group:
            write_picture(out, made.x, {**made.settings, "seed": made.seed, "command": made.command})
            if films:
                write_animation(list(made.recipe.animate(made.x)), out / f"{made.seed}.mp4", "mp4")
        shown = [Shown(made.x, f"seed {made.seed}", made.command) for made in group]
        group[0].recipe.write_gallery(out / "index.html", shown)
    return Path(shutil.make_archive(str(folder), "zip", folder))


def build(model: str):
    """The page."""
    # what stops the sampling of each who has the page open: the job at hand, and clicks since then, which Gradio may have left out
    running: dict[str, list[threading.Event]] = {}

    def sample(
        model, prompts, kind, views, parts, seed, count, steps, scale, negative, style, scheduler, reduction, blend, travel, upscale,
        request: gr.Request,
    ):  # fmt: skip
        formed = False  # until then, what stood here before stands, and can be kept
        try:
            asked = read_form(
                model, prompts, kind, views, parts, seed, count, steps, scale, negative, style, scheduler, reduction, blend, travel, upscale
            )  # not Gradio's `preprocess`, which would say no more than "Error"
            # a program that asks may not have clicked
            stop = running[request.session_hash][-1] if request.session_hash in running else threading.Event()
            running[request.session_hash] = [stop]
            for pictures in make(*asked, stop):
                columns = sides_of(pictures[0]) * max(1, 4 // sides_of(pictures[0]))  # whole pictures, in all that they are, beside another
                yield gr.Gallery(as_shown(pictures), columns=columns), [], ""  # none can be kept before it is whole
                formed = True
            yield gr.skip(), pictures, f"{len(pictures)} pictures. Click those that are to be kept."
        except Stopped:
            yield gr.skip(), [] if formed else gr.skip(), "Stopped" + (": these are half-formed, none can be kept." if formed else ".")
        except Exception as error:  # else the page would say no more than "Error"
            yield gr.skip(), [] if formed else gr.skip(), told(error)

    def begin(request: gr.Request):
        running.setdefault(request.session_hash, []).append(threading.Event())

    def halt(request: gr.Request):
        for event in running.get(request.session_hash, []):
            event.set()

    def keep(pictures, kept, chosen: gr.SelectData):
        number = chosen.index // sides_of(pictures[0]) if pictures else 0
        made = pictures[number] if number < len(pictures) else None  # not whole yet
        if made is not None:
            others = [other for other in kept if (other.command, other.seed) != (made.command, made.seed)]
            kept = others if len(others) < len(kept) else [*kept, made]
        return kept, as_shown(kept), f"{len(kept)} kept"

    def take(kept, films):
        if not kept:
            return None, "Nothing is kept yet: click a picture first."
        try:
            folder = Path(tempfile.mkdtemp()) / "anagrams"
            archive = export(kept, folder, films)
            shutil.rmtree(folder)  # the archive holds it all
            return str(archive), f"{len(kept)} pictures"
        except Exception as error:
            return None, told(error)

    def slider(label: str, value: float, **more) -> gr.Slider:
        return gr.Slider(NUMBERS[label].low, NUMBERS[label].high, value, label=label, **more)

    def textbox(value: str, **more) -> gr.Textbox:
        return gr.Textbox(value, max_length=MOST_CHARACTERS, **more)

    known = ", ".join([*SIMPLE, *(form.text(name) for name, form in FORMS.items())])
    with gr.Blocks(title="eqldm studio", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:  # pictures shown, after a day
        pictures, kept = gr.State([]), gr.State([])
        gr.Markdown("# eqldm studio\nOne picture, several readings: one prompt for each view, or for each part.")
        with gr.Row():
            with gr.Column(scale=1):
                prompts = textbox("the letter A\nthe letter V", label="Prompts, one a line", lines=3)
                kind = gr.Radio(KINDS, value=VIEWS, label="One prompt for each of")
                views = textbox("identity\nrotate_180", label="Views, one a line", lines=3, info=known)
                parts = textbox("hybrid:0.06", label="Parts", info=", ".join(components.FORMS.values()), visible=False)
                with gr.Row():
                    seed, count = gr.Number(0, label="First seed", precision=0), slider("Pictures", 4, step=1)
                with gr.Accordion("More", open=False):
                    folder = textbox(model, label="Model folder")
                    steps, scale = slider("Steps", 30, step=1), slider("Guidance", 5)
                    negative, style = textbox("", label="Negative prompt"), textbox("", label="Style, before each prompt")
                    chosen = {"Scheduler": OWN, "Reduction": "mean", "Blend in": "latents"}
                    scheduler, reduction, blend = (gr.Dropdown(CHOICES[name], value=own, label=name) for name, own in chosen.items())
                    blend.info = "pixels: slower; hybrids and colour want it"
                    travel = slider("Time travel", 1, step=1)
                    upscale = slider("Upscale", 1, step=1, info="a second pass, so many times larger")
                with gr.Row():
                    button, stop = gr.Button("Sample", variant="primary"), gr.Button("Stop")
                note = gr.Markdown("", latex_delimiters=[], elem_id="note")
            with gr.Column(scale=2):
                forming = gr.Gallery(
                    label="Pictures, each in its views", columns=4, height="auto", allow_preview=False, format="png", elem_id="forming"
                )
                shown = gr.Gallery(label="Kept", columns=6, height="auto", allow_preview=False, format="png", elem_id="kept")
                number = gr.Markdown("0 kept")
                with gr.Row():
                    films, away = gr.Checkbox(True, label="with MP4"), gr.Button("Take them away")
                file = gr.File(label="PNG, JSON, MP4 and gallery")
        sampled_with = [steps, scale, negative, style, scheduler, reduction, blend, travel, upscale]
        inputs = [folder, prompts, kind, views, parts, seed, count, *sampled_with]
        # `begin` waits for nobody, so that one can stop what still waits for its turn
        button.click(begin, queue=False).then(sample, inputs, [forming, pictures, note], concurrency_limit=1, preprocess=False)
        stop.click(halt, queue=False)
        page.unload(halt)
        kind.change(lambda kind: (gr.update(visible=kind == VIEWS), gr.update(visible=kind == PARTS)), kind, [views, parts])
        forming.select(keep, [pictures, kept], [kept, shown, number])
        away.click(take, [kept, films], [file, number], concurrency_limit=1)
    return page


def serve(page, host: str = "127.0.0.1", port: int | None = None, further: Sequence[str] = ()) -> str:
    """Opens the page to its users, and returns its address. further: names that it answers to beside this machine's own and `host`.

    Raises ValueError, OSError where it cannot be served there.
    """
    check_listening(host, port)
    names = names_of(host, further)

    @asynccontextmanager
    async def behind_gate(app):  # outside of all that Gradio has put around its application, before the first request
        app.middleware_stack = Gate(app.middleware_stack, names, is_everywhere(host))
        yield

    page.queue(max_size=MOST_WAITING)
    _, address, _ = page.launch(
        server_name=f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host, server_port=port, share=False,
        footer_links=[], prevent_thread_lock=True, app_kwargs={"lifespan": behind_gate}, max_file_size=MOST_BYTES,
        state_session_capacity=MOST_SESSIONS, show_error=True, ssr_mode=False, num_workers=0, mcp_server=False, run_history=False,
        enable_monitoring=False,
    )  # fmt: skip
    return address


def _end(number: int, frame) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a further Ctrl-C ends it there and then
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
    raise SystemExit(128 + number)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--model", type=place_option, default=str(PRETRAINED / DEFAULT), help="model folder (default: the shipped glyphs-eq)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in, who may then open any folder")
    parser.add_argument("--port", type=whole(1, 65535), help="default: the first free one from 7860")
    parser.add_argument(
        "--allow-host", nargs="+", action="extend", default=[], metavar="NAME",
        help="names that it answers to beside localhost and --host, such as that of a proxy before it",
    )  # fmt: skip
    args = parser.parse_args()
    if gr is None:
        sys.exit("error: the studio needs Gradio: pip install -e .[studio]")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        # all that it writes lies in one folder, which goes with it
        with tempfile.TemporaryDirectory(prefix="eqldm-studio-", ignore_cleanup_errors=True) as tempfile.tempdir:
            sampler_of(args.model)
            page = build(args.model)
            try:
                serve(page, args.host, args.port, args.allow_host)
                threading.Event().wait()
            finally:
                page.close(verbose=False)
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    except SystemExit as told:  # a thread may be at a step of a picture, which nobody waits for
        sys.stdout.flush()
        os._exit(int(told.code or 0))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
