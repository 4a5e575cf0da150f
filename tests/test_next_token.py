"""What must stay true of optimus.next_token. Derived in notebooks/16b_next_token.ipynb."""
import html
import re
from html.parser import HTMLParser

import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_panel import EVIL, TEXT, make_model

from optimus.data import train_tokenizer
from optimus.generation import next_token_probabilities
from optimus.next_token import (Piece, Transcript, bars_html, entropy_bits, likeliest, next_token, page_html,
                                percent, shade, summary, token_label)

UNTOUCHED = settings(deadline=None, max_examples=40,
                     suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer([TEXT], 300)


def plain(page): return html.unescape(re.sub("<[^>]*>", "", page))


class Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.attributes = set(), "", set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data): self.text += data


# The next token

LOGITS = st.lists(st.integers(-80, 80).map(lambda n: n / 8), min_size=2, max_size=31)


@settings(deadline=None, max_examples=80)
@given(LOGITS, st.floats(0.05, 3), st.none() | st.floats(0.01, 1), st.none() | st.integers(1, 9),
       st.none() | st.floats(0, 1))
def test_the_view_is_the_distribution_that_is_drawn_from(logits, temperature, top_p, top_k, min_p):
    logits, filters = torch.tensor(logits), dict(top_p=top_p, top_k=top_k, min_p=min_p)
    ids = likeliest(logits)
    view = next_token(logits, ids, temperature=temperature, **filters)
    p = next_token_probabilities(logits[None], temperature, **filters)[0]
    assert ids == sorted(ids, key=lambda i: -logits[i]) and len(ids) == min(20, len(logits))
    assert view.chance == p[ids].tolist() and view.survivors == (p > 0).sum()
    assert view.before == pytest.approx(logits.softmax(0)[ids].tolist()) and view.vocabulary == len(logits)
    for bits, q in zip(view.bits, (logits.softmax(0), p)):
        assert abs(bits - scipy.stats.entropy(q.double(), base=2)) < 1e-4
    page = bars_html(view)
    assert page.count("optimus-bar in") == sum(chance > 0 for chance in view.chance)
    assert page.count("optimus-bar cut") == sum(chance == 0 for chance in view.chance)


def test_entropy_by_hand():
    assert entropy_bits(torch.tensor([1.0, 0.0])) == 0
    assert entropy_bits(torch.tensor([0.5, 0.25, 0.25, 0.0])) == pytest.approx(1.5)


def test_the_line_is_drawn_below_the_last_survivor_and_only_where_something_is_cut():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    edges = {}
    for top_p in (0.4, 0.6, 0.9, None):
        page = bars_html(next_token(logits, [0, 1, 2, 3], temperature=1.0, top_p=top_p))
        rows = re.findall(r"optimus-bar (\w+)( edge)?", page)
        edges[top_p] = [i for i, (_, edge) in enumerate(rows) if edge]
    assert edges == {0.4: [0], 0.6: [1], 0.9: [2], None: []}
    many = next_token(torch.zeros(50), likeliest(torch.zeros(50)), temperature=1.0, top_p=0.9)
    assert "edge" not in bars_html(many) and "25 less likely tokens survive too" in bars_html(many)
    assert "45 of 50 tokens survive" in summary(many)


def test_temperature_zero_leaves_one():
    view = next_token(torch.tensor([1.0, 5.0, 5.0]), [1, 2, 0], temperature=0)
    assert view.chance == [1, 0, 0] and view.survivors == 1 and view.bits[1] == 0


def test_labels_show_what_cannot_be_seen(tokenizer):
    label = {text: token_label(tokenizer, tokenizer.encode(text)[0]) for text in (" ", "\n", "\t", "\0", "a")}
    assert label == {" ": "␣", "\n": "⏎", "\t": "⇥", "\0": "␀", "a": "a"}
    assert token_label(tokenizer, tokenizer.eos_token_id) == "‹end of text›"
    broken, *rest = tokenizer.encode("狐")
    assert rest and token_label(tokenizer, broken) == f"‹token {broken}›"
    for i in range(300):
        shown = token_label(tokenizer, i)
        assert shown and shown.isprintable() and len(shown) <= 14 and "\ufffd" not in shown


def test_probabilities_for_the_eye():
    shown = ["100.0 %", "61.3 %", "0.1 %", "<0.1 %", "0 %"]
    assert [percent(p) for p in (1, 0.613, 0.001, 0.0009, 0)] == shown
    assert [shade(p) for p in (1, 0.5, 0.49, 0.2, 0.05, 0.01, 0.009, 0)] == [0, 0, 1, 1, 2, 3, 4, 4]


# Text stays text

@UNTOUCHED
@given(prompt=st.text("<>&\"'/ab 鯨\n", max_size=20) | st.just(EVIL),
       texts=st.lists(st.text("<>&\"'=ab", max_size=5)))
def test_a_page_holds_no_tag_but_ours_and_gives_every_character_back(tokenizer, prompt, texts):
    pieces = [Piece(text, [5], 0.3, [(tokenizer.encode("<")[0], 0.2)]) for text in texts]
    for judge in (None, tokenizer):
        page = page_html(prompt, pieces, judge)
        read = Reader(page)
        assert read.tags == {"div", "span"} and read.text == prompt + "".join(texts)
        assert read.attributes <= {"class", "data-text", "data-tip", "tabindex"}
        assert plain(page) == prompt + "".join(texts)


def test_a_transcript_takes_tokens_from_anybody(tokenizer):
    written = Transcript(make_model(), tokenizer, "the")
    for i in tokenizer.encode(" ship ⛵"): assert written.add(i)
    assert "".join(p.text for p in written.pieces) == " ship ⛵" and not written.add(tokenizer.eos_token_id)
