"""The report of benchmarks/gpu.py: on which machine, and a table for each part, of the results so far."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from eqldm.markdown import markdown
from gpu_parts import BEGUN, DONE, FAILED, SKIPPED, STOPPED

Row = Mapping[str, Any]
PACKAGES = ("torch", "pytorch-lightning", "diffusers", "transformers", "accelerate", "deepspeed")
MFU_WANTED = 0.4  # of the UNet's training, on an H100
TIMES_WANTED = 2.0  # as many pictures/s of the autoencoder's training as written plainly


def about(device: str) -> dict[str, Any]:
    """The machine and the versions. Raises ValueError where there is no such device."""
    import torch

    from eqldm.training.run_folder import git_commit

    found: dict[str, Any] = {"device": f"CPU ({platform.machine()})", "date": time.strftime("%Y-%m-%d"), "commit": git_commit()}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("torch sees no GPU on this machine. A rehearsal without one: --device cpu --tiny")
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "device_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    found["versions"] = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def report(rows: Sequence[Row]) -> str:
    """All of it, in Markdown."""
    machine = next((row for row in rows if row["part"] == "about"), {})
    lines = [f"# {machine.get('device', 'unknown device')}", ""]
    versions = ", ".join(f"{name} {number}" for name, number in machine.get("versions", {}).items())
    lines += [f"{machine.get('date')}, commit {machine.get('commit')}, {machine.get('minutes')} minutes; {versions}", ""]
    if machine.get("tiny"):
        lines += ["**A rehearsal** with small models and few steps: its times say nothing.", ""]
    for title, make in {"Right": right, "Fast": fast, "Sampling": sampling, "Learn": learn}.items():
        part = [row for row in rows if row["part"] == title.lower()]
        if part:
            lines += [f"## {title}", "", *make(rows), "", *unfinished(part)]
    return "\n".join(lines).rstrip() + "\n"


def done(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and row["state"] == DONE]


def unfinished(part: Sequence[Row]) -> list[str]:
    """What failed, was not begun or did not end, and why."""
    ended = {row["name"] for row in part if row["state"] != BEGUN}
    lines = [f"- {row['name']}: did not end" for row in part if row["state"] == BEGUN and row["name"] not in ended]
    told = {FAILED: "**failed**", SKIPPED: "not run", STOPPED: "stopped"}
    lines += [f"- {row['name']}: {told[row['state']]}, {row.get('why', 'no reason given')}" for row in part if row["state"] in told]
    return [*lines, ""] if lines else []


def right(rows: Sequence[Row]) -> list[str]:
    tests = [row for row in done(rows, "right") if row["name"] != "tests"]
    cells = []
    for row in tests:
        measured = [f"{name} {value:.2g}" for name, value in row.items() if isinstance(value, float) and name != "seconds"]
        cells.append([row["name"].partition("::")[2], ", ".join(measured) or "-", f"{row['seconds']:.1f}"])
    (*_, whole) = [{}, *(row for row in rows if row["name"] == "tests")]
    return [
        f"{len(tests)} passed{'; ' + whole['why'] if whole.get('why') else ''}.",
        "",
        *markdown(["test", "measured", "s"], cells).splitlines(),
    ]


def fast(rows: Sequence[Row]) -> list[str]:
    """The trainings, each beside the row of its network, size and batch without any option for speed, and beside the prediction."""
    found = done(rows, "fast")
    trainings = [row for row in found if "train/samples_per_second" in row]
    predicted = {(row["network"], row["size"]): row for row in done(rows, "predicted")}
    peak = next((row["peak"] for row in trainings if row.get("peak") and "bf16" in row["options"]), None)
    device = next((row["device"] for row in rows if row["part"] == "about"), "")
    cells = []
    for row in trainings:
        rate, need = row["train/samples_per_second"], predicted.get((row["network"], row["size"]))
        plain = rate_of(trainings, row)
        memory = row.get("train/max_memory_gb")
        half = rate_of(trainings, row, "bf16")
        times = [f"{rate / base:.2f}" if base else "-" for base in (plain, half)]
        found_here = [*times, f"{share:.1%}" if (share := mfu(row, need)) else "-"]
        cells.append([row["name"], f"{rate:.1f}", *found_here, f"{memory:.1f}" if memory else "-", prediction(row, need, peak, device)])
    heading = ["training", "pictures/s", "times plain", "times bf16", "MFU", "GB", "predicted, bf16"]
    lines = markdown(heading, cells).splitlines() if cells else ["No training was measured."]
    return [*lines, "", *targets(trainings, predicted), *outside(found)]


def prediction(row: Row, need: Row | None, peak: float | None, device: str) -> str:
    """What eqldm.budget says of a training's pictures/s, for the cards that it knows, and of its memory."""
    if need is None:
        return "-"
    share = next((share for name, share in need["utilisation"].items() if name in device), None)
    rate = f"{share * peak / need['operations']:.0f}/s, " if peak and share else ""
    return f"{rate}{need['fixed_gb'] + row['batch'] * need['each_gb']:.2g} GB"


def rate_of(trainings: Sequence[Row], row: Row, options: str = "plain") -> float | None:
    """Pictures/s of the same step with other options for speed; without any it is written plainly."""
    same = [each for each in trainings if alike(each, row) and each["options"] == options]
    return same[0]["train/samples_per_second"] if same else None


def alike(one: Row, other: Row) -> bool:
    return all(one[name] == other[name] for name in ("network", "size", "batch"))


def mfu(row: Row, need: Row | None) -> float | None:
    """The share of the device's bfloat16 peak; None of a training in float32, whose convolutions a GPU computes in tf32."""
    known = need and row.get("peak") and "bf16" in row["options"]
    return row["train/samples_per_second"] * need["operations"] / row["peak"] if need and known else None


def targets(trainings: Sequence[Row], predicted: Mapping[tuple[str, int], Row]) -> list[str]:
    """What was wanted, and what was reached."""
    lines = []
    shares = [share for row in trainings if row["network"] == "unet" and (share := mfu(row, predicted.get(("unet", row["size"]))))]
    if shares:
        reached = "reached" if max(shares) >= MFU_WANTED else "not reached"
        lines += [f"The UNet's best MFU is {max(shares):.1%}; wanted on an H100: {MFU_WANTED:.0%}, {reached}.", ""]
    times = [row["train/samples_per_second"] / plain for row in trainings if row["network"] == "vae" and (plain := rate_of(trainings, row))]
    if len(times) > 1:
        reached = "reached" if max(times) >= TIMES_WANTED else "not reached"
        lines += [f"The autoencoder trains {max(times):.2f} times as many pictures/s as plainly; wanted: {TIMES_WANTED:g}, {reached}.", ""]
    return lines


def outside(found: Sequence[Row]) -> list[str]:
    """Of the networks alone: what of a step is spent outside of them, and what AdamW's step takes."""
    cells = []
    for row in (row for row in found if "networks_seconds" in row):
        same = {each["options"]: each for each in found if "options" in each and alike(each, row)}
        step = same.get("bf16", same.get("plain"))
        seconds = step["batch"] / step["train/samples_per_second"] if step else None
        share = f"{1 - row['networks_seconds'] / seconds:.0%} of {1000 * seconds:.0f}" if seconds else "-"
        adamw = [f"{1000 * row[f'adamw_{how}_seconds']:.1f}" for how in ("fused", "foreach", "loop")]
        cells.append([f"{row['network']}, {row['size']} px, batch {row['batch']}", f"{1000 * row['networks_seconds']:.0f}", share, *adamw])
    if not cells:
        return []
    heading = ["step", "networks alone, ms", "not counted by the budget, of ms", "AdamW fused, ms", "foreach", "loop"]
    return markdown(heading, cells).splitlines()


def sampling(rows: Sequence[Row]) -> list[str]:
    """Seconds a picture by way and batch, and how many times longer than in latents."""
    found = done(rows, "sampling")
    by = {(row["way"], row["batch"]): row["seconds_a_picture"] for row in found}
    cells = []
    for row in found:
        base = by.get(("in latents", row["batch"]))
        times = f"{row['seconds_a_picture'] / base:.2f}" if base else "-"
        memory = f"{row['memory_gb']:.1f}" if "memory_gb" in row else "-"
        cells.append([row["name"], f"{row['seconds_a_picture']:.3f}", times, memory])
    return markdown(["sampled", "s a picture", "times in latents", "GB"], cells).splitlines() if cells else ["Nothing was sampled."]


def learn(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in done(rows, "learn"):
        ended = "ended by its time" if row["stopped"] else "to the end of its schedule"
        lines += [f"{row['name']}: {row['planned_steps']} steps planned, {ended}, {row['samples_per_second']:.0f} pictures/s; "
                  f"`cat learnt.tar.* | tar x` gives the model in float16 ({len(row['pieces'])} pieces).", ""]  # fmt: skip
    return lines or ["Nothing was trained."]
