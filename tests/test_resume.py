"""A resumed run is the run that was not stopped; on another number of ranks as near as can be."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import pack_arguments
from test_training import HERE, ROOT, make_run, tiny_config
from torch import Tensor
from two_ranks import content, differences, rows_of, step, watched

import train as train_program
from common.distributed import from_first_rank, init_distributed
from common.errors import InputError
from configs.schema import save_yaml
from configs.skeleton import MPII
from model import checkpoint
from pipelines.opencv_loader import RawBatch
from pipelines.shard_format import HEADER_LENGTH, people_sha256
from pipelines.shards import ShardSet
from tools.make_shards import main as pack
from training import checkpoint_manager as keeping
from training import resuming
from training.trainer import Run


@pytest.fixture(scope="module")
def two_ranks(tiny_shards, tmp_path_factory) -> Path:
    """The folder in which tests/two_ranks.py worked, under torchrun."""
    pytest.importorskip("nvidia.dali")
    folder = tmp_path_factory.mktemp("ranks")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
             ROOT / "tests" / "two_ranks.py", tiny_shards, folder]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_two_ranks_stopped_after_each_step_end_with_the_same_bytes(loader, two_ranks):
    assert [rank[loader] for rank in told(two_ranks)] == [[], []]


@pytest.mark.parametrize(("loader", "workers"), [("opencv", 0), ("opencv", 1), ("dali", 0)])
def test_one_rank_stopped_after_each_step_ends_with_the_same_bytes(
    loader, workers, tiny_shards, tmp_path
):
    """Batches, losses, weights, averages, optimizer, schedule, scaler and generators of fp16."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    dist = HERE._replace(dtype=torch.float16)
    assert differences(loader, tiny_shards, tmp_path, dist, workers) == []


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_both(two_ranks):
    expected = {"skipped": 1.0, "weights stay": True, "statistics are finite": True}
    assert [rank["poisoned"] for rank in told(two_ranks)] == [expected] * 2
    lines = (two_ranks / "poisoned" / "skipped_batches.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(x["step"], x["rank"], x["loss_is_finite"]) for x in found] == [
        (1, 0, True), (1, 1, False)
    ]  # fmt: skip


class Trace(NamedTuple):
    """What a run of a few steps was given, and what came of it."""

    given: list[bytes]
    """Of each batch: affines, draws and records."""
    crops_SNHW3: Tensor
    losses_S: Tensor


def traced(run: Run, steps: int) -> Trace:
    """Train so many steps of one batch each."""
    batches = list[RawBatch]()
    watched(run, batches)
    losses = [step(run).sums[0].item() for _ in range(steps)]
    return Trace(
        [content(batch[1:]) for batch in batches],
        torch.stack([batch.images_NHW3.float() for batch in batches]),
        torch.tensor(losses, dtype=torch.float64),
    )


def noise_of(values: list[Tensor]) -> Tensor:
    """(S,) how far several runs have been apart up to each step. values: of each, (S, ...)."""
    stacked = torch.stack(values).reshape(len(values), len(values[0]), -1)
    apart = stacked.amax(0) - stacked.amin(0)
    return apart.amax(-1).cummax(0).values


def beyond(values: Tensor, unstopped: list[Tensor]) -> list[int]:
    """The steps at which a run is farther from all unstopped ones than twice their noise."""
    nearest = torch.stack([noise_of([values, other]) for other in unstopped]).amin(0)
    return torch.nonzero(nearest > 2 * noise_of(unstopped)).flatten().tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("loader", ["opencv", "dali"])
def test_a_resumed_run_is_within_the_noise_of_unstopped_ones(
    loader, device, tiny_shards, tmp_path, capsys
):
    """The noise of a GPU is measured here, by three unstopped runs, and printed; a CPU has none."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    dist = init_distributed(device, "fp32" if device == "cpu" else "auto")
    config = tiny_config(
        tiny_shards, data={"loader": loader, "preset": "princeton"}, optim={"ema_decay": 0.9},
        train={"steps": 12, "steps_per_epoch": 12},
    )  # fmt: skip
    unstopped = [traced(make_run(config, tmp_path / str(i), dist=dist), 12) for i in range(3)]
    first = make_run(config, tmp_path / "parts", dist=dist)
    begun = traced(first, 5)
    first.save(["last.pt"])
    state = checkpoint.load_checkpoint(tmp_path / "parts" / "last.pt")
    ended = traced(make_run(config, tmp_path / "parts", state, dist), 7)
    resumed = Trace(
        begun.given + ended.given,
        torch.cat([begun.crops_SNHW3, ended.crops_SNHW3]),
        torch.cat([begun.losses_S, ended.losses_S]),
    )
    assert len(set(resumed.given)) == 12
    assert all(trace.given == resumed.given for trace in unstopped), "other people or draws"
    facts = {"device": device, "loader": loader, "precision": str(dist.dtype),
             "last loss": resumed.losses_S[-1].item()}  # fmt: skip
    for name in ("crops_SNHW3", "losses_S"):
        others, mine = [getattr(trace, name) for trace in unstopped], getattr(resumed, name)
        facts[f"{name}: noise"] = noise_of(others)[-1].item()
        facts[f"{name}: resumed"] = noise_of([mine, others[0]])[-1].item()
        assert beyond(mine, others) == [], facts
        assert device == "cuda" or facts[f"{name}: noise"] == 0
    with capsys.disabled():
        print(f"\n{json.dumps(facts)}")
    # A run that forgot its optimizer is found out.
    state = replace(state, optimizer={**state.optimizer, "state": {}})
    forgot = traced(make_run(config, tmp_path / "parts", state, dist), 7).losses_S
    assert beyond(torch.cat([begun.losses_S, forgot]), [t.losses_S for t in unstopped])


def test_a_run_does_not_go_on_with_other_people(tiny_set, tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, data={"preset": "hrnet"})
    make_run(config, tmp_path / "run").save(["last.pt"])
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert pack(pack_arguments(tiny_set, tmp_path / "crops", "--packing", "crop")) == 0
    make_run(tiny_config(tmp_path / "crops", data={"preset": "hrnet"}), tmp_path / "run", state)
    state = replace(state, run=replace(state.run, people_sha256="0" * 64))
    with pytest.raises(InputError, match=r"12 people, not the 12 of .*last\.pt") as caught:
        make_run(config, tmp_path / "run", state)
    assert "--init_from" in caught.value.next_step


def test_the_hash_of_people_is_of_who_and_in_which_order(tiny_shards):
    records = ShardSet(tiny_shards / "train").records().copy()
    known = people_sha256(records)
    for column in range(HEADER_LENGTH + 4):
        other = records.copy()
        other[3, column] += 1
        is_of_the_picture = 5 <= column < HEADER_LENGTH  # its size, and the affine
        assert (people_sha256(other) == known) == is_of_the_picture, column
    assert people_sha256(records[::-1]) != known


def test_noise_grows_over_the_steps_and_a_run_beyond_it_is_told():
    runs = [torch.tensor(x) for x in ([5.0, 4.0, 3.0], [5.0, 4.1, 3.0], [5.0, 4.0, 3.05])]
    assert noise_of(runs).tolist() == pytest.approx([0, 0.1, 0.1])
    assert beyond(torch.tensor([5.0, 4.2, 3.15]), runs) == []
    assert beyond(torch.tensor([5.01, 4.0, 3.3]), runs) == [0, 2]
    assert noise_of([torch.zeros(2, 3, 4), torch.ones(2, 3, 4)]).tolist() == [1, 1]


def test_ranks_exchange_bytes_of_any_length(two_ranks):
    assert [rank["gathered"] for rank in told(two_ranks)] == [[0, 5], [0, 5]]


def test_one_rank_goes_on_with_the_people_and_losses_of_two_by_opencv(
    two_ranks, tiny_shards, tmp_path
):
    config = tiny_config(
        tiny_shards, data={"loader": "opencv", "preset": "newell"}, train={"steps_per_epoch": 2}
    )
    source = two_ranks / "opencv2" / "last.pt"
    run = make_run(config, tmp_path, checkpoint.load_checkpoint(source))
    assert "; a step takes 8 people as before, 4 per rank x 1 rank(s) x 2" in run.remarks[0]
    assert run.remarks[1] == "people follow each other as before"
    first, second = (rank["opencv goes on"] for rank in told(two_ranks))
    after = [step(run) for _ in range(2)]
    assert [rows_of(totals) for totals in after] == [
        a + b for a, b in zip(first["rows"], second["rows"], strict=True)
    ]
    expected = np.add(first["losses"], second["losses"])
    # Sums over a batch are rounded otherwise, and the second step begins from other weights so.
    np.testing.assert_allclose([t.sums[0].item() for t in after], expected, rtol=1e-4)


def test_one_rank_begins_a_new_pass_over_the_people_of_two_by_dali(
    two_ranks, tiny_shards, tmp_path
):
    config = tiny_config(
        tiny_shards, data={"loader": "dali", "preset": "newell"}, train={"steps_per_epoch": 2}
    )
    state = checkpoint.load_checkpoint(two_ranks / "dali2" / "last.pt")
    run = make_run(config, tmp_path, state)
    assert run.remarks[1] == "DALI begins a new pass over the people, with new draws"
    run.save(["last.pt"])
    stepwise = [rows_of(step(run)) for _ in range(3)]
    assert sorted([row for rows in stepwise for row in rows][:12]) == list(range(12))
    fresh = make_run(config, tmp_path / "fresh")
    assert rows_of(step(fresh)) != stepwise[0][:4], "the run's first pass once more"
    again = make_run(config, tmp_path, checkpoint.load_checkpoint(tmp_path / "last.pt"))
    assert [rows_of(step(again)) for _ in range(3)] == stepwise


@pytest.mark.parametrize(
    ("batch", "parts", "before", "now", "expected"),
    [(4, 1, 2, 1, (4, 2)),  # a rank is lost: two batches make up the step
     (4, 1, 1, 2, (2, 1)),  # one is won: each takes half
     (4, 2, 3, 2, (4, 3)), (6, 1, 2, 3, (4, 1)), (2, 4, 1, 4, (2, 1))],
)  # fmt: skip
def test_another_number_of_ranks_shares_the_same_global_batch(batch, parts, before, now, expected):
    config = tiny_config(Path("x"), data={"batch_size": batch}, optim={"accumulate": parts})
    state = saved(config, before, step=6)
    fitted, remarks = resuming.fit_to_ranks(config, state, now)
    assert (fitted.data.batch_size, fitted.optim.accumulate) == expected
    assert f"the run had {before} rank(s) and has {now}" in remarks[0]
    # And again, when this run is resumed in its turn.
    people = resuming.people_a_step(fitted, now)
    state = replace(state, run=replace(state.run, ranks=now, people_a_step=people))
    assert resuming.fit_to_ranks(config, state, now) == (fitted, [])


def saved(config, ranks: int, step: int) -> checkpoint.Checkpoint:
    run = checkpoint.RunState(
        ranks=ranks,
        people=12,
        loader="opencv",
        rng=[],
        loader_states=[],
        people_a_step=resuming.people_a_step(config, ranks),
    )
    return checkpoint.Checkpoint(
        path=Path("last.pt"),
        config=config,
        skeleton=MPII,
        step=step,
        weights={},
        averaged={},
        optimizer={},
        run=run,
    )


def test_a_global_batch_may_be_shared_by_hand_but_not_changed():
    old = tiny_config(Path("x"), data={"batch_size": 4})
    by_hand = tiny_config(Path("x"), data={"batch_size": 2})
    state = saved(old, 1, step=6)
    fitted, _ = resuming.fit_to_ranks(by_hand, state, 2)
    assert (fitted.data.batch_size, fitted.optim.accumulate) == (2, 1)
    with pytest.raises(InputError, match=r"data\.batch_size was 4, is 2"):
        resuming.fit_to_ranks(by_hand, state, 3)
    with pytest.raises(InputError, match="4 people a step, now on 3 ranks"):
        resuming.fit_to_ranks(old, state, 3)


def test_another_number_of_ranks_is_refused_in_mid_epoch():
    config = tiny_config(Path("x"), train={"steps_per_epoch": 6})
    with pytest.raises(InputError, match=r"2 rank\(s\), now 1, in mid-epoch \(step 7, 6 an epoch"):
        resuming.fit_to_ranks(config, saved(config, 2, step=7), 1)


def test_the_refusal_names_the_checkpoint_of_the_epochs_end(tmp_path):
    config = tiny_config(Path("x"), train={"steps_per_epoch": 6})
    for name in ("step_00000006.pt", "step_00000012.pt", "step_00000013.pt", "step_of_mine.pt"):
        (tmp_path / name).touch()
    state = replace(saved(config, 2, step=13), path=tmp_path / "last.pt")
    with pytest.raises(InputError) as caught:
        resuming.fit_to_ranks(config, state, 1)
    assert caught.value.next_step.endswith(f"--resume {tmp_path / 'step_00000012.pt'}")


def test_a_run_without_last_pt_is_a_run(tiny_shards, tmp_path):
    make_run(tiny_config(tiny_shards), tmp_path / "run").save(["last.pt"])
    (tmp_path / "run" / "last.pt").unlink()
    with pytest.raises(InputError) as caught:
        train_program.find_start(tmp_path / "run", None, [])
    assert caught.value.next_step.endswith("continue it with --resume")
    other = tmp_path / "elsewhere" / "last.pt"
    with pytest.raises(InputError, match="which is not of it"):
        train_program.find_start(tmp_path / "run", str(other), [])
    source, _ = train_program.find_start(tmp_path / "run", "", [])
    assert Path(source).name == "step_00000000.pt"


def test_a_start_removes_what_a_killed_one_was_writing(tmp_path):
    for name in ("step_00000006.pt.tmp", "last.pt.tmp", "last.pt"):
        (tmp_path / name).touch()
    keeping.begin(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "lock"}


def test_a_run_that_a_signal_ended_at_an_epochs_end_validates_when_it_goes_on(
    tiny_shards, tmp_path
):
    config = tiny_config(tiny_shards)
    run = make_run(config, tmp_path)
    run.validation_due, run.step = True, 6
    run.save(["last.pt"])
    again = make_run(config, tmp_path, checkpoint.load_checkpoint(tmp_path / "last.pt"))
    assert again.train()["people"] == 5
    assert (tmp_path / "best.pt").exists() and not again.validation_due


def test_auto_begins_a_run_and_continues_it(tiny_shards, tmp_path):
    folder = tmp_path / "run"
    start, remarks = train_program.find_start(folder, "auto", [])
    assert (start, remarks) == ("", ["there is no checkpoint yet, so it begins anew"])
    make_run(tiny_config(tiny_shards), folder).save(["last.pt"])
    start, remarks = train_program.find_start(folder, "auto", [])
    assert (start, remarks) == (str(folder / "last.pt"), [f"continuing from {folder / 'last.pt'}"])


def test_a_start_that_fails_leaves_no_marker_that_asks_for_another(
    tiny_shards, tmp_path, monkeypatch
):
    run = make_run(tiny_config(tiny_shards), tmp_path / "run")
    run.save(["last.pt"])
    save_yaml(run.given, tmp_path / "config.yaml")
    keeping.ask_to_resume(tmp_path / "run", "STOPPED EARLY")
    words = ["--config", tmp_path / "config.yaml", "--train.out", tmp_path, "--train.name", "run",
             "--data.shards", tmp_path / "none"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words), "--resume"])
    with pytest.raises(InputError, match="none"):
        train_program.main()
    assert not (tmp_path / "run" / "resume_me").exists()


def test_only_ranks_that_the_same_torchrun_started_resume_by_themselves(tiny_shards, tmp_path):
    make_run(tiny_config(tiny_shards), tmp_path).save(["last.pt"])
    keeping.begin(tmp_path)
    start, remarks = train_program.find_start(tmp_path, None, ["node2 8 100", "node3 9 100"])
    assert start == str(tmp_path / "last.pt") and "torchrun started the ranks again" in remarks[0]
    for another in (["node1 7 200"], []):
        with pytest.raises(InputError, match="a run of this name"):
            train_program.find_start(tmp_path, None, another)


def test_a_decision_of_the_first_rank_is_plain_values_or_its_error():
    assert from_first_rank(lambda: ("a", ["b"]), HERE) == ["a", ["b"]]

    def refuse() -> None:
        raise InputError("where", "found", "expected", "next")

    with pytest.raises(InputError, match=r"where\n  found:    found"):
        from_first_rank(refuse, HERE)


def test_a_refused_change_is_named_and_a_free_one_is_not():
    old = tiny_config(Path("x"))
    new = tiny_config(Path("x"), data={"preset": "newell"}, optim={"lr": 1e-5}, train={"seed": 9})
    with pytest.raises(InputError) as caught:
        resuming.fit_to_ranks(new, saved(old, 1, step=6), 1, Path("last.pt"))
    names = [line.split()[0] for line in caught.value.found.split("; ")]
    assert names == ["data.preset", "train.seed"]
