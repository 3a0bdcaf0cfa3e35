"""Shards in object storage: an S3 server that can be slow and fail, and what is read from it."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, may_mount, pack_arguments
from fsspec.registry import _registry
from helpers import ENVIRONMENT, make_spec, metrics, train_options

pytest.importorskip("moto", reason="moto[server] is not installed (the extra dev)")
pytest.importorskip("s3fs", reason="s3fs is not installed (the extra cloud)")

from s3_server import BUCKET, CREDENTIALS, SECRET, Proxy, s3_server

import evaluate
import train
from common.errors import InputError
from pipelines import object_storage, shard_cache
from pipelines.loader import TrainLoader
from pipelines.object_storage import StorageError
from pipelines.opencv_loader import RawBatch, mix_shards
from pipelines.shard_cache import local_folder
from pipelines.shard_format import MANIFEST, PEOPLE
from pipelines.shards import ShardSet
from tools import check_shards, make_shards, show_batch

URL = f"s3://{BUCKET}/tiny"
TARS = 6  # of the training split: 12 people, 2 in each


@pytest.fixture(scope="session")
def server() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def packed(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory, server: Proxy) -> Path:
    """The tiny set in small shards, in a folder and at URL; an empty folder .partial is beside."""
    output = tmp_path_factory.mktemp("small") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, server)
        for location in (output, URL):
            words = pack_arguments(tiny_set, output, "--people-per-shard", 2)
            words[words.index(str(output))] = str(location)
            assert make_shards.main(words) == 0
    return output


@pytest.fixture
def s3(server: Proxy, packed: Path, tmp_path: Path, monkeypatch) -> Proxy:
    """The proxy, reset and set in the environment; the user's cache is empty."""
    server.reset()
    set_environment(monkeypatch, server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_storage, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(shard_cache, "WAIT_FOR_ROOM_S", 5.0)
    return server


def set_environment(patch: pytest.MonkeyPatch, server: Proxy) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.url}.items():
        patch.setenv(name, value)


def open_split(packed: Path, tars: float = TARS, split: str = "train", url: str = URL) -> ShardSet:
    """A split at URL. tars: size of the cache, in multiples of the largest tar."""
    largest = max(shard.bytes for shard in ShardSet(packed / "train").manifest.shards)
    return ShardSet(local_folder(url, "", (tars * largest + 0.5) / 1e9) / split)


def cached(shards: ShardSet) -> list[str]:
    """The numbers of the tars in the cache."""
    return sorted(path.stem for path in shards.folder.glob("*.tar"))


def read_pictures(split: ShardSet) -> list[bytes]:
    return [split.picture(sample) for sample in range(len(split))]


def bytes_in(folder: Path) -> int:
    """The size of all tars, while other threads may remove or rename some."""
    sizes = {}
    for path in folder.glob("*.tar*"):
        with suppress(FileNotFoundError):
            sizes[path.name.partition(".")[0]] = path.stat().st_size
    return sum(sizes.values())


def are_equal(one: RawBatch, other: RawBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def url_of(tar: int) -> str:
    return f"{URL}/train/{tar:05d}.tar"


# Packing


def test_stored_files_are_those_of_a_folder_and_the_manifest_comes_last(packed, s3):
    tiny = [line for line in s3.log if "/tiny/" in line]
    assert tiny == []
    for split in ("train", "valid"):
        for path in sorted((packed / split).iterdir()):
            if path.name != MANIFEST:  # contains the command
                assert object_storage.read(f"{URL}/{split}/{path.name}") == path.read_bytes()
        stored = json.loads(object_storage.read(f"{URL}/{split}/{MANIFEST}"))
        local = json.loads((packed / split / MANIFEST).read_text())
        assert stored.pop("command") != local.pop("command") and stored == local


def test_packing_stores_the_manifest_last_finds_it_again_and_replaces_it(s3, tiny_set, capsys):
    url = f"s3://{BUCKET}/again"
    words = [*pack_arguments(tiny_set, Path("out")), "--splits", "valid"]
    words[words.index("out")] = url
    assert make_shards.main(words) == 0
    stored = [line.rpartition("/")[2] for line in s3.log if line.startswith("PUT")]
    assert stored == ["00000.tar", "00000.idx", PEOPLE, MANIFEST]
    s3.log.clear()
    assert make_shards.main(words) == 0
    assert f"{url}/valid: already packed, 5 people" in capsys.readouterr().out
    assert not [line for line in s3.log if not line.startswith("GET")]
    with pytest.raises(InputError, match="another packing"):
        make_shards.main([*words, "--seed", "1"])
    assert make_shards.main([*words, "--seed", "1", "--overwrite"]) == 0
    changes = [line.split("/")[-1] for line in s3.log if not line.startswith("GET")]
    assert changes[0] == MANIFEST and changes[-1] == MANIFEST and len(changes) == 5


# Order


def test_mixed_shards_have_each_person_once_and_read_few_shards_at_a_time():
    shard_N = np.repeat(np.arange(20), 50)
    order = mix_shards(shard_N, 3, np.random.default_rng(0))
    assert np.array_equal(np.sort(order), np.arange(1000))
    first, last = np.full(20, 1000), np.zeros(20, dtype=int)
    np.minimum.at(first, shard_N[order], np.arange(1000))
    np.maximum.at(last, shard_N[order], np.arange(1000))
    in_use = [int(((first <= i) & (i <= last)).sum()) for i in range(1000)]
    assert max(in_use) <= 4 and in_use[0] == 1
    assert list(np.argsort(first)) != list(range(20))


@pytest.mark.parametrize(
    ("loader", "how", "tars"),
    [
        ("opencv", {"shard_window": 1}, 4),
        ("opencv", {"shard_window": 1, "workers": 0}, 4),
        ("opencv", {}, TARS),
        ("dali", {"shard_window": 1}, 4),
        ("dali", {"shard_window": 1, "world_size": 2, "rank": 1}, 4),
    ],
)
def test_batches_are_those_of_a_folder_and_the_cache_keeps_its_limit(packed, s3, loader, how, tars):
    remote, spec = open_split(packed, tars), make_spec("hrnet", loader, **how)
    one, other = TrainLoader(ShardSet(packed / "train"), spec), TrainLoader(remote, spec)
    for _ in range(10):
        assert are_equal(one.next(), other.next())
        # Or a tar is counted, removed, and the next one counted too.
        with shard_cache._locked(remote.cache.root):
            assert 0 < bytes_in(remote.folder) <= remote.cache.limit
    one = TrainLoader(ShardSet(packed / "train"), spec, 10)
    other = TrainLoader(remote, spec, 10)
    for _ in range(5):
        assert are_equal(one.next(), other.next())
    fetched = s3.gets(".tar")
    assert {path.rpartition("/")[2] for path in fetched} == {f"0000{i}.tar" for i in range(TARS)}
    assert len(fetched) == TARS if tars == TARS else len(fetched) > TARS


def test_tars_are_fetched_in_the_order_of_reading_and_the_first_one_alone(packed, s3):
    s3.latency_s = 0.05
    remote = open_split(packed, 5)
    loader = TrainLoader(remote, make_spec("none", "opencv", shard_window=1, batch_size=2))
    rows = [loader.next().records_NR[:, 0].tolist() for _ in range(6)]
    row_N = remote.records()[:, 0].tolist()
    read = list(dict.fromkeys(row_N.index(row) // 2 for people in rows for row in people))
    # On a busy machine a tar may be removed, and fetched again, before it is opened.
    tars = list(dict.fromkeys(int(path.rpartition("/")[2][:5]) for path in s3.gets(".tar")))
    assert tars[0] == read[0] and set(tars[:3]) == set(read[:3])


@pytest.mark.parametrize("fault", ["", "cut", "503"])
def test_a_large_tar_is_fetched_in_parts_four_at_a_time(packed, s3, monkeypatch, fault):
    tar = (packed / "train" / "00003.tar").read_bytes()
    monkeypatch.setattr(object_storage, "SMALLEST_PART", 100)
    monkeypatch.setattr(object_storage, "LARGEST_PART", len(tar) // 6)  # and a rest
    s3.faults["00003.tar"] = [fault] if fault else []
    assert open_split(packed).cache.file(3).read() == tar
    assert len(s3.gets("00003.tar")) == 7 + (4 if fault else 0)


def test_parts_of_an_object_of_another_size_are_refused(packed, s3, monkeypatch):
    monkeypatch.setattr(object_storage, "SMALLEST_PART", 100)
    try:
        for size, found in ((50, "range"), (1 << 20, "SHA-256")):
            (packed / "other").write_bytes(bytes(size))
            object_storage.store(packed / "other", url_of(5))
            with pytest.raises(StorageError, match=found) as caught:
                open_split(packed).picture(11)
            assert caught.value.where == url_of(5)
    finally:
        object_storage.store(packed / "train" / "00005.tar", url_of(5))


# Faults


@pytest.mark.parametrize("faults", [["503", "503"], ["cut"], ["drop", "cut", "503"]])
def test_temporary_faults_are_retried(packed, s3, faults):
    s3.faults["00003.tar"] = list(faults)
    remote, local = open_split(packed), ShardSet(packed / "train")
    assert [remote.picture(i) for i in range(12)] == [local.picture(i) for i in range(12)]
    assert len(s3.gets("00003.tar")) == len(faults) + 1


def test_missing_object_is_named(packed, s3):
    tar = object_storage.read(url_of(2))
    object_storage.remove(url_of(2))
    try:
        with pytest.raises(StorageError, match="no such object") as caught:
            open_split(packed).picture(4)
        assert caught.value.where == url_of(2) and len(s3.gets("00002.tar")) == 2
    finally:
        (packed / "restored").write_bytes(tar)
        object_storage.store(packed / "restored", url_of(2))


@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_denied_access_ends_a_loader_with_an_error_that_names_the_shard(packed, s3, loader):
    s3.faults["00001.tar"] = ["403"] * 20
    spec = make_spec("hrnet", loader)
    batches = TrainLoader(open_split(packed), spec)
    with pytest.raises(StorageError, match="access denied") as caught:
        for _ in range(4):
            batches.next()
    assert caught.value.where == url_of(1)


def test_wrong_bytes_are_refused_and_never_read(packed, s3):
    (packed / "other").write_bytes(b"other")
    object_storage.store(packed / "other", url_of(5))
    remote = open_split(packed)
    try:
        with pytest.raises(StorageError, match="SHA-256") as caught:
            remote.picture(11)
        assert caught.value.where == url_of(5) and cached(remote) == []
        assert not list(remote.folder.glob("*.part"))
    finally:
        object_storage.store(packed / "train" / "00005.tar", url_of(5))


def test_training_continues_from_the_cache_while_the_server_is_unreachable(packed, s3, monkeypatch):
    monkeypatch.setattr(object_storage, "ATTEMPTS", 2)
    remote = open_split(packed)
    pictures = [remote.picture(i) for i in (0, 1, 4)]
    s3.is_dead = True
    assert [remote.picture(i) for i in (0, 1, 4)] == pictures
    with pytest.raises(StorageError, match="in all attempts") as caught:
        remote.picture(2)
    assert caught.value.where == url_of(1)


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="no small disk can be mounted here")
def test_a_full_disk_removes_unused_tars_and_then_raises_one_error(packed, s3, tmp_path):
    largest = max(shard.bytes for shard in ShardSet(packed / "train").manifest.shards)
    program = f"""
from pipelines.shard_cache import local_folder
from pipelines.shards import ShardSet
split = ShardSet(local_folder("{URL}", "/mnt", 1) / "train")
for number in range({TARS}):
    split.cache.file(number)
    split.cache.release(number)
files = [split.cache.file(number) for number in range({TARS})]
"""
    size = int(2.5 * largest) + (200 << 10)
    script = f'mount -t tmpfs -o size={size} x /mnt && exec {sys.executable} -c "$0"'
    run = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, program],
        env={**ENVIRONMENT, **CREDENTIALS, "AWS_ENDPOINT_URL": s3.url},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "StorageError: s3://" in run.stderr, run.stderr[-2000:]
    assert "No space left on device in the cache /mnt" in run.stderr


# The cache


def test_the_least_recently_used_tars_are_removed_first_and_none_in_use(packed, s3):
    remote = open_split(packed, 5.5)
    cache = remote.cache
    for number in (0, 1, 2):
        cache.file(number)
    cache.file(0)
    cache.release(1)
    cache.release(0)
    for number in (0, 1):  # now 1 is the latest of the two
        cache.file(number)
        cache.release(number)
    other = open_split(packed, 3.5).cache
    other.file(3)
    assert cached(remote) == ["00001", "00002", "00003"]
    other.file(4)
    assert cached(remote) == ["00002", "00003", "00004"]


def test_cache_whose_tars_are_all_in_use_is_an_error(packed, s3, monkeypatch):
    monkeypatch.setattr(shard_cache, "WAIT_FOR_ROOM_S", 0.2)
    files = [open_split(packed, 2.5).cache.file(number) for number in (0, 1)]
    with pytest.raises(StorageError, match="all tars in use"):
        open_split(packed, 2.5).cache.file(2)
    assert len(files) == 2


def test_unfinished_tars_of_a_killed_process_are_removed_for_room(packed, s3):
    remote = open_split(packed, 2)
    remote.cache.file(0)
    left = remote.folder / f"00003.tar.{remote.cache.limit // 2}.part"
    left.touch()
    (remote.folder / "00003.lock").touch()
    remote.cache.file(1)
    assert cached(remote) == ["00000", "00001"] and not left.exists()


def test_ranks_and_runs_fetch_each_tar_once_and_a_restart_fetches_none(packed, s3):
    s3.latency_s = 0.02
    splits = [open_split(packed) for _ in range(3)]
    threads = [threading.Thread(target=read_pictures, args=[split]) for split in splits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(s3.gets(".tar")) == TARS
    again = open_split(packed)
    assert read_pictures(again) == read_pictures(ShardSet(packed / "train"))
    assert len(s3.gets(".tar")) == TARS
    assert len(s3.gets(PEOPLE)) == 2  # of both splits, by the first


@pytest.mark.slow
def test_killed_and_living_processes_share_a_cache(packed, s3, tmp_path):
    s3.latency_s = 0.1
    program = f"""
from pipelines.shard_cache import local_folder
from pipelines.shards import ShardSet
split = ShardSet(local_folder("{URL}", "{tmp_path}/shared", 1) / "train")
print("opened", flush=True)
print(sum(len(split.picture(i)) for i in range(12)), flush=True)
"""
    env = {**ENVIRONMENT, **CREDENTIALS, "AWS_ENDPOINT_URL": s3.url}
    runs = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert runs[0].stdout.readline() == b"opened\n"
    runs[0].kill()
    local = ShardSet(packed / "train")
    expected = str(sum(len(local.picture(i)) for i in range(12))).encode()
    for run in runs[1:]:
        assert run.communicate(timeout=100)[0].split() == [b"opened", expected]
    assert TARS <= len(s3.gets(".tar")) <= TARS + 1  # one may have been cut off by the kill


@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_cache_that_is_too_small_for_the_order_is_refused(packed, s3, loader):
    with pytest.raises(InputError, match=r"data\.shard_window 0") as caught:
        TrainLoader(open_split(packed, 4), make_spec("none", loader))
    assert "data.cache_gb" in caught.value.where


# Programs


def test_training_evaluation_and_tools_read_object_storage(packed, s3, tmp_path, capsys):
    for name, shards in (("local", packed), ("remote", URL)):
        assert train.main(train_options(shards, tmp_path / "runs", name)) == 0
    losses = [
        [line["loss"] for line in metrics(tmp_path / "runs" / name, "train")]
        for name in ("local", "remote")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    best = tmp_path / "runs" / "remote" / "best.pt"
    for location in (packed, f"{URL}/valid"):
        written = tmp_path / f"{len(str(location))}.json"
        how = ["--json", written, "--device", "cpu", "--batch-size", 2, "--workers", 0]
        evaluate.main(list(map(str, ["--checkpoint", best, "--shards", location, *how])))
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert {facts.pop("data") for facts in found} == {str(packed / "valid"), f"{URL}/valid"}
    assert found[0] == found[1] and "mean pose" in json.dumps(found[0])
    output = tmp_path / "batch.png"
    show_batch.main(["--data.shards", URL, "--people", "3", "--output", str(output)])
    assert output.stat().st_size > 1000
    # Nothing that was written contains the key.
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    secrets = [value.encode() for value in (SECRET, CREDENTIALS["AWS_ACCESS_KEY_ID"])]
    assert len(written) > 20 and best in written
    for path in written:
        data = path.read_bytes()
        assert not any(secret in data for secret in secrets), path
    streams = capsys.readouterr()
    assert not any(secret.decode() in streams.out + streams.err for secret in secrets)


def test_check_shards_fetches_every_object_again_and_names_the_damaged_one(packed, s3, capsys):
    read_pictures(open_split(packed))  # all tars are in the user's cache
    s3.log.clear()
    assert check_shards.main([URL, "--workers", "0"]) == 0
    assert "17 people of train and valid, no damage found" in capsys.readouterr().out
    assert len(s3.gets(".tar")) == TARS + 3
    (packed / "other").write_bytes(b"other")
    object_storage.store(packed / "other", url_of(4))
    try:
        assert check_shards.main([URL, "--workers", "0"]) == check_shards.EXIT_DAMAGED
        assert f"{url_of(4)}: the SHA-256" in capsys.readouterr().out
    finally:
        object_storage.store(packed / "train" / "00004.tar", url_of(4))


def test_https_needs_no_list_of_the_folder(packed, s3, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=packed)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}"
        remote, local = open_split(packed, url=url), ShardSet(packed / "train")
        assert [remote.picture(i) for i in range(12)] == [local.picture(i) for i in range(12)]
        web.shutdown()


def test_folder_without_shards_is_named(packed, s3):
    with pytest.raises(InputError, match="no manifest") as caught:
        open_split(packed, url=f"s3://{BUCKET}/nothing")
    assert caught.value.where == f"s3://{BUCKET}/nothing"


@pytest.mark.parametrize(
    "url", ["s3://key:hush@pose/tiny", "https://host/tiny?X-Amz-Signature=hush"]
)
def test_url_with_a_secret_is_refused_without_printing_it(url):
    with pytest.raises(InputError, match="plain URL") as caught:
        local_folder(url, "", 1)
    assert "hush" not in str(caught.value) and "tiny" in str(caught.value)


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(InputError) as caught:
        local_folder(URL, str(tmp_path), 1)
    assert "pip install stacked-hourglass-trainer[cloud]" in caught.value.next_step


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_two_ranks_and_a_resumed_run_train_as_from_a_folder(packed, s3, tmp_path, loader):
    how = f"--data.loader {loader} --data.workers 1 --data.shard_window 1"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**ENVIRONMENT, **CREDENTIALS, "AWS_ENDPOINT_URL": s3.url}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    losses = {}
    for name, shards, starts in (
        ("local", packed, [["--train.steps", "6"]]),
        ("remote", URL, [["--train.steps", "3"], ["--train.steps", "6", "--resume"]]),
    ):
        words = train_options(shards, tmp_path / "runs", name, how)
        for more in starts:
            subprocess.run([*launch, "train.py", *words, *more], env=env, cwd=ROOT, check=True)
        losses[name] = [line["loss"] for line in metrics(tmp_path / "runs" / name, "train")]
    assert losses["local"] == losses["remote"] and len(losses["local"]) == 6
    tars = [path for path in s3.gets(".tar") if "/train/" in path]
    assert len(tars) == TARS  # once for both ranks and both starts
