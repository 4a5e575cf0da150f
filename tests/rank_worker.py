"""Run under torchrun: do every job of a plan, all in one group of ranks.

    torchrun --standalone --nproc-per-node=2 tests/rank_worker.py FOLDER PLAN.json

The plan is a list of jobs, each with a `kind` and a `name`. After each job a rank writes what it saw to
FOLDER/rank-R.json; when torchrun starts all ranks again, jobs that are done are left out. A job is a run of
the tiny model (`run` serves one process too), or a command line, or errors that rank 0 raises.
"""
import contextlib
import faulthandler
import io
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from fork_server import CONFIG, MODEL, TEXTS

from optimus import LanguageModel, ModelConfig, TrainingConfig, cli, distributed, ranks, train, training
from optimus.checkpoint import CheckpointError, load_checkpoint
from optimus.data import batches, train_tokenizer
from optimus.distributed import DDPRanks, FSDPRanks, join, restart_count
from optimus.transformer import MLATransformerBlock

SCATTERS = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
RANK = int(os.environ.get("RANK", 0))
LOSS, BLOCK, REPLICATE = LanguageModel.loss, MLATransformerBlock.forward, DDPRanks.replicate
GATHER, SCATTER = FSDPRanks.gather, getattr(dist, SCATTERS)
exchanges = 0  # of gradients, counted while a job says "count"


# Faults: each gives (owner, name, what stands there meanwhile)

def on_rank_1(change):
    """`change(loss, tokens, number of the call)` on rank 1's training losses only."""
    calls = [0]

    def loss(self, x, y):
        value = LOSS(self, x, y)
        calls[0] += self.training
        return change(value, x, calls[0]) if self.training and RANK == 1 else value
    return LanguageModel, "loss", loss


class BackwardOutOfMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): raise torch.OutOfMemoryError("pretended")


def too_long(loss, x, call):
    if len(x) > 1: raise torch.OutOfMemoryError("pretended")
    return loss


def tight_second_block(self, x, *rest):
    if self.training and RANK == 1 and len(x) > 1 and hasattr(self, "second"):
        raise torch.OutOfMemoryError("pretended")
    return BLOCK(self, x, *rest)


def marked_blocks(self, config):
    """LanguageModel.__init__ that lets a block know that it is the second."""
    INIT(self, config)
    self.blocks[1].second = True


def uneven(sequences, batch_size, steps, *, rank=0, world_size=1, **options):
    """Targets counted unevenly over ranks: sequence i of the whole batch keeps its first 5 i."""
    share = batch_size // world_size
    for x, y in batches(sequences, batch_size, steps, rank=rank, world_size=world_size, **options):
        for i in range(share): y[i, 5 * (rank * share + i):] = -100
        yield x, y


def same_data(*a, rank=0, **options): return batches(*a, rank=0, **options)
def refused(*a, **options): raise CheckpointError("could not write: pretended")
def counted_locally(self, x): return x.detach().cpu() * self.world_size
def always_exchanged(self, model, is_last): return contextlib.nullcontext()
def always_scattered(self, model, is_last): return contextlib.nullcontext()  # FSDP's default


def only_shards(self, value):
    """`gather` that forgets the optimizer: momenta are zeros instead of what the ranks hold."""
    value = GATHER(self, value)
    for entry in value.get("state", {}).values() if isinstance(value, dict) else ():
        for x in filter(torch.is_tensor, entry.values()): x.zero_()
    return value


INIT = LanguageModel.__init__
UNEVEN = (training, "batches", uneven)
FAULTS = {
    "uneven": lambda: [UNEVEN],
    "uneven, counted locally": lambda: [UNEVEN, (DDPRanks, "all_sum", counted_locally)],
    "same data": lambda: [(training, "batches", same_data)],
    "memory": lambda: [on_rank_1(too_long)],
    "memory in a block": lambda: [(LanguageModel, "__init__", marked_blocks),
                                  (MLATransformerBlock, "forward", tight_second_block)],
    "memory in backward": lambda: [on_rank_1(lambda loss, x, call: BackwardOutOfMemory.apply(loss)
                                             if len(x) > 1 else loss)],
    "nan": lambda: [on_rank_1(lambda loss, x, call: loss * (math.nan if call == 4 else 1))],
    "float16, inf": lambda: [on_rank_1(lambda loss, x, call: loss * (math.inf if call == 4 else 1)),
                             (training, "amp_dtype", lambda amp, device: torch.float16),
                             (training, "autocast", lambda dtype, device: contextlib.nullcontext())],
    "refused": lambda: [(training, "save_checkpoint", refused)],
    "always exchanged": lambda: [(DDPRanks, "micro_batch", always_exchanged),
                                 (FSDPRanks, "micro_batch", always_scattered)],
    "only shards": lambda: [(FSDPRanks, "gather", only_shards)],
}


def counting_replicate(self, model):
    REPLICATE(self, model)

    def hook(state, bucket):
        global exchanges
        exchanges += 1
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        return allreduce_hook(state, bucket)
    self.replica.register_comm_hook(None, hook)


def counting_scatter(*a, **options):
    global exchanges
    exchanges += 1
    return SCATTER(*a, **options)


COUNTED = [(DDPRanks, "replicate", counting_replicate), (dist, SCATTERS, counting_scatter)]


@contextlib.contextmanager
def planted(changes):
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for change in changes: setattr(*change)
        yield
    finally:
        for kept in before: setattr(*kept)


def run(folder: Path, job: dict) -> dict:
    """Train as `job` says and return what can be compared: losses, steps, sizes, or the error."""
    global exchanges
    exchanges = 0
    run_name = job.get("run", job["name"])
    places = dict(checkpoint_dir=str(folder / "checkpoints"), tensorboard_dir=str(folder / "runs"))
    config = TrainingConfig(**CONFIG | places | dict(run_name=run_name, save_interval=5, max_steps=20)
                            | job.get("settings", {}))
    model = ModelConfig(**MODEL | dict(dropout=0.0) | job.get("model", {}))

    streams = []  # the next numbers of this rank's random stream, after each step

    def on_step(row):
        ahead = torch.Generator()
        ahead.set_state(torch.get_rng_state())
        streams.append(torch.rand(2, generator=ahead).tolist())
        killed = row["step"] == job.get("kill") and not restart_count()
        if RANK == 1 and killed: os.kill(os.getpid(), signal.SIGKILL)
        if RANK == 1 and row["step"] == job.get("signal"): os.kill(os.getpid(), signal.SIGTERM)
        last_rank = RANK == int(os.environ.get("WORLD_SIZE", 1)) - 1
        return last_rank and row["step"] == job.get("stop")  # the wish of one rank is enough

    read = []  # checkpoints that this rank has opened

    def reading(path, **how):
        read.append(str(path))
        return load_checkpoint(path, **how)
    changes = FAULTS[job["fault"]]() if job.get("fault") else []
    changes = [*changes, (ranks, "load_checkpoint", reading), (distributed, "load_checkpoint", reading)]
    with planted(changes + (COUNTED if job.get("count") else [])):
        try: result = train(model, config, resume=job.get("resume", False) or restart_count() > 0,
                            corpus={"text": TEXTS}, tokenizer=train_tokenizer(TEXTS, 280), progress=False,
                            on_step=on_step, ranks=join(config.parallel))
        except (CheckpointError, ValueError) as error: return {"error": f"{type(error).__name__}: {error}"}
    rows = result.history
    model = result.model
    if config.parallel == "fsdp": model = LanguageModel.from_pretrained(result.checkpoint)
    state = json.loads((result.checkpoint / "trainer_state.json").read_text())
    return {"losses": [row["loss"] for row in rows], "norms": [row["gradient_norm"] for row in rows],
            "scales": [row["loss_scale"] for row in rows],
            "validation": [row["validation_loss"] for row in rows if "validation_loss" in row],
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
            "stopped_by": result.stopped_by, "checkpoint": str(result.checkpoint), "state": state["run"],
            "exchanges": exchanges, "streams": streams, "process": os.getpid(), "read": len(read)}


class Local(Exception):
    """An error that cannot travel: it is built from other things than its words."""
    def __init__(self, a, b): super().__init__(f"{a} and {b}")


ODD = [KeyError("x"), OSError(2, "missing", "a.txt"), json.JSONDecodeError("bad", "{", 1),
       ValueError("two", 2), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
       CheckpointError("no"), Local(1, 2)]


def errors(parallel: str) -> list:
    """What each rank sees of errors that happen on rank 0: [type, words, who tells it]."""
    group, seen = join(parallel), []
    for error in ODD:
        def fail(error=error): raise error
        try: group.on_rank_zero(fail)
        except Exception as seen_here:
            seen.append([type(seen_here).__name__, str(seen_here), seen_here.reported_by_rank_zero])
    return seen


def command(words: list[str]) -> dict:
    """What the command line prints on this rank; the group of ranks stays."""
    out, err = io.StringIO(), io.StringIO()
    with (planted([(dist, "destroy_process_group", lambda: None)]), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        return dict(code=cli.main(words), out=out.getvalue(), err=err.getvalue())


def do(folder: Path, job: dict):
    if job.get("errors"): return errors(job["kind"])
    if job.get("words"): return command(job["words"])
    return run(folder / job["kind"], job)


def main():
    faulthandler.dump_traceback_later(150, exit=True)  # a hang shows where
    torch.set_num_threads(1)
    folder, plan = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    place = folder / f"rank-{RANK}.json"
    results = json.loads(place.read_text()) if place.is_file() else {}
    for job in plan:
        seen = results.setdefault(job["kind"], {})
        if job["name"] in seen: continue  # done before a rank was lost
        try: seen[job["name"]] = do(folder, job)
        except BaseException:  # a rank is lost; the clean-up of all groups would wait for it
            traceback.print_exc()
            os._exit(1)
        half = place.with_suffix(".half")
        half.write_text(json.dumps(results))
        half.replace(place)
    dist.destroy_process_group()


if __name__ == "__main__": main()
