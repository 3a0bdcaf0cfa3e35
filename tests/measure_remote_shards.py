"""Compares training from object storage with training from a folder: people/s, first batch.

    python tests/measure_remote_shards.py --rounds 3

Uses the demo's network and people, and the server of s3_server.py behind a proxy with 30 ms of
latency. Both sides take turns in one process, one pass over the people each. The cache holds half
of the tars.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fsspec
import torch
import yaml
from helpers import make_trainer, steps
from s3_server import BUCKET, CREDENTIALS, s3_server

from common.distributed import init_distributed
from configs.schema import as_dict, config_from_dict
from pipelines import object_storage
from pipelines.augment import preset_of
from pipelines.loader import LoaderSpec, TrainLoader
from pipelines.shard_cache import local_folder
from pipelines.shards import ShardSet
from tools import make_shards, make_synthetic

ROOT = Path(__file__).resolve().parents[1]
PEOPLE_PER_TAR, WINDOW = 64, 2


def serve(urls: multiprocessing.Queue, latency_s: float, bytes_per_s: float) -> None:
    """Runs in a separate process, so that the proxy does not share the interpreter lock."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # which ends the server too
    with s3_server() as proxy:
        proxy.latency_s, proxy.bytes_per_s = latency_s, bytes_per_s
        urls.put(proxy.url)
        while True:
            time.sleep(1)


def pass_rate(trainer, people: int) -> float:
    """People/s of a pass over the people."""
    count = people // trainer.config.data.batch_size
    began = time.perf_counter()
    steps(trainer, count)
    return count * trainer.config.data.batch_size / (time.perf_counter() - began)


def rates(folder: Path, url: str, cache_gb: float, rounds: int) -> list[dict[str, float]]:
    """People/s of passes: from the folder, from the URL with an empty cache, and of both again."""
    dist, found = init_distributed("cpu", "auto"), []
    for number in range(rounds):
        trainers = {}
        for name, location in (("folder", folder), ("url", url)):
            raw = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
            raw["data"] |= {"shards": str(location), "shard_window": WINDOW, "cache_gb": cache_gb}
            raw["data"]["cache_dir"] = str(folder.parent / f"cache{number}")
            raw["train"] |= {"threads": 1}
            config = config_from_dict(as_dict(config_from_dict(raw, "demo")), "demo")
            trainers[name] = make_trainer(config, folder.parent / f"run-{name}{number}", dist=dist)
            if name == "folder":
                steps(trainers[name], 20)  # warms the processor's clock and torch up
        people = len(trainers["folder"].shards)
        row = {}
        for turn in ("first", "second"):
            for name, trainer in trainers.items():
                row[f"{name}, {turn}"] = pass_rate(trainer, people)
        assert trainers["url"].shards.cache.capacity < len(trainers["url"].shards.tars)
        found.append(row)
        print({name: round(rate, 1) for name, rate in row.items()}, flush=True)
    return found


def first_batches(folder: Path, url: str, cache_gb: float, turns: int) -> list[dict[str, float]]:
    """Seconds to the first batch of an opened split with an empty cache, and of one transfer.

    A transfer is one plain GET of the first tar through the same proxy. Each loader takes turns
    with `object_storage.fetch` in parts, as it is, and in one request.
    """
    found = []
    config = config_from_dict(yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text()), "demo")
    signed = fsspec.filesystem("s3").sign(f"{url}/train/00000.tar")
    parts = object_storage.SMALLEST_PART
    for turn in range(turns + 1):
        began = time.perf_counter()
        urlopen(signed).read()
        row = {"transfer": time.perf_counter() - began}
        for loader, how in itertools.product(("opencv", "dali"), ("parts", "one request")):
            object_storage.SMALLEST_PART = parts if how == "parts" else 1 << 40
            spec = LoaderSpec(
                loader=loader,
                device=torch.device("cpu"),
                preset=preset_of(config.data.preset, config.data.mirror),
                input_px=config.data.input_px,
                batch_size=8,
                workers=1,
                seed=turn,
                shard_window=WINDOW,
            )
            cache = local_folder(url, str(folder / f"{turn} {loader} {how}"), cache_gb)
            began = time.perf_counter()
            batches = TrainLoader(ShardSet(cache / "train"), spec)
            batches.next()
            row[f"{loader}, {how}"] = time.perf_counter() - began
            del batches
            gc.collect()
            time.sleep(0.5)  # transfers that have begun come to an end
        if turn:  # the first one imports DALI, and starts clients
            found.append(row)
            print({name: round(seconds, 3) for name, seconds in row.items()}, flush=True)
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of passes; 0: only first batches")
    parser.add_argument("--turns", type=int, default=15, help="of first batches")
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--mb-per-s", type=float, default=20, help="of each connection")
    text = "folder of made people to use, or to write (default: temporary)"
    parser.add_argument("--people", type=Path, help=text)
    return parser


def main() -> None:
    """Pack, store, measure, print; the last line is JSON."""
    options = make_parser().parse_args()
    urls: multiprocessing.Queue = multiprocessing.get_context("spawn").Queue()
    arguments = [urls, options.latency_ms / 1e3, options.mb_per_s * 1e6]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
    server.start()
    try:
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=urls.get(timeout=60))
        with tempfile.TemporaryDirectory() as name:
            folder, url = Path(name) / "shards", f"s3://{BUCKET}/demo"
            made = options.people or Path(name) / "made"
            if not made.exists():
                make_synthetic.main(["--output", str(made), "--max-width", "640"])
            for location in (folder, url):
                words = f"--annotations {made}/annot --images {made}/images --output {location}"
                more = f" --people-per-shard {PEOPLE_PER_TAR} --workers 1"
                make_shards.main((words + more).split())
            tars = ShardSet(folder / "train").manifest.shards
            valid = sum(shard.bytes for shard in ShardSet(folder / "valid").manifest.shards)
            cache_gb = (valid + len(tars) // 2 * max(shard.bytes for shard in tars)) / 1e9
            print(f"{len(tars)} tars of {sum(t.bytes for t in tars) / 1e6:.1f} MB, {cache_gb=:.4f}")
            found = rates(folder, url, cache_gb, options.rounds)
            seconds = first_batches(Path(name), url, cache_gb, options.turns)
    finally:
        server.terminate()
    for name in seconds[0]:
        ratios = [row[name] / row["transfer"] for row in seconds]
        print(f"{name}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) transfers")
    for turn in ("first", "second") if found else ():
        ratios = [row[f"url, {turn}"] / row[f"folder, {turn}"] for row in found]
        print(f"{turn} pass: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(json.dumps({"passes": found, "seconds": seconds}))


if __name__ == "__main__":
    main()
