"""What must stay true of optimus.data. Derived in notebooks/09_data.ipynb."""
import gc
import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_corpora import small_corpus, small_tokenizer

from optimus.data import Sequences, batches, prepare


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tokenizer(): return small_tokenizer()


@pytest.fixture
def corpus(): return small_corpus()


def take(iterator): return [torch.stack([x, y]) for x, y in iterator]


@pytest.fixture
def sequences(corpus, tokenizer): return Sequences(prepare(corpus, tokenizer), "train", 7, seed=3)


def test_targets_are_the_next_tokens(sequences):
    row = torch.from_numpy(sequences.corpus.tokens("train").astype(np.int64))
    for i in (0, 5, len(sequences) + 2):
        tokens, targets = sequences[i]
        start = sequences.start(i)
        assert torch.equal(tokens, row[start:start + 7]) and torch.equal(targets, row[start + 1:start + 8])


def test_an_epoch_visits_every_window_once_and_epochs_differ(sequences):
    n = len(sequences)
    first, second = ([sequences.start(i) for i in range(e * n, (e + 1) * n)] for e in (0, 1))
    for starts in (first, second):
        assert np.unique(np.diff(sorted(starts))).tolist() == [7] and len(set(starts)) == n
        assert max(starts) + 8 <= sequences.corpus.train_tokens
    assert first != second


def test_the_batch_at_a_step_depends_on_seed_and_step_only(sequences):
    whole = take(batches(sequences, 5, range(0, 40)))
    for workers in (0, 1, 2):
        part = take(batches(sequences, 5, range(13, 40), num_workers=workers))
        assert all(torch.equal(a, b) for a, b in zip(part, whole[13:], strict=True))
    other = Sequences(sequences.corpus, "train", 7, seed=4)
    assert not torch.equal(torch.cat(take(batches(other, 5, range(3)))), torch.cat(whole[:3]))


def test_ranks_share_a_batch_without_overlap(sequences):
    whole = take(batches(sequences, 6, range(4)))
    parts = [take(batches(sequences, 6, range(4), rank=r, world_size=3)) for r in range(3)]
    for step in range(4):
        assert torch.equal(torch.cat([p[step] for p in parts], 1), whole[step])
    with pytest.raises(ValueError, match="batch_size is 6; it must be a multiple of 4"):
        batches(sequences, 6, range(1), world_size=4)
    for rank in (-1, 2, 5):
        with pytest.raises(ValueError, match=rf"rank is {rank}; it must be in \[0, 2\)"):
            batches(sequences, 6, range(1), rank=rank, world_size=2)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_read_ahead_but_not_far_and_end_with_the_reader(sequences, monkeypatch, workers):
    read, asked = Sequences.read, []
    monkeypatch.setattr(Sequences, "read", lambda self, rows: asked.append(rows[0] // 5) or read(self, rows))
    source = batches(sequences, 5, range(1000), num_workers=workers)
    assert threads_that_read() == [] and asked == []
    for _ in range(4): next(source)
    time.sleep(0.05)
    assert len(asked) <= 4 + 2 * workers and len(threads_that_read()) == workers
    assert multiprocessing.active_children() == []  # so no script needs a main guard
    if workers == 1: source.close()
    else: del source
    gc.collect()
    assert threads_that_read() == []


def threads_that_read(): return [t for t in threading.enumerate() if t.name.startswith("optimus-batches")]


def test_an_error_of_a_reading_thread_arrives_at_its_step(sequences, monkeypatch):
    read = Sequences.read
    def fails(self, rows):
        if rows[0] == 15: raise OSError(5, "Input/output error", "train.bin")
        return read(self, rows)
    monkeypatch.setattr(Sequences, "read", fails)
    source = batches(sequences, 5, range(9), num_workers=2)
    assert len([next(source) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="train.bin"): next(source)
    assert threads_that_read() == []


def test_many_threads_may_read_where_two_epochs_meet(sequences):
    n = len(sequences)
    expected = [Sequences(sequences.corpus, "train", 7, seed=3).start(i) for i in range(3 * n)]
    mixed = random.Random(0).sample(range(3 * n), 3 * n)
    with ThreadPoolExecutor(8) as pool: found = dict(zip(mixed, pool.map(sequences.start, mixed)))
    assert [found[i] for i in range(3 * n)] == expected


def test_batches_are_contiguous_and_share_no_memory(sequences):
    for workers in (0, 2):
        for tokens, targets in batches(sequences, 5, range(2), num_workers=workers):
            assert tokens.shape == targets.shape == (5, 7) and tokens.dtype == targets.dtype == torch.int64
            assert tokens.is_contiguous() and targets.is_contiguous()
            tokens[:] = 0
            assert targets.any()


def test_reading_batches_leaves_the_random_state_alone(sequences):
    before = torch.get_rng_state()
    take(batches(sequences, 5, range(3), num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_comes_in_the_order_of_the_text(corpus, tokenizer):
    s = Sequences(prepare(corpus, tokenizer), "validation", 7)
    assert [s.start(i) for i in range(3)] == [0, 7, 14]
    assert len(s) == (s.corpus.validation_tokens - 1) // 7


def test_too_short_a_corpus_says_both_numbers(corpus, tokenizer):
    p = prepare(corpus, tokenizer)
    N = p.validation_tokens
    with pytest.raises(ValueError, match=rf"{N} tokens; max_length={N} needs"): Sequences(p, "validation", N)
    with pytest.raises(ValueError, match="split is 'val'; it must be"): Sequences(p, "val", 8)
    with pytest.raises(ValueError, match="max_length is 0; it must be at least 1"): Sequences(p, "train", 0)
