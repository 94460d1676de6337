"""Picture shards + model folder -> latent shards: posterior moments, captions, and optionally prompt embeddings.

    python data/encode_latents.py --data SHARDS --model FOLDER --out LATENTS
    torchrun --nproc-per-node 8 data/encode_latents.py ...      (or srun: each process takes every n-th shard)

Each picture shard gives one latent shard, so a stopped run goes on where it was. The manifest carries the VAE's hash;
training on the latents of another VAE is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Subset

from eqldm.data.samples import PictureSamples, collate, pack_array
from eqldm.data.shards import MANIFEST, read_manifest, write_json, write_manifest, write_shard
from eqldm.diffusion.conditioning import encode_prompts
from eqldm.model_folder import load_text, load_vae, vae_hash

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def process_rank() -> tuple[int, int]:
    """(rank, world size) as torchrun or Slurm state them; (0, 1) without either."""
    names = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
    return next(((int(os.environ[a]), int(os.environ[b])) for a, b in names if a in os.environ and b in os.environ), (0, 1))


def pick_device(rank: int) -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank))))


class Encoder:
    """Encodes one shard at a time: `encoder.samples(first, last)` yields the latent samples of a range of pictures."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.pictures = PictureSamples(args.data)
        self.vae = load_vae(args.model).to(device)
        self.text = load_text(args.text_model or args.model) if args.prompt_embeds else None
        if self.text is not None:
            self.text[1].to(device)
        self.device, self.dtype, self.args = device, DTYPES[args.dtype], args

    @torch.no_grad()
    def samples(self, first: int, last: int, on_batch):
        """Latent samples in the form `write_shard` takes. Unreadable pictures are left out and reported to `on_batch`."""
        loader = DataLoader(
            Subset(self.pictures, range(first, last)),
            self.args.batch_size,
            num_workers=self.args.num_workers,
            collate_fn=collate,
        )
        for batch in loader:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                moments = self.vae.encode(batch["x"].to(self.device)).latent_dist.parameters
            embeds = encode_prompts(*self.text, batch["caption"]).cpu() if self.text else None
            written = 0
            for i, key in enumerate(batch["key"]):
                if self.pictures.shards.keys[batch["position"][i]] != key:
                    continue  # an unreadable picture: its place was taken by the next one, which has its own place
                sample = {"__key__": key, "moments.npy": pack_array(moments[i].cpu().to(self.dtype)), "txt": batch["caption"][i]}
                if embeds is not None:
                    sample["prompt_embeds.npy"] = pack_array(embeds[i].to(self.dtype))
                written += 1
                yield sample
            on_batch(written, len(batch["key"]) - written)


def encode(args: argparse.Namespace) -> Path:
    """Encode this process's shards; the process that finds all shards done writes the manifest."""
    rank, world = process_rank()
    encoder = Encoder(args, pick_device(rank))
    shards, out = encoder.pictures.shards, Path(args.out)
    about = {
        "kind": "latents",
        "vae_hash": vae_hash(encoder.vae),
        "model": str(args.model),
        "pictures": str(args.data),
        "dtype": args.dtype,
        "prompt_embeds": bool(args.prompt_embeds),
    }
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).is_file():
        found = read_manifest(out)
        if all(found.get(name) == about[name] for name in ("vae_hash", "dtype", "prompt_embeds")):
            print(f"{out}: already encoded with this VAE ({found['count']} latents)")
            return out
        raise ValueError(f"'{out}' holds latents of another VAE or form: remove it, or give another --out")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    skipped, done, start = 0, 0, time.perf_counter()
    entries = [out / f"{Path(entry['name']).stem}.{about['vae_hash']}.json" for entry in shards.manifest["shards"]]
    with Progress(*columns, disable=rank > 0 or not sys.stderr.isatty()) as progress:
        mine = [n for n in range(rank, len(entries), world) if not entries[n].exists()]
        total = sum(int(shards.starts[n + 1] - shards.starts[n]) for n in mine)
        task = progress.add_task("encoding", total=total, rate="")

        def on_batch(written: int, unreadable: int) -> None:
            nonlocal skipped, done
            skipped, done = skipped + unreadable, done + written
            rate = f"{done / (time.perf_counter() - start):.0f} pictures/s"
            progress.update(task, advance=written + unreadable, rate=rate)

        for n in mine:
            samples = encoder.samples(int(shards.starts[n]), int(shards.starts[n + 1]), on_batch)
            write_json(entries[n], write_shard(out / shards.manifest["shards"][n]["name"], samples))
    seconds = time.perf_counter() - start
    print(f"process {rank}: {done} latents in {seconds:.1f} s ({done / seconds:.0f} pictures/s), {skipped} unreadable pictures skipped")
    if all(path.exists() for path in entries):
        write_manifest(out, [json.loads(path.read_text()) for path in entries], **about)
        for path in entries:
            path.unlink(missing_ok=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="shard folder of pictures")
    parser.add_argument("--model", required=True, help="model folder whose VAE encodes")
    parser.add_argument("--out", required=True, help="shard folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored moments")
    parser.add_argument("--prompt-embeds", action="store_true", help="store the captions' embeddings too")
    parser.add_argument("--text-model", help="model folder whose text encoder makes them (default: --model)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="encode under bf16 autocast: faster, rounds the latents")
    try:
        print(encode(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
