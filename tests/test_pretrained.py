"""What must stay true of optimus.pretrained. Derived in notebooks/08b_pretrained.ipynb."""
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import draw_tokens, make_model, shake

import optimus.files
from optimus.pretrained import find_folder, model_from, shipped_models, weights_of, widened_on_cpu
from optimus.transformer import LanguageModel

# Files

@pytest.mark.parametrize("changes", [dict(), dict(attention="gqa", tie_embeddings=False),
                                     dict(norm_eps=1e-3, dropout=0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_opened_again(tmp_path, changes, dtype):
    model, tokens = make_model(**changes).to(dtype), draw_tokens()
    model.save_pretrained(tmp_path / "a" / "b")
    state = torch.get_rng_state()
    again = LanguageModel.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert again.config == model.config and not again.training
    assert {(p.dtype, p.requires_grad) for p in again.parameters()} == {(dtype, True)}
    with torch.no_grad(): assert torch.equal(again(tokens), model(tokens))
    assert (again.head.weight is again.embedding.weight) is model.config.tie_embeddings
    assert again.num_parameters() == model.num_parameters()
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_a_tied_head_is_stored_once(tmp_path):
    from safetensors.torch import load_file

    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "head.weight" not in weights and "embedding.weight" in weights
    assert json.loads((tmp_path / "config.json").read_text()) == make_model().config.to_dict()


def test_training_goes_on_after_opening(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = LanguageModel.from_pretrained(tmp_path).train()
    model.loss(draw_tokens(), draw_tokens()).backward()
    assert all(p.grad is not None for p in model.parameters())


OPENED = []  # an audit hook cannot be taken away: it writes here only while a test listens
LISTENING = []


def listen(event, arguments):
    if LISTENING and event == "open" and isinstance(arguments[0], str): OPENED.append(arguments[0])


def test_only_the_two_files_are_opened(tmp_path):
    make_model().save_pretrained(tmp_path)
    for name in ("train_state.pt", "pytorch_model.bin", "modeling.py", "tokenizer.json"):
        (tmp_path / name).write_text("no")
    LanguageModel.from_pretrained(tmp_path)  # imports happen here
    sys.addaudithook(listen)
    LISTENING.append(True)
    try: LanguageModel.from_pretrained(tmp_path)
    finally: LISTENING.clear()
    inside = {name.rpartition("/")[2] for name in OPENED if name.startswith(str(tmp_path))}
    assert "config.json" in inside and inside <= {"config.json", "model.safetensors"}


def damage(folder, name, content):
    if content is None: (folder / name).unlink()
    else: (folder / name).write_bytes(content)


@pytest.mark.parametrize("name, content, words", [
    ("config.json", None, "has no config.json"), ("model.safetensors", None, "has no model.safetensors"),
    ("config.json", b"{", "config.json is no ModelConfig"),
    ("config.json", b"\xff", "config.json is no ModelConfig"), ("config.json", b"[]", "needs a dict"),
    ("config.json", b'{"hidden_size": 3}', "no field hidden_size"),
    ("config.json", b'{"dropout": 7}', r"dropout must be .*got 7"),
    ("model.safetensors", b"", "cannot be read"),
    ("model.safetensors", b"\x80\x04 a pickle", "cannot be read"),
    ("config.json", b"{}", "does not fit config.json: .* has shape"),
])
def test_a_damaged_folder_says_what_is_wrong(tmp_path, name, content, words):
    make_model().save_pretrained(tmp_path)
    damage(tmp_path, name, content)
    with pytest.raises(ValueError, match=words) as error: LanguageModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_named(tmp_path, change):
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing": del weights["blocks.2.attention.kv_norm.weight"]
    if change == "extra": weights["blocks.9.attention.kv_norm.weight"] = torch.ones(3)
    if change == "shape": weights["blocks.2.attention.kv_norm.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors")
    wanted = {"missing": r"blocks.2.*shape none, not \(30,\)", "extra": r"blocks.9.*shape \(3,\), not none",
              "shape": r"blocks.2.*shape \(3,\), not \(30,\)"}[change]
    with pytest.raises(ValueError, match=wanted): LanguageModel.from_pretrained(tmp_path)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError,
                       match="no model 'no-such': it is not a folder, and the shipped models are: "):
        LanguageModel.from_pretrained("no-such")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    def fail(*_): raise OSError("disk full")
    monkeypatch.setattr(optimus.files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"): shake(model).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# Folders that come from elsewhere

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def in_shards(folder, parts=3):
    """A model saved in `folder` as shards and an index, as transformers writes them."""
    from safetensors.torch import load_file, save_file

    model = make_model()
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    where = {name: files[i % parts] for i, name in enumerate(sorted(weights))}
    for file in files: save_file({n: x for n, x in weights.items() if where[n] == file}, folder / file)
    write_index(folder, where)
    return model, where


def write_index(folder, weight_map):
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def refused(folder, *words):
    with pytest.raises(ValueError) as error: LanguageModel.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for word in words: assert word in message, message


def test_shards_are_read_as_one_file(tmp_path):
    model, _ = in_shards(tmp_path)
    again, tokens = LanguageModel.from_pretrained(tmp_path), draw_tokens()
    with torch.no_grad(): assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", "a/model.safetensors",
                                  "..\\model.safetensors", "C:model.safetensors", "model.bin", "..", "", 3])
def test_an_index_may_name_only_files_of_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    _, where = in_shards(folder)
    random_file = tmp_path / "model.safetensors"
    random_file.write_bytes((folder / where["norm.weight"]).read_bytes())
    write_index(folder, where | {"norm.weight": name})
    if isinstance(name, int): refused(folder, "model.safetensors.index.json")
    else: refused(folder, "model.safetensors.index.json", repr(name), "of its folder")


def test_shards_that_are_missing_or_do_not_fit_are_named(tmp_path):
    _, where = in_shards(tmp_path)
    last = sorted(set(where.values()))[-1]
    data = (tmp_path / last).read_bytes()
    (tmp_path / last).write_bytes(LFS)
    refused(tmp_path, last, "Git LFS pointer", "git lfs pull")
    (tmp_path / last).write_bytes(data[:-7])
    refused(tmp_path, last, "cut off")
    (tmp_path / last).unlink()
    refused(tmp_path, "incomplete", f"lacks {last}", "3 files")
    first = sorted(set(where.values()))[0]
    (tmp_path / last).write_bytes((tmp_path / first).read_bytes())
    refused(tmp_path, last, "another file")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}',
                                  "\xff"])
def test_an_index_that_is_none_is_one_sentence(tmp_path, text):
    in_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    refused(tmp_path, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_named_and_never_opened(tmp_path, name):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    command = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / name).write_bytes(b"cbuiltins\neval\n(V" + command.encode() + b"\ntR.")
    refused(tmp_path, name, "pickle", "model.safetensors", "save_pretrained")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_recognised(tmp_path, name):
    make_model().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(LFS)
    refused(tmp_path, name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("kept", [3, 8, 100, 2000, -1])
def test_weights_that_were_cut_off_are_refused(tmp_path, kept):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(tmp_path, "model.safetensors", "cannot be read", "cut off")


def test_numbers_that_are_no_floats_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["norm.weight"] = weights["norm.weight"].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    refused(tmp_path, "norm.weight", "torch.int8")


# The dtype

def saved_as(folder, matrices, gains):
    from safetensors.torch import load_file, save_file

    make_model().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: x.to(matrices if x.ndim > 1 else gains) for name, x in weights.items()},
              folder / "model.safetensors")
    return folder


def dtypes_of(model): return {x.dtype for x in model.parameters()}


@pytest.mark.parametrize("matrices, gains, opened", [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16, torch.float16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32), (torch.float64, torch.float64, torch.float64)])
def test_one_dtype_is_kept_and_of_two_the_widest_is_taken(tmp_path, matrices, gains, opened):
    folder = saved_as(tmp_path, matrices, gains)
    assert dtypes_of(LanguageModel.from_pretrained(folder)) == {opened}
    for dtype in (torch.float32, torch.bfloat16):
        assert dtypes_of(LanguageModel.from_pretrained(folder, dtype=dtype)) == {dtype}


@pytest.mark.parametrize("dtype", ["float32", torch.int64, 32])
def test_a_dtype_that_is_none_is_refused(tmp_path, dtype):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype must be a floating-point torch.dtype, or None, got"):
        LanguageModel.from_pretrained(tmp_path, dtype=dtype)


def test_the_place_of_a_folder_does_not_decide_its_dtype(tmp_path, monkeypatch):
    shipped = next(iter(shipped_models().values()))
    monkeypatch.chdir(tmp_path)
    places = [shipped.name, shipped, Path(os.path.relpath(shipped)), shipped / ".." / shipped.name]
    shutil.copytree(shipped, "copy")
    places.append("copy")
    with contextlib.suppress(OSError, NotImplementedError):  # Windows without the right to make links
        Path("link").symlink_to(shipped, target_is_directory=True)
        places.append("link")
    for place in places: assert dtypes_of(LanguageModel.from_pretrained(place)) == {torch.float32}, place


def test_a_program_that_reads_widens_16_bits_on_a_cpu(tmp_path, monkeypatch):
    from optimus import cli

    shipped = next(iter(shipped_models().values()))
    folder = tmp_path / "narrow"
    shutil.copytree(shipped, folder)
    LanguageModel.from_pretrained(shipped, dtype=torch.bfloat16).save_pretrained(folder)
    assert dtypes_of(LanguageModel.from_pretrained(folder)) == {torch.bfloat16}
    monkeypatch.setattr(cli, "best_device", lambda: torch.device("cpu"))
    assert dtypes_of(cli.open_checkpoint(str(folder))[0]) == {torch.float32}
    double = make_model().double()
    assert widened_on_cpu(double) is double and dtypes_of(double) == {torch.float64}


def test_a_shipped_model_is_bfloat16_on_disk_and_float32_in_use():
    from safetensors.torch import load_file

    from optimus import load_tokenizer
    for folder in shipped_models().values():
        model, tokenizer = LanguageModel.from_pretrained(folder.name), load_tokenizer(folder.name)
        saved = load_file(folder / "model.safetensors")
        assert {x.dtype for x in saved.values() if x.ndim > 1} == {torch.bfloat16}
        assert {x.dtype for x in model.parameters()} == {torch.float32} and not model.training
        assert model.head.weight is model.embedding.weight or not model.config.tie_embeddings
        assert len(tokenizer) == model.config.vocab_size and (folder / "README.md").is_file()
        assert (folder / "model.safetensors").stat().st_size <= 20e6
    assert (shipped_models()["presidents"] / "config.json").is_file()


def test_weights_go_out_and_into_a_model_without_a_copy():
    for model in (make_model(), make_model("gqa", tie_embeddings=False)):
        weights = weights_of(model.train())
        assert ("head.weight" in weights) is not model.config.tie_embeddings
        assert all(x.is_contiguous() and not x.requires_grad for x in weights.values())
        again = model_from(LanguageModel, model.config, weights, "here")
        assert not again.training and again.num_parameters() == model.num_parameters()
        for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert ours.data_ptr() == theirs.data_ptr() and theirs.requires_grad
        with pytest.raises(ValueError, match=r"^here does not fit config.json: norm.weight has shape none"):
            del weights["norm.weight"]
            model_from(LanguageModel, model.config, weights, "here")


def test_a_shipped_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("presidents").mkdir()
    assert find_folder("presidents") == shipped_models()["presidents"]
    assert find_folder(tmp_path / "other") == tmp_path / "other"
