"""What must stay true of optimus.ranks. Derived in notebooks/12b_many_processes.ipynb."""
import pytest
import torch

from optimus import ranks
from optimus.ranks import SINGLE_PROCESS


@pytest.mark.parametrize("saved, index, wanted", [(4, None, 0), (4, 2, 2), (1, 0, 0), (2, 5, 0), (1, 3, 0)])
def test_a_run_resumes_on_fewer_and_on_more_gpus(monkeypatch, saved, index, wanted):
    """`saved` GPUs there when it was saved, by an older version; now the run's own one has this index."""
    given, state = [], torch.get_rng_state()
    def only_its_own(*_): raise AssertionError("another GPU's state was touched")
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", only_its_own)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", only_its_own)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, device: given.append((s, device)))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    device = torch.device("cuda", index) if index is not None else torch.device("cuda")
    before = [f"GPU {i}" for i in range(saved)]
    ranks.restore_rng_state(SINGLE_PROCESS, {"cpu": state, "cuda": before}, device)
    assert given == [(f"GPU {wanted}", device)]
    assert ranks.gather_rng_state(SINGLE_PROCESS, device)["cuda"] == [f"state of {device}"]
    ranks.restore_rng_state(SINGLE_PROCESS, {"cpu": state, "cuda": []}, device)  # saved on a CPU
    ranks.restore_rng_state(SINGLE_PROCESS, {"cpu": state, "cuda": ["GPU 0"]}, torch.device("cpu"))
    assert len(given) == 1
