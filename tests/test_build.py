"""Right pieces pass, wrong ones are named, nothing is lost: optimus.build and optimus.pieces.

The judge is judged by what learners write (tests/learners.py): every right answer passes the first verdict,
and every typical mistake is rejected with a sentence that names the property it breaks.
"""
import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from learners import RIGHT, WRONG

import optimus
from optimus import build, cli, mla, norm, transformer
from optimus.build import (check_piece, command, first_verdict, journal, keep, piece_path, plugged, reference,
                           reference_source, run_tests, state, stub, table, unwritten)
from optimus.pieces import PIECES

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = [(name, *change) for name, changes in WRONG.items() for change in changes]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "pieces"
    folder.mkdir()
    monkeypatch.setenv("OPTIMUS_PIECES", str(folder))
    return folder


def head_of(name: str) -> str:
    """The imports of a stub, and those of torch that people have anyway."""
    lines = [line for line in stub(name).splitlines() if re.match(r"import|from", line)]
    more = "import torch", "import torch.nn.functional as F", "from torch import nn"
    return "\n".join([*lines, *more]) + "\n"


def init_of(name: str) -> str:
    """The constructor that a stub gives."""
    [first, *_] = [n for n in ast.parse(stub(name)).body if isinstance(n, ast.ClassDef)]
    [made] = [n for n in first.body if getattr(n, "name", "") == "__init__"]
    return "\n".join(stub(name).splitlines()[made.lineno - 1:made.end_lineno]) + "\n"


def answer(name: str, number: int = 0) -> str:
    text = RIGHT[name][number]
    if text == "the package's": return head_of(name) + reference_source(name)
    if "{init}" in text: return head_of(name) + text.replace("{init}", init_of(name))
    if text.startswith("\n    "):  # methods of a class whose constructor is given
        base = "(nn.Module)" if "super().__init__()" in init_of(name) else ""
        return f"{head_of(name)}class {PIECES[name].parts[-1]}{base}:\n{init_of(name)}{text}"
    return head_of(name) + text


def write(name: str, text: str) -> None: piece_path(name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", PIECES)
def test_a_stub_parses_has_no_body_and_is_not_yet_yours(name):
    write(name, stub(name))
    known, text = PIECES[name], stub(name)
    assert {*known.parts} <= {getattr(n, "name", "") for n in ast.parse(text).body}
    assert unwritten(text) and first_verdict(name) == f"not yet yours: {', '.join(unwritten(text))}"
    assert state(name) == "a stub"
    for definition in (n for n in ast.walk(ast.parse(reference_source(name)))
                       if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n)):
        assert f"{ast.get_docstring(definition).splitlines()[0]}" in text


@pytest.mark.parametrize("name, number", [(name, i) for name in RIGHT for i in range(len(RIGHT[name]))])
def test_right_answers_pass_the_first_verdict(name, number):
    write(name, answer(name, number))
    assert first_verdict(name) is None


@pytest.mark.parametrize("name, word, old, new", MISTAKES)
def test_a_typical_mistake_is_named(name, word, old, new):
    text = answer(name)
    assert old in text, old
    write(name, text.replace(old, new))
    verdict = first_verdict(name)
    assert verdict and word in verdict and "\n" not in verdict, verdict


def test_every_piece_has_right_and_wrong_answers_enough():
    assert RIGHT.keys() == WRONG.keys() == PIECES.keys()
    assert all(len(RIGHT[name]) >= 2 and len(WRONG[name]) >= 5 for name in PIECES)


def test_a_class_is_judged_in_stages():
    name, text = "MultiHeadLatentAttention", answer("MultiHeadLatentAttention", 1)
    def without(*methods):
        for method in methods:
            text_of[0] = re.sub(rf"(    def {method}\(.*\n)(?:        .*\n)+", r"\1        return todo()\n",
                                                   text_of[0])
        write(name, text_of[0])
        return first_verdict(name)
    text_of = [text]
    assert "4 of 9 properties hold so far; not yet yours: forward" == without("forward")
    assert "3 of 9" in without("absorbed") and "2 of 9" in without("expanded")
    text_of = [text.replace("return q[..., :n], apply_rope(q[..., n:], pos, self.rope_theta)", "return q, q")]
    assert "stage 1" in without("latents", "expanded", "absorbed", "forward")


@pytest.mark.parametrize("name, text, words", [
    ("attend", "def attend(q, k, v, pos, scale=None): return F.scaled_dot_product_attention(q, k, v)",
     "do without scaled_dot"),
    ("RMSNorm", "from torch.nn.functional import rms_norm\nRMSNorm = 1", "do without rms_norm; line 1"),
    ("RMSNorm", "from optimus.norm import RMSNorm", "define RMSNorm"),
    ("RMSNorm", "from optimus.norm import RMSNorm as N\nclass RMSNorm(N): pass",
     "line 1 takes it from the package"),
    ("causal_mask", "def causal_mask(pos, S) return 1", "line 1 is not Python"),
    ("causal_mask", "import nothing_of_this_name\ndef causal_mask(pos, S): pass",
     "importing it raised ModuleNotFoundError"),
    ("causal_mask", "def causal_mask(pos, S): pass", "must return a tensor, yours returned None"),
    ("causal_mask", "def causal_mask(pos): pass", "raised TypeError"),
])
def test_a_file_that_cannot_count_says_why(name, text, words):
    write(name, text)
    assert words in first_verdict(name)


# The plug

def test_the_plug_reaches_everything_and_leaves_nothing():
    kept = {name: reference(name) for name in PIECES}
    children = optimus.KVCache, optimus.TransformerBlock, mla.MultiHeadLatentAttention
    bases = [child.__bases__ for child in children]
    for name in PIECES: write(name, answer(name))
    with plugged(*PIECES):
        for module in (optimus, norm, mla, transformer):
            assert module.RMSNorm.__module__ == "my_pieces.RMSNorm"
        assert sys.modules["my_pieces.Block"].RMSNorm is norm.RMSNorm  # her pieces use each other
        assert optimus.KVCache.__bases__[0].__module__ == "my_pieces.Cache"
        assert optimus.LanguageModel.hidden.__module__ == "my_pieces.LanguageModel_hidden"
    assert {name: reference(name) for name in PIECES} == kept
    assert bases == [child.__bases__ for child in children]
    left = [(label, key) for label, module in sys.modules.items() if label.split(".")[0] == "optimus"
            for key, value in vars(module).items()
            if str(getattr(value, "__module__", "")).startswith("my_pieces.")]
    assert left == []


def test_a_failure_inside_puts_all_back():
    write("RMSNorm", answer("RMSNorm"))
    with pytest.raises(ZeroDivisionError), plugged("RMSNorm"): raise ZeroDivisionError
    assert norm.RMSNorm.__module__ == "optimus.norm" == optimus.RMSNorm.__module__


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_a_model_of_15_own_pieces_trains_like_the_courses(attention):
    def losses():
        torch.manual_seed(0)
        model = optimus.LanguageModel(optimus.ModelConfig(
            vocab_size=61, embedding_dim=32, num_layers=2, num_attention_heads=4, dropout=0.0,
            attention=attention))
        adam, tokens = torch.optim.AdamW(model.parameters(), 3e-3), torch.randint(0, 61, (4, 17))
        for _ in range(5):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
            adam.zero_grad(), loss.backward(), adam.step()
            yield loss.item()
    wanted = [*losses()]
    for name in PIECES: write(name, answer(name, 0 if name == "init_weights" else -1))
    with plugged(*PIECES): assert [*losses()] == pytest.approx(wanted, rel=1e-4)


# Files and commands

def test_no_command_overwrites_what_a_learner_wrote(own_folder, capsys):
    write("RMSNorm", "mine")
    assert command(["open", "02"]) == 0 and piece_path("RMSNorm").read_text() == "mine"
    assert "kept" in capsys.readouterr().out
    assert command(["open", "1"]) == 0 and piece_path("apply_rope").read_text() == stub("apply_rope")
    before = {path: path.read_bytes() for path in own_folder.glob("*.py")}
    for words in ("", "start", "open 01", "check RMSNorm", "hint RMSNorm", "show RMSNorm"):
        command(words.split())
    assert {path: path.read_bytes() for path in own_folder.glob("*.py")} == before
    assert journal()["RMSNorm"] == {"hints": 1, "shown": True}


def test_each_version_that_passed_is_kept(own_folder, capsys):
    def tests(name, which): return {"passed": 3, "failed": 0 if which == "core" else 2, "first": "test_x"}
    for i in range(2):
        write("causal_mask", answer("causal_mask", i))
        assert check_piece("causal_mask", tests) == 0
        assert state("causal_mask") == "yours, finish 3 of 5"
    kept = {path.read_text() for path in (own_folder / "passed").iterdir()}
    assert kept == {answer("causal_mask", i) for i in range(2)}
    write("causal_mask", stub("causal_mask"))
    assert state("causal_mask").startswith("changed since it passed") and "0 of 15 pieces are" in table()
    capsys.readouterr()
    def red(name, which): return {"passed": 2, "failed": 1, "first": "test_y"}
    write("causal_mask", answer("causal_mask"))
    assert check_piece("causal_mask", red) == 1
    assert "core 2 of 3. The first that fails: test_y in tests/test_attention.py" in capsys.readouterr().out
    assert keep("causal_mask") == keep("causal_mask")


def test_the_command_line_knows_build(capsys):
    assert cli.main(["build"]) == 0 and "0 of 15 pieces are yours" in capsys.readouterr().out
    assert cli.main(["build", "check", "RMSnorm"]) == 1
    assert "type: optimus build open 02" in capsys.readouterr().out
    assert cli.main(["build", "check", "rms"]) == 1 and "did you mean RMSNorm" in capsys.readouterr().err
    assert cli.main(["build", "fly"]) == 2 and "usage: optimus build" in capsys.readouterr().err
    assert cli.main(["build", "open", "77"]) == 1
    assert "chapter 77 has no pieces; there are 01, 02" in capsys.readouterr().err
    assert cli.main(["build", "--help"]) == 0


@pytest.mark.slow
def test_the_projects_own_tests_judge_a_piece(capsys):
    write("SwiGLU", answer("SwiGLU"))
    assert cli.main(["build", "check", "SwiGLU"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"core (\d+) of \1\. It is yours", said) and "finish " in said
    write("SwiGLU", answer("SwiGLU").replace("gate * torch.sigmoid(gate)", "torch.relu(gate)"))
    counts = run_tests("SwiGLU")
    assert counts["failed"] >= 1 and counts["first"].startswith("test_")


def test_without_tests_or_tools_the_first_verdict_still_works(monkeypatch):
    monkeypatch.setattr(build, "tests_folder", lambda: None)
    with pytest.raises(ValueError, match="come with a checkout"): run_tests("RMSNorm")


def test_core_tests_are_marked_in_every_module_that_has_pieces():
    for module in {known.module for known in PIECES.values()}:
        text = (ROOT / "tests" / f"test_{module}.py").read_text(encoding="utf-8")
        assert text.count("@pytest.mark.core\n") >= 5, module
