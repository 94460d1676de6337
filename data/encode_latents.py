"""Picture shards + model folder -> latent shards: posterior moments, captions, and optionally prompt embeddings.

    python data/encode_latents.py --data SHARDS --model FOLDER --out LATENTS
    torchrun --nproc-per-node 8 data/encode_latents.py ...      (or srun: each process takes every n-th shard)

Each picture shard gives one latent shard, so a stopped run goes on where it was; other options into the same folder are
refused. The manifest carries the hashes of the VAE and, with --prompt-embeds, of the text encoder; training with others is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eqldm.atomic import DISK_FULL
from eqldm.command import Parser, error_line, whole
from eqldm.data.cache import CacheFull, check_cache
from eqldm.data.making import UNFINISHED
from eqldm.data.manifest import MANIFEST, read_object, what_is_wrong
from eqldm.data.readers import naming_lost_readers, reader
from eqldm.data.remote import is_remote
from eqldm.data.samples import PictureSamples, pack_array
from eqldm.data.shards import read_manifest, write_index, write_json, write_shard
from eqldm.diffusion.conditioning import cut_captions, encode_prompts, looked_at
from eqldm.lock import LOCK, held
from eqldm.model_folder import check_latents, load_text, load_vae, text_hash, vae_hash
from eqldm.paths import check_folder, place_option
from eqldm.processes import launch, pick_device, process_rank, processes_here
from eqldm.ranges import WORKERS
from eqldm.run_model import opened

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
READERS = "--num-workers"


class Encoder:
    """Encodes shards in turn: `encoder.samples(n)` yields the latent samples of shard n, the next of those given to `encoder.read`."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.pictures = PictureSamples(args.data, need_captions=args.prompt_embeds)
        self.vae = load_vae(args.model).to(device)
        self.text = load_text(args.text_model or args.model) if args.prompt_embeds else None
        if self.text is not None:
            self.text[1].to(device)
        self.device, self.dtype, self.args = device, DTYPES[args.dtype], args

    def _batches(self, n: int) -> list[range]:
        first, last = (int(start) for start in self.pictures.shards.starts[n : n + 2])
        return [range(start, min(start + self.args.batch_size, last)) for start in range(first, last, self.args.batch_size)]

    def read(self, shards: list[int]) -> None:
        """Begins to read shards: one pool of readers for all, that reads on while a shard is being finished."""
        self.pictures.turns = shards
        batches = (list(batch) for n in shards for batch in self._batches(n))
        self.loader = iter(reader(self.pictures, batches, self.args.num_workers, option=READERS))

    @torch.no_grad()
    def samples(self, n: int, on_batch):
        """Latent samples in the form `write_shard` takes. Unreadable pictures are left out and named to `on_batch`."""
        for _ in self._batches(n):
            batch = next(self.loader)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                moments = self.vae.encode(batch["x"].to(self.device)).latent_dist.parameters
            self._check(n, batch["key"], self.vae, moments, "the VAE", "latents")
            embeds = None
            if self.text is not None:
                embeds = encode_prompts(*self.text, batch["caption"]).cpu()
                self._check(n, batch["key"], self.text[1], embeds, "the text encoder", "prompt embeddings")
            unreadable = []
            for i, position in enumerate(batch["position"].tolist()):
                key = str(self.pictures.shards.keys[position])
                if batch["replaced"][i]:  # by the next one, which has its own place
                    unreadable.append(key)
                    continue
                sample = {"__key__": key, "moments.npy": pack_array(moments[i].cpu().to(self.dtype))}
                if self.pictures.shards.holds(position, "txt"):
                    sample["txt"] = batch["caption"][i]
                if embeds is not None:
                    sample["prompt_embeds.npy"] = pack_array(embeds[i].to(self.dtype))
                yield sample
            on_batch(len(batch["key"]), unreadable)

    def _check(self, n: int, keys: list[str], network: torch.nn.Module, values: torch.Tensor, what: str, made: str) -> None:
        """Raises ValueError, naming shard and picture, for values [B, ...] that are no numbers, or that --dtype cannot hold."""
        shard = self.pictures.shards.manifest["shards"][n]["name"]
        check_latents(network, values, keys, f"'{shard}'", what)
        held = values.to(self.dtype).flatten(1).isfinite().all(1)
        if not bool(held.all()):
            first = int((~held).nonzero()[0])
            raise ValueError(
                f"{made} of picture '{keys[first]}' of '{shard}' reach {float(values[first].abs().max()):.4g} and do not fit "
                f"{self.args.dtype}: give --dtype bfloat16"
            )


def encode(args: argparse.Namespace) -> Path:
    """Encode this process's shards; the process that finds all shards done writes the manifest.

    Raises ValueError where `--out` holds, or is to hold, latents made with other options, or another launch is writing there.
    """
    rank, world = process_rank()
    check_folder("--out", args.out)
    encoder = Encoder(args, pick_device(rank))
    shards, out = encoder.pictures.shards, Path(args.out)
    if is_remote(args.data):  # of each process here, the tar that is read and the one that comes
        check_cache(args.data, shards.manifest["shards"], 2 * processes_here())
    made = generator(args, encoder)
    about = {"kind": "latents", "vae_hash": made["vae"], "model": str(args.model), "pictures": str(args.data), "generator": made}
    if "text_hash" in made:
        about["text_hash"] = made["text_hash"]
    out.mkdir(parents=True, exist_ok=True)
    with held(out / LOCK, f"'{out}' is being encoded", "give another --out", group=launch()):
        return _encode(encoder, out, about, rank, world)


def _encode(encoder: Encoder, out: Path, about: dict, rank: int, world: int) -> Path:
    args, shards = encoder.args, encoder.pictures.shards
    if _started(out, about["generator"]):
        print(f"{out}: already encoded with this VAE ({read_manifest(out)['count']} latents)")
        return out

    if encoder.text and rank == 0 and (line := cut_captions(encoder.text[0], looked_at(shards), len(shards), args.data)):
        print(line)
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    skipped, done, start = [], 0, time.perf_counter()
    entries = [out / f"{Path(entry['name']).stem}.done.json" for entry in shards.manifest["shards"]]
    with Progress(*columns, disable=rank > 0 or not sys.stderr.isatty()) as progress:
        mine = [n for n in range(rank, len(entries), world) if not _is_done(entries[n])]
        total = sum(int(shards.starts[n + 1] - shards.starts[n]) for n in mine)
        task = progress.add_task("encoding", total=total, rate="")

        def on_batch(count: int, unreadable: list[str]) -> None:
            nonlocal done
            skipped.extend(unreadable)
            done += count - len(unreadable)
            progress.update(task, advance=count, rate=f"{done / (time.perf_counter() - start):.0f} pictures/s")

        encoder.read(mine)
        for n in mine:
            before = len(skipped)
            try:
                entry = write_shard(out / shards.manifest["shards"][n]["name"], encoder.samples(n, on_batch))
                write_json(entries[n], {**entry, "skipped": skipped[before:]})
            except OSError as error:
                if error.errno not in DISK_FULL or isinstance(error, CacheFull):
                    raise
                raise OSError(
                    f"no space left in '{out}'. Finished shards are kept: free some space and run the same command again"
                ) from error
    seconds = time.perf_counter() - start
    pace = f"{seconds:.1f} s ({done / seconds:.0f} pictures/s)"
    print(f"process {rank}: {done} latents in {pace}, {len(skipped)} unreadable pictures skipped")
    _finish(out, entries, about)
    return out


def generator(args: argparse.Namespace, encoder: Encoder) -> dict:
    """All that the latents depend on, as the manifest states it."""
    tars = json.dumps([entry["sha256"] for entry in encoder.pictures.shards.manifest["shards"]])
    options = {"vae": vae_hash(encoder.vae), "pictures": hashlib.sha256(tars.encode()).hexdigest()[:16]}
    options |= {"dtype": args.dtype, "bf16": args.bf16, "prompt_embeds": args.prompt_embeds}
    return options | ({"text_hash": text_hash(*encoder.text)} if encoder.text else {})


def _started(out: Path, wanted: dict) -> bool:
    """Whether the folder is encoded already. Raises ValueError where it is, or was begun, with other options than `wanted`."""
    record = out / (MANIFEST if (out / MANIFEST).is_file() else UNFINISHED)
    if not record.is_file():
        foreign = sorted(path.name for path in out.glob("*.tar"))
        if foreign:
            raise ValueError(f"'{out}' holds tars that this script did not make: {', '.join(foreign[:3])}. Give another --out")
        write_json(record, {"generator": wanted})
        return False
    found = read_object(record, "Remove it, or give another --out").get("generator") or {}
    if not isinstance(found, dict):
        raise ValueError(f"'{record}' is damaged: its generator is {json.dumps(found)[:60]}. Remove it, or give another --out")
    changed = [f"{name} (there {found.get(name)}, now {wanted.get(name)})" for name in sorted({*found, *wanted})
               if found.get(name) != wanted.get(name)]  # fmt: skip
    if changed:
        raise ValueError(f"'{out}' holds latents made with other options: {', '.join(changed)}. Remove it, or give another --out")
    return record.name == MANIFEST


def _finish(out: Path, entries: list[Path], about: dict) -> None:
    """Write the manifest, if all shards are done. Several processes may find so at once: each writes the same one."""
    try:
        shards = [_done(path) for path in entries]
    except FileNotFoundError:  # others are still at work, or one of them has finished the folder
        if not (out / MANIFEST).is_file():
            done = sum(path.is_file() for path in entries)
            print(f"{done} of {len(entries)} shards are done: the manifest is written by the process that finishes last")
        return
    skipped = [key for entry in shards for key in entry.pop("skipped")]
    held = [entry for entry in shards if entry["count"]]
    write_index(out, held)
    manifest = {**about, "skipped": skipped, "count": sum(entry["count"] for entry in held), "shards": held}
    write_json(out / MANIFEST, manifest)
    for path in (*entries, out / UNFINISHED):
        path.unlink(missing_ok=True)


def _done(path: Path) -> dict:
    """The entry of a shard that is encoded, as its process wrote it. Raises FileNotFoundError where it is not; ValueError as it says."""
    way_out = "Remove it, and the same command encodes that shard again"
    entry = read_object(path, way_out)
    if what := what_is_wrong({"shards": [entry], "skipped": entry.get("skipped")}):
        raise ValueError(f"'{path}' is damaged: {what}. {way_out}")
    return entry


def _is_done(path: Path) -> bool:
    """Whether a shard is encoded, by its entry, and its tar is still as long as it was. Raises ValueError as `_done`."""
    try:
        entry = _done(path)
        return (path.parent / entry["name"]).stat().st_size == entry["bytes"]
    except FileNotFoundError:
        return False


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=place_option, required=True, help="shard folder of pictures, or the address of one")
    parser.add_argument("--model", type=place_option, required=True, help="model folder, or RUN@STEP, whose VAE encodes")
    parser.add_argument("--out", type=place_option, required=True, help="shard folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored moments")
    parser.add_argument("--prompt-embeds", action="store_true", help="store the captions' embeddings too")
    parser.add_argument("--text-model", type=place_option, help="model folder whose text encoder makes them (default: --model)")
    parser.add_argument("--batch-size", type=whole(1, 4096), default=64)
    parser.add_argument("--num-workers", type=whole(0, WORKERS), default=2)
    parser.add_argument("--bf16", action="store_true", help="encode under bf16 autocast: faster, rounds the latents")
    args = parser.parse_args()
    try:
        args.model, args.text_model = opened(args.model), args.text_model and opened(args.text_model)
        with naming_lost_readers(READERS):
            print(encode(args))
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command resumes", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
