"""A run survives being killed, interrupted and pulled from its terminal. Derived in notebooks 11 and 12."""
import ast
import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimus import cli
from optimus.checkpoint import find_damage, step_folders, step_of

ROOT = Path(__file__).resolve().parent.parent


class ForkServer:
    """A process that has imported torch once and forks a training child for every request."""
    def __init__(self, environment):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "fork_server.py"], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"})

    def start(self, **settings) -> int:
        """Begin a child and return its process number."""
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int: return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer({"OPTIMUS_CACHE": str(tmp_path_factory.mktemp("server") / "cache")})
    yield server
    server.close()


def logged(folder: Path) -> dict[int, str]:
    """step -> the loss in the log, to the last bit; a line cut in the middle does not count."""
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines(True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"].hex() for row in rows}


def unfinished_save(folder: Path) -> bool:
    return any(p.name.startswith((".half-", ".old-")) for p in folder.glob(".*"))


@pytest.fixture
def places(tmp_path):
    """Settings for a run "a" that nothing disturbs and a run "b" that is killed."""
    return {name: dict(checkpoint_dir=str(tmp_path / name), tensorboard_dir=str(tmp_path / f"{name}-runs"),
                       run_name="run") for name in "ab"}


def finish(server, places, folder, whole):
    """Let the killed run come to its end: its curve and its folder are those of the whole run."""
    server.start(**places["b"])
    assert server.wait() == 0
    assert logged(folder) == whole and list(whole) == list(range(1, 41)) and not unfinished_save(folder)


@pytest.mark.slow
def test_a_kill_before_every_single_write_of_a_step_leaves_the_curve_as_it_was(server, places, tmp_path):
    """Child n is killed at its n-th fsync, rename or link, until one has come through two steps whole."""
    server.start(**places["a"], eval_interval=1)
    assert server.wait() == 0
    whole, folder = logged(tmp_path / "a" / "run"), tmp_path / "b" / "run"
    kills = inside = steps = begun = 0
    places["b"]["eval_interval"] = 1
    while steps - begun < 2:
        kills, begun = kills + 1, steps
        server.start(**places["b"], kill_at=kills)
        assert server.wait() == -signal.SIGKILL
        inside += unfinished_save(folder)
        assert all(find_damage(p) is None for p in step_folders(folder)), "an unreadable checkpoint"
        log = logged(folder)
        assert all(whole[step] == loss for step, loss in log.items())
        steps = max(map(step_of, step_folders(folder)), default=0)
    assert kills >= 25 and inside >= 10
    finish(server, places, folder, whole)


@pytest.mark.slow
def test_twelve_kills_at_any_time_leave_the_curve_as_it_was(server, places, tmp_path):
    server.start(**places["a"])
    assert server.wait() == 0
    whole, folder, dice = logged(tmp_path / "a" / "run"), tmp_path / "b" / "run", random.Random(0)
    for _ in range(12):
        child = server.start(**places["b"])
        time.sleep(dice.uniform(0.03, 0.3))
        with contextlib.suppress(ProcessLookupError): os.kill(child, signal.SIGKILL)
        assert server.wait() in (0, -signal.SIGKILL)
        assert all(find_damage(p) is None for p in step_folders(folder)), "an unreadable checkpoint"
        assert all(whole[step] == loss for step, loss in logged(folder).items())
    finish(server, places, folder, whole)


FULL = {"at": 0, "calls": 0, "below": ""}


def full_disk(event, arguments):
    """An audit hook: from the `at`-th attempt to write below a folder on, its disk is full. Never, if 0."""
    wants = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    write = event in ("os.rename", "os.mkdir", "os.link") or event == "open" and (arguments[2] or 0) & wants
    if not FULL["at"] or not write or not str(arguments[0]).startswith(FULL["below"]): return
    FULL["calls"] += 1
    if FULL["calls"] >= FULL["at"]: raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on_costs_one_sentence_and_no_checkpoint(
        tmp_path, corpus, monkeypatch, capsys):
    """The wreck of each start is where the next begins, and one write later the disk is full again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))
    steps = ["--training.max-steps", "2", "--training.save-interval", "1", "--training.eval-interval", "1"]
    words = [*SMALL[:-4], *SMALL[-2:]]  # with samples
    def start(place, *more):
        where = ["--training.checkpoint-dir", f"{place}/c", "--training.tensorboard-dir", f"{place}/r"]
        code = cli.main(["train", *words, *steps, "--training.run-name", "run", *where, *more])
        return code, capsys.readouterr().err
    assert start("whole")[0] == 0
    run, code, at = tmp_path / "full" / "c" / "run", 1, 0
    FULL.update(below=str(tmp_path / "full"))
    monkeypatch.setitem(FULL, "at", 0)  # whatever happens, off afterwards
    sys.addaudithook(full_disk)
    (tmp_path / "full").mkdir()
    monkeypatch.chdir(tmp_path)
    while code:
        sound, at = step_folders(run), at + 1
        FULL.update(at=at, calls=0)
        code, err = start(tmp_path / "full", *["--resume"] * bool(sound))
        FULL["at"] = 0
        told = [line for line in err.splitlines() if line.startswith("optimus: ")]
        assert code == 0 or (code, len(told)) == (1, 1) and "No space left" in told[0], (at, err)
        assert "Traceback" not in err
        assert all(find_damage(path) is None for path in (*sound, *step_folders(run)))
    assert at > 25 and logged(run) == logged(tmp_path / "whole" / "c" / "run")


def wait_for(history: Path, steps: int):
    """Until the log of a run in another process has so many steps."""
    for _ in range(3000):
        if history.exists() and history.read_text().count("\n") >= steps: return
        time.sleep(0.02)
    raise TimeoutError(f"{history} has not come to step {steps}")


SMALL = ["--preset", "tiny", "--corpus", "corpus.txt", "--model.vocab-size", "300",
         "--model.embedding-dim", "32", "--model.num-layers", "2", "--training.max-length", "16",
         "--training.num-workers", "0", "--training.sample-interval", "0", "--training.tokenizer", "None"]


@pytest.fixture
def corpus(tmp_path):
    from fork_server import TEXTS

    (tmp_path / "corpus.txt").write_text("\n<|endoftext|>\n".join(TEXTS))


@pytest.mark.slow
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(server, tmp_path, corpus):
    """A real process, stopped by SIGTERM; what it says is typed in, and SIGINT sent twice ends that."""
    child = server.start(words=["train", *SMALL, "--training.max-steps", "100000"], folder=str(tmp_path))
    history = tmp_path / "checkpoints" / "run-001" / "history.jsonl"
    wait_for(history, 4)
    os.kill(child, signal.SIGTERM)
    code, out, err = server.wait(), *((tmp_path / name).read_text() for name in ("out", "err"))
    assert code == 143, err
    steps = [json.loads(line)["step"] for line in history.read_text().splitlines()]
    newest = step_folders(history.parent)[-1]
    assert int(newest.name[5:]) == steps[-1] and find_damage(newest) is None
    assert "Traceback" not in err
    command = re.search(r"    optimus (train --resume.*)", out)[1].split()
    again = server.start(words=command, folder=str(tmp_path))
    wait_for(history, steps[-1] + 2)
    for _ in range(2): os.kill(again, signal.SIGINT)
    code, out, err = server.wait(), *((tmp_path / name).read_text() for name in ("out", "err"))
    assert code == 130 and out.startswith("continuing checkpoints/run-001: "), err
    assert [json.loads(line)["step"] for line in history.read_text().splitlines()][:len(steps) + 1] == [
        *steps, steps[-1] + 1]


@pytest.mark.slow
def test_killed_by_hand_and_resumed_shows_one_curve(server, tmp_path, corpus, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = ["train", *SMALL, "--training.max-steps", "60", "--training.save-interval", "7"]
    child = server.start(words=arguments, folder=str(tmp_path))
    history = tmp_path / "checkpoints" / "run-001" / "history.jsonl"
    wait_for(history, 17)
    os.kill(child, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    time.sleep(1.01 - time.time() % 1)  # TensorBoard's files sort by second, and within one by process number
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))
    assert cli.main([*arguments, "--resume"]) == 0
    assert [json.loads(line)["step"] for line in history.read_text().splitlines()] == list(range(1, 61))
    events = EventAccumulator(str(tmp_path / "runs" / "run-001"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 61))


def test_when_every_checkpoint_is_damaged_the_command_fails(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))
    assert cli.main(["train", *SMALL, "--training.max-steps", "3"]) == 0
    for folder in step_folders(tmp_path / "checkpoints" / "run-001"):
        (folder / "model.safetensors").write_bytes(b"damaged")
    for arguments in (["train", *SMALL, "--training.max-steps", "3", "--resume"], ["generate", "the"]):
        capsys.readouterr()
        assert cli.main(arguments) == 1
        assert "are damaged" in capsys.readouterr().err
    assert len(step_folders(tmp_path / "checkpoints" / "run-001")) == 1


@pytest.mark.slow
def test_interrupting_a_notebook_cell_keeps_the_kernel_and_the_result(tmp_path, monkeypatch):
    import threading

    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OPTIMUS_CACHE", str(tmp_path / "cache"))
    cells = [f"import os, sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
             "from fork_server import *\nfrom pathlib import Path\n"
             f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
             "config = TrainingConfig(**CONFIG | dict(\n"
             "    max_steps=10**6, save_interval=10**6, eval_interval=10**6, run_name='run',\n"
             f"    checkpoint_dir={str(tmp_path / 'c')!r}, tensorboard_dir={str(tmp_path / 'r')!r}))",
             "result = train(ModelConfig(**MODEL), config, corpus={'text': TEXTS}, progress=False,\n"
             "               tokenizer=train_tokenizer(TEXTS, 280))",
             "(result.stopped_by, result.checkpoint.is_dir(), len(result.history) > 3)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(nb, timeout=60, kernel_name="python3")

    def interrupt():
        history = tmp_path / "c" / "run" / "history.jsonl"
        while not (history.exists() and history.read_text().count("\n") > 5): time.sleep(0.05)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGINT)  # what the stop button sends
    threading.Thread(target=interrupt, daemon=True).start()
    client.execute()
    assert nb.cells[-1].outputs[0].data["text/plain"] == "(2, True, True)"


# The source

FORBIDDEN = re.compile(r"weights_only\s*=\s*False|trust_remote_code\s*=\s*True|shell\s*=\s*True")
RUNNERS = {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "marshal.loads", "dill.load",
           "joblib.load"}


def dangerous(source: str) -> list[str]:
    """What a source does that can run code from data."""
    found = [m[0] for m in FORBIDDEN.finditer(source)]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        name = ast.unparse(node.func)
        if name in RUNNERS: found.append(name)
        if name == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}: found.append(name)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "optimus").glob("*.py")), ids=lambda p: p.name)
def test_nothing_that_is_read_can_run_code(path):
    assert dangerous(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["torch.load(p)", "torch.load(p, weights_only=False)", "eval(x)",
                                  "pickle.load(f)", "run(c, shell=True)", "load(n, trust_remote_code = True)",
                                  "os.system('x')"])
def test_the_guard_sees_what_it_is_for(line): assert dangerous(line)
