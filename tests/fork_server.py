"""Import torch once; then, for every line of JSON on standard input, fork a child that trains.

A line holds the fields of TrainingConfig that differ from CONFIG, and may hold `kill_at`: the child kills
itself with SIGKILL when it has made so many calls that put files in place (fsync, rename, link). Or it holds
`words`, the arguments of the command line, and `folder`, where the child runs it and writes `out` and `err`.
Prints the child's process number and, when it ends, its exit code.
"""
import json
import os
import signal
import sys
import traceback

import filelock  # noqa: F401  what training imports when it needs it: here, once, before any fork
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard
import tqdm.auto  # noqa: F401

from optimus import ModelConfig, TrainingConfig, cli, train
from optimus.data import train_tokenizer

MODEL = dict(vocab_size=280, embedding_dim=32, num_layers=2, num_attention_heads=2, rope_seq_len=32,
             dropout=0.2, checkpointing=False)
CONFIG = dict(batch_size=4, max_length=16, learning_rate=5e-3, max_steps=40, warmup=0.1, eval_interval=7,
              eval_batches=2, save_interval=1, sample_interval=0, num_workers=0, keep_last=3)
WORDS = ("the of and to in a that is was for it with as his on be at by "
         "this had not are but from or have").split()
TEXTS = [" ".join(WORDS[(i * k + k // 3) % len(WORDS)] for k in range(1, 60)) for i in range(1, 12)]


def kill_at(call: int):
    """End this process with SIGKILL before its `call`-th fsync, rename or link."""
    made = []

    def counted(original):
        def f(*arguments, **options):
            made.append(1)
            if len(made) == call: os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        return f
    for name in ("fsync", "replace", "link"): setattr(os, name, counted(getattr(os, name)))


def work(settings: dict):
    torch.set_num_threads(1)
    if call := settings.pop("kill_at", None): kill_at(call)
    train(ModelConfig(**MODEL), TrainingConfig(**CONFIG | settings), resume=True, corpus={"text": TEXTS},
          tokenizer=train_tokenizer(TEXTS, 280), progress=False)


def command(words: list[str], folder: str) -> int:
    """Run the command line in `folder`, as a process of its own would."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    try: return cli.main(words)
    finally: sys.stdout.flush()


def main():
    for line in sys.stdin:
        child = os.fork()
        if not child:
            job, code = json.loads(line), 0
            try: code = command(**job) if "words" in job else work(job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(code or 0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__": main()
