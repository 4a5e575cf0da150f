"""What must stay true of optimus.steps. Derived in notebooks/12e_one_step.ipynb."""
import math
from dataclasses import replace

import pytest
import torch
from trained import PLAIN, SMALL, gradient, scaler, tiny

from optimus import LanguageModel, TrainingConfig
from optimus.training import TrainingState, accumulate_gradients, make_optimizer, train_step

pytest_plugins = ["trained"]


@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_parts_of_any_size_give_the_gradient_of_the_whole(batch, micro):
    x, y = batch
    y = y.masked_fill(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)
    y[3] = -100  # a sequence without any target
    whole, parts = tiny(), tiny()
    expected = torch.nn.functional.cross_entropy(whole(x).flatten(0, 1), y.flatten())
    expected.backward()
    assert accumulate_gradients(parts, x, y, micro, PLAIN) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(parts), gradient(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("fields", [{}, {"attention": "gqa"}, {"checkpointing": True}])
def test_a_step_waits_for_the_device_once(batch, monkeypatch, fields, optimizer):
    """On the meta device there are no numbers: every other read, a wait on a GPU, is an error."""
    config = TrainingConfig(optimizer=optimizer)
    with torch.device("meta"): model = LanguageModel(replace(SMALL, dropout=0.1, **fields))
    # AdamW's fused kernel does not exist there
    adamw = optimizer == "adamw" and torch.optim.AdamW(model.parameters(), fused=False)
    run, reads = TrainingState(model, adamw or make_optimizer(model, config), scaler(False), 3), []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.device.type) or [1.0, 1.0])
    train_step(run, *(t.to("meta") for t in batch), config, 1e-3, PLAIN)
    assert reads == ["meta"] and run.updates == 1


def test_a_scaled_gradient_is_unscaled_before_it_is_clipped(batch):
    config, steps = TrainingConfig(gradient_clip_val=0.05), []
    for enabled in (False, True):
        model = tiny()
        run = TrainingState(model, torch.optim.SGD(model.parameters()), scaler(enabled), 7)
        row = train_step(run, *batch, config, 0.1, PLAIN)
        steps.append((row["gradient_norm"], row["loss"], gradient(model)))
        assert gradient(model).norm() == pytest.approx(0.05, rel=1e-3)
        assert run.updates == 1
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-4)
    torch.testing.assert_close(steps[0][2], steps[1][2], rtol=1e-3, atol=1e-7)


class Faulty:
    """A model that raises or spoils its loss when asked to; everything else is the model's own."""
    def __init__(self, model, fault): self.model, self.fault = model, fault
    def __getattr__(self, name): return getattr(self.model, name)
    def loss(self, x, y): return self.fault(x, self.model.loss(x, y))


NO_MEMORY = [torch.OutOfMemoryError("pretended"),
             RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate")]


def memory_for(sequences, error=NO_MEMORY[0]):
    def fault(x, loss):
        if len(x) > sequences: raise error
        return loss
    return fault


@pytest.mark.parametrize("error", NO_MEMORY, ids=["GPU", "CPU"])
def test_out_of_memory_halves_the_parts_and_changes_nothing_else(batch, error):
    config, ends = TrainingConfig(), []
    for limit in (7, 2):
        model = tiny()
        faulty = Faulty(model, memory_for(limit, error))
        run = TrainingState(faulty, make_optimizer(model, config), scaler(), 7)
        row = train_step(run, *batch, config, 1e-3, PLAIN)
        ends.append((row["loss"], run.micro_batch_size, gradient(model)))
    assert [e[1] for e in ends] == [7, 2]
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    torch.testing.assert_close(ends[0][2], ends[1][2], rtol=1e-4, atol=1e-7)


def test_out_of_memory_with_one_sequence_is_advice_and_other_errors_pass_through(batch):
    config, model = TrainingConfig(), tiny()
    run = TrainingState(Faulty(model, memory_for(0)), make_optimizer(model, config), scaler(), 7)
    with pytest.raises(RuntimeError, match="out of memory with one sequence.*max_length.*checkpointing"):
        train_step(run, *batch, config, 1e-3, PLAIN)
    calls = []

    def broken(x, loss):
        calls.append(len(x))
        raise RuntimeError("something else")
    run.model = Faulty(model, broken)
    with pytest.raises(RuntimeError, match="something else"): train_step(run, *batch, config, 1e-3, PLAIN)
    assert len(calls) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_the_schedule_waits(batch, bad, scaled):
    config, model = TrainingConfig(), tiny()
    fault = Faulty(model, lambda x, loss: loss * bad)
    run = TrainingState(fault, make_optimizer(model, config), scaler(scaled), 7)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    train_step(run, *batch, config, 1e-3, PLAIN)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
    assert (run.updates, run.bad_steps) == (0, 1)
    assert run.scaler.get_scale() == (512.0 if scaled else 1.0)
    run.model = model
    train_step(run, *batch, config, 1e-3, PLAIN)
    assert (run.updates, run.bad_steps) == (1, 0)
