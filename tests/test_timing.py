"""What must stay true of optimus.timing. Derived in notebooks/00b_timing.ipynb."""
import re
from pathlib import Path

import pytest

from optimus import timing
from optimus.timing import about, best_time

SANITIZER = Path(__file__).with_name("nbval_sanitize.cfg")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0
        def perf_counter(self): return self.now
    monkeypatch.setattr(timing, "time", Clock())
    return timing.time


def test_the_fastest_counts_and_the_first_call_does_not(clock):
    took = iter([0.1, 7.0, 2.0, 5.0, 100.0])
    def work(x): clock.now += next(took) * x
    assert best_time(work, 2, budget=3) == 4.0
    assert next(took) == 100.0


def test_work_that_takes_no_time_on_a_coarse_clock_ends(clock):
    calls = []
    def work():
        calls.append(1)
        clock.now += 0.001
    assert best_time(work, budget=0.01) == pytest.approx(0.001) and 10 <= len(calls) <= 12


@pytest.mark.parametrize("value, unit, text", [
    (0.0124, "s", "≈ 12.4 ms"), (59.94, "s", "≈ 59.9 s"), (3e-6, "s", "≈ 3.00 µs"), (1234, "s", "≈ 1.23 ks"),
    (95.4e9, "FLOP/s", "≈ 95.4 GFLOP/s"), (4980.4, "tokens/s", "≈ 4,980 tokens/s"), (0.053, "%", "≈ 5.30 %"),
    (2.0, "%", "≈ 200 %"), (0, "s", "≈ 0 s"), (4.513, "", "≈ 4.51"),
    (1e-13, "s", "≈ 1.0e-13 s"), (1.2e-8, "", "≈ 1.2e-08"),
    (1e15, "B/s", "≈ 1,000 TB/s")])
def test_figures_have_three_digits_and_a_prefix(value, unit, text): assert about(value, unit) == text


@pytest.mark.parametrize("unit", ["s", "B", "B/s", "FLOP/s", "tokens/s", "%", ""])
def test_the_sanitizer_takes_every_figure_whole_and_nothing_else(unit):
    regex, = re.findall(r"(?m)^\[measured_figures\]\nregex: (.+)$", SANITIZER.read_text(encoding="utf-8"))
    for end in ("", ", next", " next", ".", "; s", "\n"):
        texts = {re.sub(regex, "MEASURED", f"before{' ' * n}{about(10.0 ** e, unit)}{end}")
                 for n in (0, 1, 7) for e in range(-9, 14)}
        assert texts == {f"beforeMEASURED{end}"}, texts
    assert re.sub(regex, "MEASURED", "12.4 tokens per step, 3 s") == "12.4 tokens per step, 3 s"
