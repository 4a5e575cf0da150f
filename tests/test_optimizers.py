"""What must stay true of optimus.optimizers. Derived in notebooks/12c_optimizers.ipynb."""
import pytest
import torch
from trained import tiny

from optimus import TrainingConfig
from optimus.optimizers import Muon, learning_rate_at, make_optimizer, orthogonalize


@pytest.mark.parametrize("total, warmup", [(97, 0), (97, 13), (7, 7), (1, 0)])
def test_schedule_agrees_with_transformers(total, warmup):
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        assert learning_rate_at(step, total, warmup, 0.3) == pytest.approx(theirs.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        theirs.step()


def test_schedule_ends_at_the_floor_and_stays():
    ends = [learning_rate_at(step, 100, 10, 1.0, 0.1) for step in (100, 500)]
    assert ends[0] == ends[1] == pytest.approx(0.1)
    assert learning_rate_at(10, 100, 10, 1.0, 0.1) == 1.0


@pytest.mark.parametrize("shape", [(17, 5), (5, 17), (11, 11)])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    kept = U.T @ orthogonalize(G) @ V.T
    assert (kept - kept.diag().diag()).abs().max() < 1e-3
    assert 0.5 < kept.diag().min() and kept.diag().max() < 1.3


def test_muon_groups_without_muon_are_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    mine = Muon([dict(params=[ours])], lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(7):
        ours.grad = theirs.grad = torch.randn(5, 3)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_muon_agrees_with_torch():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(13, 5)) for _ in range(2))
    mine = Muon([dict(params=[ours], muon=True)], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(13, 5)
        mine.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (ours - 1).norm()  # theirs iterates in bfloat16


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("muon", Muon)])
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_gains_do_not_and_each_parameter_is_in_one_group(name, kind, tied):
    model = tiny(tie_embeddings=tied)
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name, weight_decay=0.1))
    assert type(optimizer) is kind
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim == 2 else 0.0)
            if group.get("muon"): assert p is not model.embedding.weight and p is not model.head.weight
