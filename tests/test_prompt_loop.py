"""What must stay true of optimus.prompt_loop. Derived in notebooks/10c_prompt_loop.ipynb.

The loop as a whole, with real keys, is tried in test_cli.py.
"""
import pytest
import torch

from optimus import prompt_loop
from optimus.prompt_loop import COMMANDS, change_setting, run_slash_command

SETTINGS = {"max_new_tokens": 20, "temperature": 0.8, "top_k": None, "top_p": None, "min_p": None, "seed": 0}
VALUES = {"/temperature": "0.7", "/top-p": "0.9", "/top-k": "40", "/min-p": "0.05", "/seed": "3",
          "/tokens": "7"}


@pytest.mark.parametrize("word", COMMANDS)
def test_a_command_changes_one_setting_and_only_in_a_copy(word):
    before = dict(SETTINGS)
    after = change_setting(word, VALUES[word], before)
    name, kind = COMMANDS[word]
    assert before == SETTINGS and after == SETTINGS | {name: kind(VALUES[word])}


@pytest.mark.parametrize("word", COMMANDS)
def test_off_is_for_what_can_be_off(word):
    name, _ = COMMANDS[word]
    if name in ("temperature", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{word} takes a number, got 'off'"):
            change_setting(word, "off", SETTINGS)
    else: assert change_setting(word, "off", SETTINGS | {name: 1})[name] is None


@pytest.mark.parametrize("line, told", [("/top-p 1.5", "top_p"), ("/temperature -1", "temperature"),
                                        ("/top-k 0", "top_k"), ("/tokens -2", "max_new_tokens"),
                                        ("/top-k many", "a number or off"), ("/helpp", "no command /helpp")])
def test_what_is_refused_is_named(line, told):
    with pytest.raises(ValueError, match=told): run_slash_command(line, SETTINGS)


def lines(monkeypatch, *typed):
    """`input` that hands out these lines, raising those that are errors."""
    left = list(typed)
    def read(prompt):
        line = left.pop(0)
        if isinstance(line, type): raise line
        return line
    monkeypatch.setattr("builtins.input", read)
    return left


def test_ctrl_c_at_the_prompt_stays_and_the_end_of_input_leaves(monkeypatch, capsys):
    left = lines(monkeypatch, KeyboardInterrupt, "one", "/nonsense", EOFError, "never")
    seen = []
    monkeypatch.setattr(prompt_loop, "print_stream", lambda model, tokenizer, line, _: seen.append(line))
    assert prompt_loop.prompt_loop(None, None, SETTINGS) == 0
    assert seen == ["one"] and left == ["never"]
    out = capsys.readouterr().out
    assert "/quit or Ctrl-D ends" in out and "no command /nonsense" in out


def test_only_what_the_machine_is_to_blame_for_becomes_a_sentence(monkeypatch, capsys):
    def fail(*_): raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(prompt_loop, "print_stream", fail)
    lines(monkeypatch, "one", "/quit")
    assert prompt_loop.prompt_loop(None, None, SETTINGS, lambda error: f"sorry: {error}") == 0
    assert "sorry: full" in capsys.readouterr().out
    lines(monkeypatch, "one")
    with pytest.raises(torch.OutOfMemoryError): prompt_loop.prompt_loop(None, None, SETTINGS)
