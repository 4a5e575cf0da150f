"""The exercises of the course, and the judge that knows right from nearly right.

    check(name, fn)    judge your function, say the verdict in a line, return it
    todo()             what a stub returns: not yet yours
    hint(name)         the next hint of an exercise
    progress()         what you have passed
    EXERCISES          name -> Exercise, with statement, reference, hints and mutants

The judge is built in notebooks/exercises/judge.ipynb; beside it lies one book a chapter."""
from importlib import import_module

from optimus.exercises.judge import (EXERCISES, HINTED, SIZES, TODO, Exercise, check, copied, difference, exercise, find, hint,
                                     judge, passed, plain, progress, progress_file, remember, shown, tensor_difference,
                                     todo, trial)

CHAPTERS = ("start_here", "rope", "rmsnorm", "swiglu", "attention", "mla", "kv_cache", "config", "transformer", "data", "sampling", "checkpoints", "training", "interop", "scale_out", "train_on_cuda", "generation_panel")
for _chapter in CHAPTERS: import_module(f"optimus.exercises.{_chapter}")

__all__ = ["CHAPTERS", "EXERCISES", "Exercise", "HINTED", "SIZES", "TODO", "check", "copied", "difference", "exercise", "find",
           "hint", "judge", "passed", "plain", "progress", "progress_file", "remember", "shown", "tensor_difference",
           "todo", "trial"]
