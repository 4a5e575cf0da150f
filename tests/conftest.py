"""One thread a process: the tensors of these tests are small, and processes that share cores only wait."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when imported, here and in child processes
