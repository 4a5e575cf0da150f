"""Small corpora and tokenizers, for the tests of several modules."""
import functools
import json
from pathlib import Path

import datasets
import numpy as np

from optimus.tokenizer import train_tokenizer

WIKIPEDIA_ROWS = {"id": ["12", "25", "39"], "url": ["https://en.wikipedia.org/wiki/A"] * 3,
                  "title": ["A", "B", "C"],
                  "text": ["Anarchism is a movement.\n\nIt is old.", "Autism is a condition.",
                           "Albedo is a fraction."]}


@functools.cache
def small_tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 270)


def small_corpus():
    words = ["the", "cat", "sat", "on", "a", "mat"]
    rng = np.random.default_rng(0)
    return datasets.Dataset.from_dict({"text": [" ".join(rng.choice(words, 40)) for _ in range(23)]})


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tokenizer_ending_with(folder, specials, **files):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(["one two"], trainers.BpeTrainer(
        vocab_size=290, special_tokens=specials, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    backend.enable_truncation(3)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items(): (folder / f"{name}.json").write_text(json.dumps(content))
