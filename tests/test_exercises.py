"""The judge passes right answers and no wrong one. Derived in notebooks/exercises.

An exercise is finished when its reference passes on every seed and each of its mutants fails.
"""
import copy
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from optimus import exercises
from optimus.exercises.kv_cache import rewound
from optimus.exercises import EXERCISES, TODO, check, difference, hint, judge, progress, todo

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
JUDGE = sys.modules["optimus.exercises.judge"]  # the package's own `judge` is the function
BOOKS = sorted((NOTEBOOKS[0].parent / "exercises").glob("*.ipynb"))
MUTANTS = [(name, mutant) for name, task in EXERCISES.items() for mutant in task.mutants]


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUS_PROGRESS", str(tmp_path / "deep" / "progress.json"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXERCISES)
def test_the_reference_passes_twenty_seeds(name):
    task = EXERCISES[name]
    assert [judge(task, task.reference, seed) for seed in range(20)] == [None] * 20


@pytest.mark.parametrize("name, mutant", MUTANTS)
def test_no_mutant_survives(name, mutant):
    for seed in range(5):
        verdict = judge(EXERCISES[name], EXERCISES[name].mutants[mutant], seed)
        assert isinstance(verdict, str) and len(verdict) > 10, f"{mutant} survives seed {seed}"


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_neither_passes_nor_raises(name, capsys):
    assert check(name, lambda *arguments: todo()) is False
    assert "not yet yours" in capsys.readouterr().out
    assert check(name, lambda *arguments: None) is False
    if name != "write_safely": assert "a `return` missing?" in capsys.readouterr().out  # it returns nothing
    assert exercises.passed() == set()


def test_there_are_enough_of_them(capsys):
    notebooks = [path.stem for path in NOTEBOOKS]
    for notebook in notebooks:
        assert sum(task.notebook == notebook for task in EXERCISES.values()) >= 3, notebook
    for name, task in EXERCISES.items():
        assert len(task.mutants) >= 5 and task.hints and task.statement and task.notebook in notebooks, name
    told = f"{len(EXERCISES)} exercises, and the {len(MUTANTS)} wrong answers it must reject"
    assert told in (NOTEBOOKS[0].parent.parent / "README.md").read_text(encoding="utf-8")
    with capsys.disabled(): print(f"\n{len(EXERCISES)} exercises, {len(MUTANTS)} mutants, 0 survive", end=" ")


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


def test_every_chapter_has_its_book():
    books = {path.stem for path in BOOKS}
    assert books == {path.stem for path in NOTEBOOKS} | {"inputs", "judge"}
    assert {task.notebook for task in EXERCISES.values()} == books - {"inputs", "judge"}
    assert len(exercises.CHAPTERS) == len(set(exercises.CHAPTERS)) == len(NOTEBOOKS)


@pytest.mark.parametrize("path", [path for path in BOOKS if path.stem != "judge"], ids=lambda p: p.stem)
def test_a_book_runs_and_shows_what_each_wrong_answer_is_told(path, capsys):
    """Its cells in this process (nbval leaves these notebooks out) show the verdicts that are committed."""
    scope, committed = {"__name__": "__main__"}, ""
    for cell in cells(path):
        if cell["cell_type"] != "code": continue
        exec(source(cell), scope)  # noqa: S102  our own text
        printed = [o["text"] for o in cell["outputs"] if o["output_type"] == "stream"]
        committed += "".join("".join(text) for text in printed)
    def words(text): return re.sub(r"-?\d[\d.]*(e-?\d+)?", "#", text)  # another processor rounds otherwise
    assert words(capsys.readouterr().out) == words(committed)
    assert committed.count("\n") == sum(len(task.mutants) for task in EXERCISES.values()
                                        if task.notebook == path.stem)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_exercise_stands_in_its_notebook_as_a_stub_with_an_answer_that_passes(path):
    text = [source(c) for c in cells(path)]
    stubs = {m[1] for s in text for m in re.finditer(r"^check\(\"(\w+)\", \1\)$", s, re.M)}
    assert stubs == {name for name, task in EXERCISES.items() if task.notebook == path.stem}
    for s in text:
        if m := re.search(r"^check\(\"(\w+)\", \1\)$", s, re.M): assert f"def {m[1]}(" in s and "todo()" in s
    prose = "\n".join(s for s, c in zip(text, cells(path)) if c["cell_type"] == "markdown")
    answers = "\n".join(re.findall(r"<details><summary>Answer</summary>(.*?)</details>", prose, re.S))
    for name in stubs:
        [code] = [block for block in re.findall(r"```python\n(.*?)```", answers,
            re.S) if f"def {name}(" in block]
        scope = answer_scope()
        exec(code, scope)  # noqa: S102  our own text
        assert judge(EXERCISES[name], scope[name], 0) is None, name


def answer_scope():
    """What the answers may use: names of the package and those that their notebooks define."""
    import math

    import torch.nn.functional as F

    import optimus.rope
    from optimus.panel import next_token

    from optimus.exercises.data import joined as merge
    def entropy_bits(p): return float(-torch.special.xlogy(p, p).sum() / math.log(2))
    return dict(torch=torch, math=math, F=F, merge=merge, entropy_bits=entropy_bits, next_token=next_token,
                apply_rope=optimus.rope.apply_rope, rope_angles=optimus.rope.rope_angles,
                permute_rope=optimus.rope.permute_rope)


def test_a_right_answer_is_remembered_and_shown(capsys):
    assert check("greedy", lambda logits: logits.argmax(-1))
    assert capsys.readouterr().out == "greedy: correct\n"
    assert exercises.passed() == {"greedy"}
    progress()
    shown = capsys.readouterr().out
    assert "[x] greedy" in shown and "[ ] entropy" in shown and f"1 of {len(EXERCISES)} passed" in shown


def test_a_damaged_or_unwritable_progress_file_stops_nobody(tmp_path, monkeypatch, capsys):
    exercises.progress_file().parent.mkdir(parents=True)
    for damaged in ("not json", '{"a": 1}', '["no such exercise"]', "[1, [2]]"):
        exercises.progress_file().write_text(damaged)
        assert exercises.passed() == set()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTIMUS_PROGRESS", str(tmp_path / "file" / "progress.json"))
    assert check("greedy", lambda logits: logits.argmax(-1)) is True


def test_a_verdict_names_the_smallest_example_and_the_property(capsys):
    assert not check("rope_complex", lambda x, pos: x + 1, seed=0)
    assert re.search(r"position 0 must leave x unchanged; yours moved an entry by 1", capsys.readouterr().out,
        re.I)
    assert not check("greedy", lambda logits: logits.argmax(0), seed=0)
    assert "shape must be (1,), yours is (5,)" in capsys.readouterr().out


def test_an_answer_that_raises_is_told_on_what(capsys):
    def broken(logits): raise KeyError("no such key")
    assert check("greedy", broken) is False
    assert "it raised KeyError" in capsys.readouterr().out.replace("It", "it")


def test_an_answer_that_changes_its_input_is_caught():
    verdict = judge(EXERCISES["layer_norm"], lambda x: x.copy_(EXERCISES["layer_norm"].reference(x)), 0)
    assert "changed its own input" in verdict


def test_an_interrupt_goes_through():
    def interrupted(logits): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): check("greedy", interrupted)


def test_an_unknown_name_is_refused_with_close_ones():
    with pytest.raises(ValueError, match="'entropi'.*entropy"): check("entropi", None)
    with pytest.raises(ValueError, match=r"no exercise 'zzz'; progress\(\) shows all"): hint("zzz")


def test_an_empty_book_says_where_the_full_one_is(monkeypatch):
    monkeypatch.setattr(JUDGE, "EXERCISES", {})
    with pytest.raises(ValueError, match="from optimus.exercises import check, hint"): hint("softmax")


def test_an_exercise_may_be_written_again_but_not_over_another():
    task = EXERCISES["softmax"]
    parts = {k: getattr(task, k) for k in ("inputs", "hints", "mutants", "properties")}
    exercises.exercise("softmax", task.notebook, task.statement, task.reference, **parts)  # as its cell does
    assert EXERCISES["softmax"] == task
    with pytest.raises(AssertionError, match="softmax names another"):
        exercises.exercise("softmax", task.notebook, "something else", task.reference, **parts)


def test_hints_come_one_after_the_other_or_by_number(capsys, monkeypatch):
    monkeypatch.setattr(JUDGE, "HINTED", {})
    for number in (None, None, None, 1, 99, 0, None): hint("softmax", number)
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:11] for line in lines] == [f"{n} of 2" for n in (1, 2, 2, 1, 2, 2, 2)]
    assert len(set(lines)) == 2


def test_judging_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    judge(EXERCISES["fold_gain"], EXERCISES["fold_gain"].reference)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name, fn", [
    ("cache_bytes", lambda *sizes: float(math.prod(sizes))), ("cache_bytes", lambda *sizes: np.prod(sizes)),
    ("half_split_order", lambda D: torch.arange(D).view(-1, 2).T.flatten()),
    ("half_split_order", lambda D: np.arange(D).reshape(-1, 2).T.flatten()),
    ("slice_of", lambda step, size, rank, n: torch.arange(step * size, (step + 1) * size).chunk(n)[rank]),
    ("perplexity", lambda losses: np.exp(losses.numpy().mean())),
    ("looks_permuted", lambda a, b, tokens: np.bool_(EXERCISES["looks_permuted"].reference(a, b, tokens))),
    ("split_qkv", lambda qkv, H: torch.stack(EXERCISES["split_qkv"].reference(qkv, H))),
    ("rms_backward", lambda x, g: rms_gradient(x, g, eps=1e-6)),
    ("logits_after", lambda model, tokens, n: lens_with_rows_of_positions(model, tokens, n)),
    ("logits_after", lambda model, tokens, n: cut_short(model, n)(tokens)),
    ("loss_in_parts", lambda h, w, y, rows: sum(
        (w @ a).logsumexp(0) - w[t] @ a for a, t in zip(h, y)) / len(y)),
    ("loss_in_parts", lambda h, w, y, rows: sum(
        loss_of_a_part(a, w.contiguous().clone(), b) for a, b in zip(h.split(rows), y.split(rows))) / len(y)),
    ("loss_in_parts", lambda h, w, y, rows: sum(F.cross_entropy(F.linear(a, w), b, reduction="sum")
                                                for a, b in zip(h.split(rows), y.split(rows))) / len(y)),
    ("logits_after", lambda model, tokens, n: lens_with_rows_of_positions(model, tokens, n, model.dropout)),
])
def test_a_right_answer_of_another_kind_passes(name, fn):
    assert [judge(EXERCISES[name], fn, seed) for seed in range(10)] == [None] * 10


def rms_gradient(x, grad_y, eps):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt(), x, grad_y)[0]


def loss_of_a_part(hidden, weight, targets):
    logits = hidden @ weight.T
    shifted = logits - logits.amax(-1, keepdim=True)
    powers = shifted.exp()
    return -(powers / powers.sum(-1, keepdim=True)).log()[torch.arange(len(targets)), targets].sum()


def lens_with_rows_of_positions(model, tokens, n, dropout=lambda x: x):
    x, pos = dropout(model.embedding(tokens)), torch.arange(tokens.shape[1]).expand(tokens.shape)
    for block in model.blocks[:n]: x = block(x, pos)
    return model.head(model.norm(x))


def cut_short(model, n):
    model = copy.copy(model)
    model.blocks = model.blocks[:n]
    return model


@pytest.mark.parametrize("name, fn, words", [
    ("softmax", lambda x: x.softmax(0).numpy(), "must return a tensor"),
    ("softmax", lambda x: (v for v in x), "must return a tensor"),
    ("undo_rope", lambda y, pos: y[:, :, :1], "shape must be"),
    ("too_old", lambda steps, keep, best: set(steps), "must return a list"),
    ("squared_length_weights", lambda: 5, "what it returned, 5, cannot be judged: TypeError"),
    ("softmax", 3, "must be a function"), ("softmax", lambda x, y: x, "it raised TypeError"),
    ("slice_of", lambda step, size, rank, n: "ab"[rank + 9] if rank else list(range(step * size,
        step * size + size // n)), "it raised IndexError")])
def test_a_verdict_blames_the_answer_and_not_the_judge(name, fn, words):
    assert words in judge(EXERCISES[name], fn, 0)


@pytest.mark.parametrize("name, fn, words", [
    ("softmax", lambda x: (x - x.mean()).exp() / (x - x.mean()).exp().sum(), "nan, for .* 1000.0, "),
    ("greedy", lambda x: x.shape[-1] - 1 - x.flip(-1).argmax(-1), "must be 0, yours is 3, for .*1.0, 3.0"),
    ("nucleus", lambda x, p: x >= x.sort(descending=True).values[
        (x.softmax(0).sort(descending=True).values.cumsum(0) < p - 1e-6).sum().clamp(max=len(x) - 1)],
     "of 4 equals 2 reach 0.5; yours keeps 4"),
    ("rewind", lambda cache, n: rewound(cache, max(1, cache.length - n)), "tokens 0 must be left"),
    ("largest_batch", lambda f, p, m: max(0, (m - f - 1) // p), r"must return \d+, yours returned \d+"),
])
def test_what_chance_does_not_draw_is_asked_for_in_words(name, fn, words):
    for seed in range(5):
        verdict = judge(EXERCISES[name], fn, seed)
        assert verdict and re.search(words, verdict), verdict


@pytest.mark.parametrize("got, wanted, words", [
    (torch.zeros(2), torch.zeros(3), r"shape must be \(3,\)"), (1.0, torch.zeros(1), "return a tensor"),
    (torch.tensor([0.0, float("nan")]), torch.zeros(2), r"at \[1\]"), (torch.zeros(2, dtype=torch.bool),
        torch.zeros(2), "dtype"),
    (torch.zeros(2), torch.zeros(2).bool(), "dtype"), ([1], [1, 2], "2 values"), ((1, 2.5), (1, 2.0),
        "value 1"),
    (True, 1, "must return 1"), (1.5, 2, "must return 2"), ("a", "b", "'b'"), (float("nan"), 1.0, "nan"),
    (TODO, 1.0, "todo"), (torch.tensor(float("inf")), torch.tensor(0.0), "the only entry")])
def test_a_difference_is_found_and_said(got, wanted, words):
    assert re.search(words, difference(got, wanted))


@pytest.mark.parametrize("got, wanted", [
    (torch.tensor([1.0]), torch.tensor([1.0 + 1e-6])), (torch.tensor(2.0), 2.0), (2, 2.0), ([1, 2], (1, 2)),
    (torch.tensor(float("-inf")), torch.tensor(float("-inf"))), (torch.tensor(3), 3), ((), ()), (float("nan"),
        float("nan"))])
def test_equal_is_equal(got, wanted):
    assert difference(got, wanted) is None
