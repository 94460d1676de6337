"""What the studies share: commands of this repository, run once (a second call finds them done), and tables over seeds."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from eqldm.markdown import markdown
from eqldm.model_folder import PRETRAINED

ROOT = Path(__file__).resolve().parents[1]
BASE = PRETRAINED / "glyphs-base"


def path(text: str) -> Path:
    """A path option, made absolute: the commands run in the repository, the user may not."""
    return Path(text).resolve()


def call(*words) -> None:
    """Runs `python WORDS` in the repository, showing the command. Raises SystemExit where it fails."""
    print("$ python " + shlex.join(map(str, words)), flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"error: the command above failed ({done.returncode}); the same call goes on from there")


def shards(folder: Path) -> list[str]:
    """The options that read a folder's `train` and `val`."""
    return [f"data.{split}={folder / split}" for split in ("train", "val")]


def slug(name: str) -> str:
    """A folder's name for a table's row: words joined by dashes."""
    return "-".join(re.findall(r"[\w+]+", name))


def last(overrides: Sequence[str]) -> list[str]:
    """Each option once, as given last: a variant's own, or that of --set, in place of the study's."""
    return list({item.partition("=")[0]: item for item in overrides}.values())


def train(config: str, folder: Path, *overrides: str) -> Path:
    """The model that a config's run leaves in `folder`; trained now, or resumed, unless it is there."""
    call("train.py", config, *last([f"run.dir={folder}", *overrides]))
    return folder / "model"


def script(about: str) -> argparse.ArgumentParser:
    """The parser of a script; `about` is its docstring."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def print_table(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], str]) -> None:
    """Prints what `run` makes of the arguments; of a ValueError or OSError one line, and ends."""
    try:
        print(run(parser.parse_args()), end="")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def study(about: str) -> argparse.ArgumentParser:
    """The options that every study has; `about` is its docstring."""
    parser = script(about)
    parser.add_argument("--data", type=path, default=ROOT / "runs" / "glyphs" / "pictures", help="glyph shards: train, val, test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of every training")
    parser.add_argument("--out", type=path, required=True)
    return parser


def autoencoders(config: str, folder: Path, args: argparse.Namespace, options: Sequence[str], *evaluation) -> list[dict[str, float]]:
    """The metrics on `test` of an autoencoder's config with these options, trained to `folder/vaeSEED` by each of --seeds seeds for
    --num-steps. evaluation: further options of it."""
    found = []
    for seed in range(args.seeds):
        run = folder / f"vae{seed}"
        model = train(config, run, f"run.num_steps={args.num_steps}", f"run.seed={seed}", *shards(args.data), *options, *args.set)
        sizes = ["--without", "lpips", "inception", "judge", "--num-images", args.num_images, *evaluation]
        found.append(evaluate(run / "evaluation", model, args.data / "test", *sizes))
    return found


def encode(data: Path, vae: Path, out: Path, *options: str) -> Path:
    """Latent shards `out/train` and `out/val` of a picture set's. options: further ones of data/encode_latents.py."""
    for split in ("train", "val"):
        call("data/encode_latents.py", "--data", data / split, "--model", vae, "--out", out / split, *options)
    return out


def evaluate(out: Path, model: Path, data: Path, *options) -> dict[str, float]:
    """The metrics of a model; evaluated now unless `out` holds them. Raises SystemExit where it holds those of other options."""
    arguments = [str(word) for word in (model, "--data", data, "--out", out, *options)]
    stamp = out / "arguments.json"
    if not stamp.exists():
        call("-m", "eqldm.evaluate", *arguments)
        stamp.write_text(json.dumps(arguments) + "\n")
    elif (before := json.loads(stamp.read_text())) != arguments:
        sys.exit(f"error: '{out}' holds an evaluation with other options ({shlex.join(before)}): remove it, or give another --out")
    (metrics,) = out.glob("*/metrics.json")
    return json.loads(metrics.read_text())


def logged(run: Path, name: str) -> list[dict[str, str]]:
    """The rows of a run's log that hold a metric."""
    with open(run / "logs" / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get(name)]


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ± {statistics.stdev(values):.2g}"


def spreads(found: Sequence[dict[str, float]], columns: dict[str, str]) -> list[str]:
    """The `spread` of each column's metric over what was found by each seed. columns: heading: metric."""
    return [spread([metrics[metric] for metrics in found]) for metric in columns.values()]


def table(heading: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table, a row for each name."""
    return markdown([heading, *columns], [[name, *cells] for name, cells in rows.items()])
