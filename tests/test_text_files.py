"""What must stay true of optimus.text_files. Derived in notebooks/09b_text_files.ipynb."""
import json
import os
import random
from pathlib import Path

import pytest
from small_corpora import write

from optimus import text_files
from optimus.text_files import END_OF_TEXT, local_texts


def read(path): return list(local_texts(path))


def test_only_a_line_of_end_of_text_divides_a_file(tmp_path):
    inside = f"GPT-2 ends a document with {END_OF_TEXT} in its text_files.\nSecond line."
    text = f"{inside}\r\n{END_OF_TEXT} \r\nsecond\n{END_OF_TEXT}"
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8", newline="")
    assert read(tmp_path / "corpus.txt") == [inside, "second"]


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", "empty.txt holds no text"),
    ("blank.txt", b" \n\n", "blank.txt holds no text"),
    ("binary.txt", b"PK\x00\x01", "binary.txt holds a NUL byte"),
    ("latin.txt", "café".encode("latin-1"), "latin.txt is not UTF-8"),
    ("utf16.txt", "text".encode("utf-16-le"), "utf16.txt holds a NUL byte in line 1"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl cannot be read as jsonl: line 2 is"),
    ("other.jsonl", b'{"body": "a"}\n', "other.jsonl has no column 'text'; it has .*body"),
    ("empty.jsonl", b"", "empty.jsonl"),
    ("latin.jsonl", b'{"text": "a"}\n' * 3000 + b'{"text": "caf\xe9"}\n',
     r"latin.jsonl is not UTF-8 \(line 3001: byte 0xe9"),
    ("number.jsonl", b'{"text": null}\n{"text": null}\n{"text": 5}\n', "number.jsonl: .* line 3 is int, not"),
    ("broken.parquet", b"not parquet", "broken.parquet cannot be read as parquet"),
    ("page.html", b"<p>", "page.html is not a .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet file"),
])
def test_a_file_that_is_no_corpus_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words): read(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_files_with_a_mark_are_read_in_their_encoding(tmp_path, encoding, kind):
    texts = ["Ærø, 東京 🎉", "zweite\r\nZeile"]
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    content = f"\r\n{END_OF_TEXT}\r\n".join(texts) if kind == "txt" else "\r\n".join(lines)
    (tmp_path / f"a.{kind}").write_bytes(content.encode(encoding))
    assert read(tmp_path / f"a.{kind}") == texts
    if encoding != "utf-16": return
    big = b"\xfe\xff" + content.encode("utf-16-be")
    (tmp_path / f"b.{kind}").write_bytes(big)
    assert read(tmp_path / f"b.{kind}") == texts
    (tmp_path / f"c.{kind}").write_bytes(big[:-1])
    with pytest.raises(ValueError, match=rf"c.{kind} is not UTF-16 .*save it as UTF-8"):
        read(tmp_path / f"c.{kind}")


@pytest.mark.parametrize("codec, end", [("gzip", "gz"), ("zstd", "zst")])
def test_packed_jsonl_is_read_and_a_part_of_it_is_refused(tmp_path, codec, end):
    import pyarrow

    texts = [f"text {i} {random.Random(i).random()}" for i in range(3000)]
    path = tmp_path / f"a.JSONL.{end}"
    with pyarrow.CompressedOutputStream(str(path), codec) as file:
        for text in texts: file.write(json.dumps({"text": text}).encode() + b"\n")
    assert read(path) == texts
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=rf"a.JSONL.{end} cannot be unpacked: .*cut off"): read(path)
    path.write_bytes(b'{"text": "not packed"}')
    with pytest.raises(ValueError, match=rf"a.JSONL.{end} cannot be unpacked"): read(path)


def test_only_the_column_text_of_a_jsonl_is_looked_at(tmp_path):
    rows = [{"text": "a", "n": 1}, {"n": {"deep": [1, None]}, "text": "b"}, {"n": "word"}, {"text": None},
            {"text": " \n"}, {"text": "c", "big": 10**400, "x": float("inf")}]
    write(tmp_path, {"a.jsonl": "\n\n".join(map(json.dumps, rows))})
    assert read(tmp_path / "a.jsonl") == ["a", "b", "c"]


@pytest.mark.parametrize("line, words", [
    ('{"text": "a"', "line 3 is damaged"), ("[1]", "line 3 is no object"), ('"text"', "line 3 is no object"),
    ("nothing", "line 3 is damaged"), ("[" * 100_000, "line 3 is damaged"),
    ('{"text": ["a"]}', "line 3 is list, not text"), (r'{"text": "a\ud800"}', "line 3, character 1 is"),
    ('{"text": "a\0"}', "NUL byte in line 3")])
def test_a_damaged_line_is_named_and_nothing_is_printed(tmp_path, capfd, line, words):
    write(tmp_path, {"a.jsonl": f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n'})
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{words}") as error: read(tmp_path)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a[b].txt", "*.jsonl", "{x,y}.parquet", "50%.txt", "a#1?.jsonl", "**.txt"])
def test_a_name_is_no_pattern(tmp_path, name):
    from pyarrow import parquet, table

    for other in ("ab.txt", "x.jsonl", "x.parquet"): (tmp_path / other).write_bytes(b"\0")
    if name.endswith("parquet"): parquet.write_table(table({"text": ["right"]}), tmp_path / name)
    else: write(tmp_path, {name: "right" if name.endswith("txt") else '{"text": "right"}'})
    assert read(tmp_path / name) == ["right"]


def test_clutter_is_left_out_and_an_empty_file_is_a_warning(tmp_path):
    write(tmp_path, {".git/a.txt": "no", "b/.hidden.jsonl": b"\0", "__MACOSX/c.txt": "no", "b/c.txt": "yes",
                     ".cache.parquet": b"\0", "d.txt": "", "e.jsonl": '{"text": null}', "z.md": "no"})
    with pytest.warns(UserWarning, match="holds no text") as warned:
        assert read(tmp_path) == ["yes"]
    assert [Path(str(w.message).split(" holds")[0]).name for w in warned] == ["d.txt", "e.jsonl"]
    (tmp_path / "b" / "c.txt").unlink()
    with (pytest.warns(UserWarning, match="holds no text"),
          pytest.raises(ValueError, match=f"{tmp_path.name} holds no text")): read(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_linked_files_and_folders_are_read_once(tmp_path):
    write(tmp_path, {"away/x/1.txt": "one", "away/2.txt": "two", "t/3.txt": "three"})
    for link, target in {"t/a": "away", "t/b": "away/x", "t/c.txt": "t/3.txt", "away/x/up": "t",
                         "t/self": "t", "t/gone.txt": "nothing"}.items():
        os.symlink(tmp_path / target, tmp_path / link)
    assert sorted(read(tmp_path / "t")) == ["one", "three", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_corpus(tmp_path, name):
    write(tmp_path, {name: "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"})
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"): read(tmp_path)


@pytest.mark.parametrize("kind, words", [("string", None), ("large_string", None), ("dictionary", None),
                                         ("int64", "row 1 is int, not"), ("struct", "row 1 is dict, not"),
                                         ("binary", "row 1 is bytes, not"), ("null", "holds no text")])
def test_a_parquet_column_of_any_kind_of_text(tmp_path, kind, words):
    import pyarrow as pa
    from pyarrow import parquet

    rows = {"int64": [1, 2], "struct": [{"a": "b"}] * 2, "binary": [b"a"], "null": pa.nulls(2)}
    texts = ["naïve", None, " ", "two"]
    if kind == "dictionary": column = pa.array(texts).dictionary_encode()
    else: column = rows[kind] if words else pa.array(texts, getattr(pa, kind)())
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": range(len(column)), "text": column}), path)
    if not words: assert read(path) == ["naïve", "two"]
    else:
        with pytest.raises(ValueError, match=f"a.parquet.*{words}"): read(path)


def test_a_parquet_file_of_one_group_of_rows_is_read_in_small_pieces(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"{i} " * 500 + "x" * 10_000 for i in range(4000)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False,
                        row_group_size=4000, compression="none")
    before = pa.total_allocated_bytes()
    held = max(pa.total_allocated_bytes() - before for _ in text_files.read_parquet(tmp_path / "a.parquet"))
    assert 0 < held < sum(map(len, texts)) / 2


def test_documents_are_read_one_after_another(tmp_path):
    write(tmp_path, {"a.txt": "one", "b.jsonl": '{"text": "two"}\nbroken'})
    texts = text_files.local_texts(tmp_path)
    assert next(texts) == "one" and next(texts) == "two"
    with pytest.raises(ValueError, match="b.jsonl.*line 2"): next(texts)
