"""One thread a process: the tensors of these tests are small, and two processes with two threads each only wait for one another."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, here and in child processes
