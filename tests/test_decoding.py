"""What must stay true of optimus.decoding. Derived in notebooks/10b_fast_decoding.ipynb.

Most tests compile with a backend that only records the graph; `fullgraph=True` is as strict there.
"""
import copy
import functools
import inspect

import pytest
import torch
from torch import nn

from optimus import LanguageModel, ModelConfig, generate
from optimus.decoding import (CompiledDecoder, FixedView, RowLinear, fastest_copy, inference_copy,
                              onednn_linear)
from optimus.generation import Generation

KINDS = pytest.mark.parametrize("kind", ["mla", "gqa"])


def make(kind="mla", **changes):
    """A small model with random gains: with gains of one a forgotten norm would not be seen."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, embedding_dim=20, num_layers=2, num_attention_heads=5, num_kv_heads=1,
                 intermediate_size=31, rope_seq_len=37, dropout=0.3, attention=kind)
    model = LanguageModel(ModelConfig(**sizes | changes))
    for p in model.parameters(): torch.nn.init.uniform_(p, 0.5, 1.5) if p.ndim < 2 else p.data.mul_(10)
    return model.eval()


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without a compiler; the list grows by one graph for every compilation."""
    made = []
    def record(graph, inputs):
        made.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=record))
    torch.compiler.reset()
    yield made
    torch.compiler.reset()


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("rows", [1, 3])
def test_every_step_gives_the_models_logits_across_buckets(kind, rows, graphs, monkeypatch):
    monkeypatch.setattr(CompiledDecoder, "bucket", 5)
    model, tokens = make(kind), torch.randint(61, (rows, 37))
    decoder, whole = CompiledDecoder(model), model(tokens)
    for prompt in (0, 4, 5, 6, 11):
        cache = decoder.new_cache(rows, 37)
        if prompt: decoder.hidden(tokens[:, :prompt], cache)
        for t in range(prompt, 37):
            y = decoder(tokens[:, t:t + 1], cache)
            torch.testing.assert_close(y[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
        assert cache.length == 37
    assert graphs


@pytest.mark.slow
def test_it_compiles_twice_and_then_never_again(graphs, monkeypatch):
    monkeypatch.setattr(CompiledDecoder, "bucket", 5)
    decoder = CompiledDecoder(make(num_layers=1))
    for length in (37, 37, 23):
        cache = decoder.new_cache(1, length)
        for t in range(length): decoder(torch.tensor([[t]]), cache)
    assert len(graphs) == 2  # the first length as a number, then any length


@pytest.mark.slow
@KINDS
def test_it_takes_the_models_place_in_generate_even_past_the_context(kind, graphs):
    model = make(kind)
    decoder = CompiledDecoder(model)
    for settings in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, seed=3)):
        assert generate(decoder, [1, 2, 3], 60, **settings) == generate(model, [1, 2, 3], 60, **settings)
    assert graphs


@pytest.mark.slow
def test_float32_weights_are_shared_and_the_model_is_left_alone(graphs):
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    decoder = CompiledDecoder(model)
    assert {p.data_ptr() for p in decoder.parameters()} == {p.data_ptr() for p in model.parameters()}
    generate(decoder, [1, 2], 5, seed=0)
    assert model.training and isinstance(model.head, torch.nn.Linear)
    for name, x in model.state_dict().items(): assert torch.equal(x, before[name])
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_weights_are_the_rounded_model_computed_in_float32(kind, tied, graphs):
    model = make(kind, tie_embeddings=tied)
    decoder, rounded = CompiledDecoder(model, torch.bfloat16), copy.deepcopy(model)
    for p in rounded.parameters():
        if p.ndim > 1: p.data = p.data.bfloat16().float()
    matrices = [p for p in decoder.parameters() if p.ndim > 1]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    assert sum(p.nbytes for p in matrices) * 2 == sum(p.nbytes for p in rounded.parameters() if p.ndim > 1)
    tokens = torch.randint(61, (1, 11))
    cache = decoder.new_cache(1, 11)
    assert cache.stores[0].dtype == torch.float32
    decoder.hidden(tokens[:, :-1], cache)
    y = decoder(tokens[:, -1:], cache)
    torch.testing.assert_close(y[:, 0], rounded(tokens)[:, -1], rtol=1e-4, atol=1e-4)
    assert (y[:, 0] - model(tokens)[:, -1]).abs().max() > 1e-3  # the rounding is there


@pytest.mark.slow
def test_too_much_is_refused_in_the_models_words(graphs):
    model = make(num_layers=1)
    decoder, token = CompiledDecoder(model), torch.tensor([[1]])
    for cache, words in ((decoder.new_cache(1, 3), "max_length=37"),
                         (model.new_cache(1, 50), "rope_seq_len = 37")):
        for _ in range(37): decoder(token, cache)
        with pytest.raises(ValueError, match=words): decoder(token, cache)
        assert cache.length == 37
    with pytest.raises(ValueError, match="at most rope_seq_len = 37, got 38"): decoder.new_cache(1, 38)
    small = model.new_cache(1, 1)  # any cache of the model will do, and its own limit holds
    decoder(token, small)
    with pytest.raises(ValueError, match="max_length=1"): decoder(token, small)


@pytest.mark.parametrize("library", ["oneDNN", "none"])
def test_a_row_product_is_a_linear_layer(library, monkeypatch):
    torch.manual_seed(0)
    if library == "none": monkeypatch.setattr("optimus.decoding.onednn_linear", None)
    linear = torch.nn.Linear(7, 5, bias=False).requires_grad_(False)
    narrow = torch.nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
    for shape in ((1, 1, 7), (7,), (1, 7), (2, 3, 7)):
        x = torch.randn(*shape[:-1], 14)[..., ::2]
        torch.testing.assert_close(RowLinear(linear.weight)(x), linear(x))
        torch.testing.assert_close(RowLinear(narrow)(x), x @ narrow.float().T)


def test_a_single_row_of_float32_goes_to_onednn_and_nothing_else_does(monkeypatch):
    asked = []
    def product(x, W, *rest): return asked.append(x.shape) or x @ W.T
    monkeypatch.setattr("optimus.decoding.onednn_linear", product)
    for x, dtype in ((torch.randn(1, 1, 7), torch.float32), (torch.randn(2, 1, 7), torch.float32),
                     (torch.randn(1, 1, 7).double(), torch.float64), (torch.randn(1, 1, 7), torch.bfloat16)):
        RowLinear(torch.nn.Parameter(torch.randn(5, 7).to(dtype), requires_grad=False))(x)
    assert asked == [(1, 1, 7)]


def test_this_torch_still_has_the_product():
    assert onednn_linear is not None, "RowLinear falls back to F.linear: as right as before, but slower"


def test_generate_asks_a_twin_of_the_same_weights_and_mode_and_weights_stay_the_models(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    model = make(vocab_size=2**15).train()
    twin = fastest_copy(model)
    assert isinstance(twin.head, RowLinear) and isinstance(model.head, torch.nn.Linear)
    assert isinstance(twin.blocks[0].feedforward.up_proj, torch.nn.Linear)  # too small to pay
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert model.training and not twin.training and all(p.requires_grad for p in model.parameters())
    tokens = torch.randint(61, (1, 12))
    cache, whole = twin.new_cache(1, 12), model.eval()(tokens)
    for t in range(12):
        torch.testing.assert_close(twin(tokens[:, t:t + 1], cache)[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)
    with torch.no_grad(): model.head.weight.mul_(0.5)  # a training step later
    torch.testing.assert_close(twin(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert isinstance(Generation(model, tokens, 3).cached_model.model.head, RowLinear)


def test_the_twin_is_made_only_where_it_pays(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    others = make().double(), make().bfloat16(), make().to("meta"), torch.nn.Linear(2, 2)
    assert all(fastest_copy(model) is model for model in others)
    decoder = CompiledDecoder(make())
    assert fastest_copy(decoder) is decoder
    model = make()
    assert fastest_copy(model) is not model
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        with monkeypatch.context() as patch:
            patch.setattr(library, "is_available", lambda: False)
            assert fastest_copy(model) is model


def test_a_fixed_view_writes_at_pos_and_shows_as_many_slots_as_asked():
    store = torch.zeros(3, 11, 5)
    [shown] = FixedView((store,), torch.tensor([4]), 7).update(torch.ones(3, 1, 5))
    assert shown.shape == (3, 7, 5) and store[:, 4].eq(1).all() and store.sum() == 15


class Moved(nn.Embedding):
    def forward(self, ids): return super().forward((ids + 7) % self.num_embeddings)


def test_layers_of_ones_own_are_asked_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    model, hidden = make(tie_embeddings=False), []
    own = Moved(*model.embedding.weight.shape)
    own.weight, model.embedding = model.embedding.weight, own
    model.head = nn.Linear(model.head.in_features, model.head.out_features)
    model.head.bias.data[3] = 100.0
    assert generate(model, [1, 2], 4, temperature=0) == [1, 2, 3, 3, 3, 3]
    tokens = torch.tensor([[1, 2, 5]])
    twin = inference_copy(model, torch.float32, torch.float32)
    torch.testing.assert_close(twin(tokens), model.eval()(tokens))
    model.blocks[0].register_forward_hook(lambda *_: hidden.append(1))
    generate(model, [1, 2], 4)
    assert len(hidden) >= 4 and fastest_copy(model) is model


def test_an_inference_copy_has_no_linear_layer_left():
    twin = inference_copy(make(tie_embeddings=True), torch.bfloat16, torch.float32)
    assert not any(isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) for m in twin.modules())
    assert twin.head.weight is twin.embedding.weight and not twin.training


@pytest.mark.slow
def test_really_compiled_it_is_the_same():
    model, tokens = make(num_layers=1), torch.randint(61, (1, 9))
    decoder = CompiledDecoder(model, torch.bfloat16)
    cache = decoder.new_cache(1, 9)
    steps = torch.cat([decoder(t, cache) for t in tokens.split(1, 1)], 1)
    with torch.no_grad(): torch.testing.assert_close(steps, decoder(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif("isolate_recompiles" not in inspect.signature(torch.compile).parameters,
                    reason="this torch counts the programs of all decoders together")
def test_many_decoders_live_in_one_process(graphs):
    for width in range(20, 200, 20):  # nine models; torch allows eight programs of one function
        model = make(embedding_dim=width, num_layers=1)
        decoder = CompiledDecoder(model)
        assert generate(decoder, [3, 5], 3, temperature=0) == generate(model, [3, 5], 3, temperature=0)
