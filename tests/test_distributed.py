"""What must stay true of optimus.distributed: ranks change nothing but the speed. Derived in notebook 14.

Two real ranks under torchrun with gloo train the tiny model of fork_server.py. Starting them is slow, so
one start serves the jobs of a whole plan; each test looks at those it is for. Most runs end after some steps,
and their curve must be the beginning of a whole one.
"""
import json
import math
import os
import pickle
import re
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from fork_server import TEXTS
from rank_worker import ODD
from rank_worker import run as run_job

from optimus import ModelConfig, TrainingConfig, cli, train
from optimus.checkpoint import find_damage, load_checkpoint, step_folders
from optimus.distributed import bytes_sent_per_rank, join, memory_per_rank, picklable
from optimus.ranks import SINGLE_PROCESS, Ranks

ROOT = Path(__file__).resolve().parent.parent
DDP, FSDP, DROPOUT = dict(parallel="ddp"), dict(parallel="fsdp"), dict(dropout=0.2)
BOTH = pytest.mark.parametrize("kind", ["ddp", "fsdp"])


def torchrun(*words, cache, seconds=170, options=()):
    """Run two ranks to their end; a hang is an error."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OPTIMUS_CACHE": str(cache), "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.run([*command, *map(str, words)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=seconds)


STEPS = dict(recomputed=10, muon=10, uneven=10, nan=8, float16=8, parts=10)  # the others end after 6 steps


def jobs(kind):
    """The plan for one kind of ranks."""
    settings = dict(parallel=kind)
    parts, twelve = settings | dict(micro_batch_size=1), settings | dict(max_steps=12)
    plan = [dict(name="plain", stop=20),
            dict(name="recomputed", model=dict(checkpointing=True, tie_embeddings=False)),
            dict(name="muon", settings=settings | dict(optimizer="muon")),
            dict(name="uneven", fault="uneven", settings=parts),
            dict(name="same data", fault="same data"),
            dict(name="memory", fault="memory"),
            dict(name="nan", fault="nan"), dict(name="float16", fault="float16, inf"),
            dict(name="refused", fault="refused"),
            dict(name="odd", settings=settings | dict(batch_size=5)),
            dict(name="signal", signal=6, stop=20),
            dict(name="parts", count=True, settings=parts),
            dict(name="always", count=True, fault="always exchanged", settings=parts),
            dict(name="dropout", model=DROPOUT, settings=twelve, stop=12),
            dict(name="dropout to 5", run="dropout-parts", model=DROPOUT, settings=twelve, stop=5),
            dict(name="dropout to 12", run="dropout-parts", model=DROPOUT, settings=twelve, stop=12,
                 resume=True),
            dict(name="from 1 rank", run="from-one", resume=True, stop=10),
            dict(name="to 1 rank", stop=5), dict(name="errors", errors=True)]
    if kind == "ddp":
        plan.append(dict(name="locally", fault="uneven, counted locally", settings=parts))
    else:
        plan += [dict(name="memory in a block", fault="memory in a block"),
                 dict(name="forgotten", stop=5, fault="only shards")]
    return [dict(kind=kind, settings=settings, stop=STEPS.get(job["name"], 6)) | job for job in plan]


def command(folder):
    """The words of the command line that trains on two ranks."""
    text = folder / "text.txt"
    documents = [f"Document {i} counts from {i} to {i * i}. " * 9 for i in range(40)]
    text.write_text("\n<|endoftext|>\n".join(documents))
    words = ["train", "--preset", "tiny", "--corpus", text, "--model.vocab-size", "300",
             "--model.embedding-dim", "32", "--model.num-layers", "2", "--training.parallel", "fsdp",
             "--training.max-steps", "4", "--training.max-length", "32",
             "--training.checkpoint-dir", folder / "c", "--training.tensorboard-dir", folder / "r"]
    return list(map(str, words))


def plan_of(folder):
    """All jobs of the one start; in the last two a rank is lost, and torchrun starts all of them again."""
    lost = [dict(name="killed", kill=6), dict(name="lost memory", fault="memory in backward")]
    return [*jobs("ddp"), *jobs("fsdp"), dict(kind="command", name="train", words=command(folder)),
            *(dict(kind="ddp", settings=DDP, stop=10) | job for job in lost)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Runs on one process, by name: the curves that two ranks must show."""
    folder, seen = tmp_path_factory.mktemp("single"), {}

    def go(name="plain", **job):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPTIMUS_CACHE", str(folder / "cache"))
            if name not in seen: seen[name] = run_job(folder, dict(name=name, **job))
        return seen[name]
    return go


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks(kind) -> (folder, [rank 0's results, rank 1's results]); started at the first question."""
    seen = []

    def go(kind):
        if not seen:
            folder = tmp_path_factory.mktemp("ranks")
            seen.append(None)  # a start that fails is not tried again for every test
            for parallel in ("ddp", "fsdp"):
                run_job(folder / parallel, dict(name="from 1 rank", run="from-one", stop=5))
            (folder / "plan.json").write_text(json.dumps(plan_of(folder)))
            done = torchrun("tests/rank_worker.py", folder, folder / "plan.json", cache=folder / "cache",
                            options=["--max-restarts", "3"])
            assert done.returncode == 0, done.stderr[-4000:]
            both = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
            seen[:] = [(folder, both)]
        assert seen[0], "the ranks did not come to their end"
        folder, both = seen[0]
        return folder / kind, [results[kind] for results in both]
    return go


def apart(a, b): return max(abs(x - y) for x, y in zip(a, b, strict=True))


def from_single(result, one):
    """How far a curve is from the beginning of a whole one."""
    assert 4 < len(result["losses"]) <= len(one["losses"])
    return apart(result["losses"], one["losses"][:len(result["losses"])])


# Two ranks with half a batch each are one rank with the batch

@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("name, job", [
    ("plain", {}), ("recomputed", dict(model=dict(checkpointing=True, tie_embeddings=False))),
    ("muon", dict(settings=dict(optimizer="muon"))), ("uneven", dict(fault="uneven"))])
def test_two_ranks_show_the_curve_of_one(ranks, single, kind, name, job):
    _, (first, second) = ranks(kind)
    one = single(name, stop=STEPS.get(name, 20), **job)
    assert len(one["losses"]) == STEPS.get(name, 20) and one["losses"][-1] < one["losses"][0] - 0.5
    for result in (first[name], second[name]):
        assert apart(result["losses"], one["losses"]) < 1e-5
        assert apart(result["validation"], one["validation"]) < 1e-5
        assert apart(result["weights"], one["weights"]) < 1e-3
    assert first[name]["weights"] == second[name]["weights"]


@pytest.mark.slow
@BOTH
def test_the_equality_fails_when_ranks_read_the_same_data(ranks, single, kind):
    assert from_single(ranks(kind)[1][0]["same data"], single()) > 1e-2


@pytest.mark.slow
def test_the_equality_fails_when_each_rank_counts_its_own_targets(ranks, single):
    one = single("uneven", fault="uneven", stop=STEPS["uneven"])
    assert from_single(ranks("ddp")[1][0]["locally"], one) > 1e-2


@pytest.mark.slow
@BOTH
def test_gradients_are_exchanged_once_a_step(ranks, single, kind):
    result = ranks(kind)[1][0]
    groups = 1 if kind == "ddp" else 3  # the tiny model is one bucket; FSDP has two blocks and the rest
    assert result["parts"]["exchanges"] == 10 * groups
    assert result["always"]["exchanges"] == 2 * 6 * groups
    assert from_single(result["parts"], single()) < 1e-5


# One checkpoint format

@pytest.mark.slow
@BOTH
def test_resumed_on_the_same_ranks_it_is_exact_with_dropout(ranks, single, kind):
    _, (first, second) = ranks(kind)
    for item in ("losses", "weights"): assert first["dropout to 12"][item] == first["dropout"][item]
    assert len(first["dropout to 5"]["losses"]) == 5
    assert from_single(first["dropout"], single()) > 1e-2  # dropout was on
    for mine in (first, second): assert mine["dropout to 12"]["streams"] == mine["dropout"]["streams"][5:]


@pytest.mark.slow
@BOTH
def test_every_rank_draws_its_own_dropout(ranks, single, kind):
    _, (first, second) = ranks(kind)
    mine, other = first["dropout"]["streams"], second["dropout"]["streams"]
    assert len(mine) == len(other) == 12 and all(a != b for a, b in zip(mine, other))
    assert mine[0] != mine[1] and other[0] != other[1]  # dropout draws from it


@pytest.mark.slow
@BOTH
def test_saved_on_one_rank_and_resumed_on_two(ranks, single, kind):
    assert from_single(ranks(kind)[1][0]["from 1 rank"], single()) < 1e-5


@pytest.mark.slow
@BOTH
def test_saved_on_two_ranks_and_resumed_on_one(ranks, single, kind):
    folder, (first, _) = ranks(kind)
    assert len(first["to 1 rank"]["losses"]) == 5
    resumed = run_job(folder, dict(name="to 1 rank", resume=True, stop=10))
    assert from_single(resumed, single()) < 1e-5


@pytest.mark.slow
def test_the_equality_fails_when_the_optimizer_is_not_gathered(ranks, single):
    resumed = run_job(ranks("fsdp")[0], dict(name="forgotten", resume=True, stop=15))
    assert from_single(resumed, single()) > 1e-3


@pytest.mark.slow
@BOTH
def test_the_folder_is_that_of_one_process(ranks, single, kind):
    one, two = Path(single()["checkpoint"]), Path(ranks(kind)[1][0]["plain"]["checkpoint"])
    assert find_damage(two) is None
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    a, b = load_checkpoint(one).train_state, load_checkpoint(two).train_state
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for i, entry in a["optimizer"]["state"].items():
        for name, x in entry.items():
            torch.testing.assert_close(b["optimizer"]["state"][i][name], x, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@BOTH
def test_rank_0_alone_writes_the_log(ranks, kind):
    folder, _ = ranks(kind)
    rows = [json.loads(line) for line in open(folder / "checkpoints" / "plain" / "history.jsonl")]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert len(list((folder / "runs" / "plain").glob("events*"))) == 1


# Faults on one rank

@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [("ddp", "memory"), ("fsdp", "memory"), ("fsdp", "memory in a block")])
def test_out_of_memory_on_one_rank_halves_the_parts_of_all(ranks, single, kind, name):
    _, both = ranks(kind)
    for result in both:
        assert result[name]["state"]["micro_batch_size"] == 1
        assert from_single(result[name], single()) < 1e-5


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("name", ["nan", "float16"])
def test_a_loss_that_is_not_finite_on_one_rank_is_a_step_skipped_by_all(ranks, kind, name):
    _, (first, second) = ranks(kind)
    assert not math.isfinite(first[name]["losses"][3]) and not math.isfinite(second[name]["norms"][3])
    assert all(map(math.isfinite, first[name]["losses"][:3] + first[name]["losses"][4:]))
    assert first[name]["state"]["updates"] == STEPS[name] - 1
    assert first[name]["weights"] == second[name]["weights"]
    assert first[name]["scales"] == second[name]["scales"]
    if name == "float16": assert first[name]["scales"][4] == first[name]["scales"][3] / 2


@pytest.mark.slow
@BOTH
def test_a_signal_to_one_rank_stops_all_at_the_same_step(ranks, kind):
    for result in ranks(kind)[1]:
        assert (len(result["signal"]["losses"]), result["signal"]["stopped_by"]) == (6, 15)


@pytest.mark.slow
@BOTH
def test_an_error_on_rank_0_is_everyones_and_settings_are_refused_in_one_sentence(ranks, kind):
    for result in ranks(kind)[1]:
        assert result["refused"]["error"] == "CheckpointError: could not write: pretended"
        assert result["odd"]["error"] == "ValueError: batch_size is 5; it must be a multiple of 2 ranks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "lost memory"])
def test_a_killed_rank_and_memory_lost_in_backward_start_all_again(ranks, single, name):
    """torchrun starts every rank again; the run goes on from its newest checkpoint."""
    folder, both = ranks("ddp")
    for result in both:
        assert from_single(result[name], single()) < 1e-5 and len(result[name]["losses"]) == 10
    assert step_folders(folder / "checkpoints" / name)[-1].name[-2:] == "10"
    if name == "lost memory":
        assert [result[name]["state"]["micro_batch_size"] for result in both] == [1, 1]


@pytest.mark.slow
@BOTH
def test_an_error_travels_as_it_is_or_at_least_with_its_words(ranks, kind):
    """Errors of rank 0, as both ranks have seen them; rank 0 tells them, the other is silent."""
    first, second = (result["errors"] for result in ranks(kind)[1])
    wanted = [[type(e).__name__, str(e)] for e in ODD[:-1]] + [["RuntimeError", "Local: 1 and 2"]]
    assert [told[:2] for told in first] == [told[:2] for told in second] == wanted
    assert not any(told[2] for told in first) and all(told[2] for told in second)


@pytest.mark.parametrize("error", ODD[:-1], ids=lambda e: type(e).__name__)
def test_what_is_portable_is_itself_on_the_other_side(error):
    there = ForkingPickler.loads(pickle.dumps(picklable(error)))
    assert (type(there), str(there)) == (type(error), str(error))


def test_an_error_that_cannot_travel_is_told_in_its_words():
    with pytest.raises(TypeError): pickle.loads(pickle.dumps(ODD[-1]))  # noqa: S301  what picklable is for
    assert repr(picklable(ODD[-1])) == "RuntimeError('Local: 1 and 2')"


@pytest.mark.slow
@BOTH
def test_on_resume_rank_0_alone_opens_the_checkpoint(ranks, kind):
    first, second = ranks(kind)[1]
    for name in ("dropout to 12", "from 1 rank"): assert (first[name]["read"], second[name]["read"]) == (1, 0)


# The command line

@pytest.mark.slow
def test_the_command_trains_on_two_ranks_and_torchrun_continues_it(ranks, tmp_path):
    folder, both = ranks("command")
    assert [result["train"]["code"] for result in both] == [0, 0]
    first, second = (result["train"]["out"] for result in both)
    assert first.count("on 2 ranks (fsdp) of cpu") == first.count("trained ") == first.count("sample: ") == 1
    assert not second
    run = folder.parent / "c" / "run-001"
    assert find_damage(run / "step-00000004") is None
    words = ["-m", "optimus.cli", "train", "--resume", "--training.checkpoint-dir", run.parent]
    done = torchrun(*words, "--training.max-steps", "6", cache=folder.parent / "cache")
    assert done.returncode == 0, done.stderr[-4000:]  # all other settings, `fsdp` too, are the run's own
    assert done.stdout.count("continuing ") == done.stdout.count("on 2 ranks (fsdp) of cpu") == 1
    assert find_damage(run / "step-00000006") is None


def test_torchrun_without_parallel_and_parallel_without_torchrun_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="'ddp'.*needs torchrun: torchrun --nproc-per-node=N"): join("ddp")
    assert join("none").world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes.*--training.parallel ddp"): join("none")


def test_train_without_its_ranks_is_refused(tmp_path):
    config = TrainingConfig(parallel="ddp", checkpoint_dir=str(tmp_path))
    with pytest.raises(ValueError, match="parallel is 'ddp'.*ranks"): train(ModelConfig(), config)
    with pytest.raises(ValueError, match=re.escape("parallel must be one of 'none', 'ddp', 'fsdp'")):
        TrainingConfig(parallel="zero")


def test_a_run_that_torchrun_starts_again_goes_on_and_one_process_begins_anew(tmp_path, monkeypatch, capsys):
    """The command's two starts, with ranks that note the run's name as torchrun's store would."""
    class Noting(Ranks):
        def remember_run(self, run_name): notes.append(run_name)
        def remembered_run(self): return notes[-1] if notes else None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    words = ["train", "--preset", "tiny", "--corpus", "text.txt", "--model.vocab-size", "300",
             "--training.max-length", "16", "--training.max-steps"]
    notes, started = [], []
    for ranks, steps, restarts in ((Noting(), 1, None), (Noting(), 2, "1"), (SINGLE_PROCESS, 1, "2")):
        monkeypatch.setattr("optimus.distributed.join", lambda parallel, ranks=ranks: ranks)
        if restarts: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert cli.main([*words, str(steps)]) == 0
        started.append(capsys.readouterr().out.split(":")[0])
    assert started[1] == "continuing checkpoints/run-001" and started[0] == started[2] != started[1]
    assert [step_folders(f"checkpoints/run-00{n}")[-1].name[-1] for n in (1, 2)] == ["2", "1"]


@pytest.mark.parametrize("environment, words", [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"), ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
    ({"WORLD_SIZE": ""}, "needs torchrun"), ({"WORLD_SIZE": "2"}, "RANK.*not set.*torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK.*not set.*torchrun")])
def test_an_environment_that_torchrun_did_not_make_is_refused_in_a_sentence(monkeypatch, environment, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words): join("ddp")


def test_one_process_that_torchrun_started_again_has_noted_no_run():
    assert SINGLE_PROCESS.remembered_run() is None  # asked when TORCHELASTIC_RESTART_COUNT is set


@pytest.mark.parametrize("predicted", [bytes_sent_per_rank, memory_per_rank])
def test_only_the_two_ways_to_share_are_predicted(predicted):
    assert predicted(ModelConfig(), 4, "ddp") != predicted(ModelConfig(), 4, "fsdp")
    for other in ("FSDP", "none", ""):
        with pytest.raises(ValueError, match=f"parallel is {other!r}; it must be 'ddp' or 'fsdp'"):
            predicted(ModelConfig(), 4, other)
