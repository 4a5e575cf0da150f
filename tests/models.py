"""A small model whose weights hide no mistake, for the tests of several modules."""
import torch
from torch import nn

from optimus.config import ModelConfig
from optimus.transformer import LanguageModel

B, T, V = 2, 13, 61
SIZES = dict(vocab_size=V, embedding_dim=60, num_layers=3, num_attention_heads=5, num_kv_heads=1,
             rope_seq_len=17,
             intermediate_size=31, dropout=0.0, checkpointing=False)


def make_model(kind="mla", **changes):
    torch.manual_seed(0)
    return shake(LanguageModel(ModelConfig(**SIZES | {"attention": kind} | changes)).eval())


def shake(model):
    """Gains and matrices far from their first values: nothing forgotten can hide behind a 0 or a 1."""
    for p in model.parameters(): nn.init.uniform_(p, 0.5, 1.5) if p.ndim < 2 else nn.init.normal_(p, std=0.2)
    return model


def draw_tokens(*shape):
    return torch.randint(0, V, shape or (B, T), generator=torch.Generator().manual_seed(1))
