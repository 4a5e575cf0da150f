"""Run under torchrun: train the tiny model once for every line of a plan, all in one group of ranks.

    torchrun --nproc-per-node=2 tests/rank_worker.py FOLDER PLAN

PLAN is a JSON list of runs; each rank writes what it saw to FOLDER/rank-R.json.
"""
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from fork_server import CONFIG, MODEL, TEXTS

from optimus import LanguageModel, ModelConfig, TrainingConfig, train, training
from optimus.checkpoint import CheckpointError
from optimus.data import batches, train_tokenizer
from optimus.distributed import DDPRanks, Ranks, join, restarted

RANK = int(os.environ.get("RANK", 0))
LOSS = LanguageModel.loss


def calls_of_loss(change):
    """LanguageModel.loss with `change(call number, model, tokens, loss)` around it; numbers count training."""
    count = [0]

    def loss(self, x, y):
        count[0] += self.training
        return change(count[0], self, x, lambda: LOSS(self, x, y))
    return LanguageModel, "loss", loss


def memory_for(sequences, rank):
    """Only `rank` has too little memory: its forward pass fails beyond so many sequences."""
    def change(call, model, x, loss):
        if model.training and RANK == rank and len(x) > sequences: raise torch.OutOfMemoryError("pretended")
        return loss()
    return calls_of_loss(change)


def memory_lost_in_block(sequences, rank):
    """The same, but the memory ends in the middle: after the first block, before the second."""
    class Tight(training.LanguageModel):
        pass
    from optimus.transformer import MLATransformerBlock
    forward = MLATransformerBlock.forward
    calls = [0]

    def tight(self, x, *rest):
        calls[0] += 1
        if self.training and RANK == rank and len(x) > sequences and calls[0] % 2 == 0:
            raise torch.OutOfMemoryError("pretended")
        return forward(self, x, *rest)
    return MLATransformerBlock, "forward", tight


def masked(call, model, x, loss): return loss()


class Masked:
    """Targets counted unevenly over ranks: sequence i of a batch keeps its first 2 + 4 i targets."""
    def __new__(cls, sequences, batch_size, steps, *, rank=0, world_size=1, **options):
        share = batch_size // world_size
        for x, y in batches(sequences, batch_size, steps, rank=rank, world_size=world_size, **options):
            y = y.clone()
            for i in range(share): y[i, 4 * (rank * share + i):] = -100
            yield x, y


def same_data(sequences, batch_size, steps, *, rank=0, world_size=1, **options):
    return batches(sequences, batch_size, steps, rank=0, world_size=world_size, **options)


def write_refused(*a, **k): raise CheckpointError("could not write: pretended")


def signal_on_rank_1(self, *numbers):
    return MOST(self, *numbers)


MOST = Ranks.most
BAD = float("nan")
FAULTS = {
    "masked": lambda: (training, "batches", Masked),
    "same data": lambda: (training, "batches", same_data),
    "no share": lambda: (DDPRanks, "sum", lambda self, x: x.detach().cpu() * self.ranks),
    "memory": lambda: memory_for(1, 1),
    "memory in block": lambda: memory_lost_in_block(1, 1),
    "nan": lambda: calls_of_loss(lambda call, m, x, loss: loss() * (BAD if RANK == 1 and call == 3 else 1)),
    "inf": lambda: calls_of_loss(lambda call, m, x, loss: loss() * (1e38 * 10 if RANK == 1 and call == 3 else 1)),
    "write": lambda: (training, "save_checkpoint", write_refused),
}


@contextlib.contextmanager
def planted(name):
    if not name:
        yield
        return
    owner, attribute, changed = FAULTS[name]()
    before = getattr(owner, attribute)
    setattr(owner, attribute, changed)
    try: yield
    finally: setattr(owner, attribute, before)


def run(folder: Path, job: dict) -> dict:
    """Train as `job` says and return what can be compared: losses, steps, sizes, or the error."""
    places = dict(checkpoint_dir=str(folder / "checkpoints"), tensorboard_dir=str(folder / "runs"))
    config = TrainingConfig(**CONFIG | places | dict(run_name=job["name"], save_interval=10, max_steps=20)
                            | job.get("settings", {}))
    model = ModelConfig(**MODEL | dict(dropout=0.0) | job.get("model", {}))
    stop, kill = job.get("stop"), job.get("kill")

    def on_step(row):
        if row["step"] == kill and RANK == 1 and not restarted(): os.kill(os.getpid(), signal.SIGKILL)
        if row["step"] == job.get("signal") and RANK == 1: os.kill(os.getpid(), signal.SIGTERM)
        return RANK == 1 and row["step"] == stop  # one rank's wish is enough

    print(job['name'], flush=True)
    with planted(job.get("fault")):
        try: result = train(model, config, resume=job.get("resume", False) or restarted(),
                            corpus={"text": TEXTS}, tokenizer=train_tokenizer(TEXTS, 280), progress=False,
                            on_step=on_step, spread=join(config.parallel))
        except (CheckpointError, ValueError, FloatingPointError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
    weights = torch.cat([p.detach().flatten().double() for p in result.model.parameters()])
    return {"losses": [row["loss"] for row in result.history], "checkpoint": str(result.checkpoint),
            "norms": [row["gradient_norm"] for row in result.history], "stopped_by": result.stopped_by,
            "validation": [row["validation_loss"] for row in result.history if "validation_loss" in row],
            "weights": weights.sum().item(), "steps": [row["step"] for row in result.history]}


def main():
    import faulthandler; faulthandler.dump_traceback_later(25, exit=True)
    torch.set_num_threads(1)
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = {job["name"]: run(folder, job) for job in plan}
    (folder / f"rank-{RANK}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()


if __name__ == "__main__": main()
