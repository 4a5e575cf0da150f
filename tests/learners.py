"""What learners write: right pieces, and the wrong ones that their typical mistakes make of them.

RIGHT: per piece, complete answers, below the imports of the stub. "the package's" stands for the course's own
code. WRONG: per piece (words of the verdict, old text, new text), changes to the first right answer.
"""
RIGHT = {
    "apply_rope": ['''
def apply_rope(x, pos, theta=10000.0, interleaved=True):
    D = x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    angle = rope_angles(pos, D, theta, wide.dtype)[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    y = torch.empty_like(wide)
    first, second = slice(0, D // 2), slice(D // 2, None)
    if interleaved: first, second = slice(0, None, 2), slice(1, None, 2)
    a, b = wide[..., first], wide[..., second]
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return y.to(x.dtype)
''', '''
def apply_rope(x, pos, theta=10000.0, interleaved=True):
    pairs = x.float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    if not interleaved: pairs = pairs.mT
    z = torch.view_as_complex(pairs.contiguous())
    angle = rope_angles(pos, x.shape[-1], theta)[..., None, :]
    y = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle))
    return (y if interleaved else y.mT).flatten(-2).to(x.dtype)
'''],
    "permute_rope": ['''
def permute_rope(weight, head_dim, interleaved):
    order = []
    for start in range(0, len(weight), head_dim):
        even, odd = range(0, head_dim, 2), range(1, head_dim, 2)
        half = [*even, *odd]
        head = [half.index(i) for i in range(head_dim)] if interleaved else half
        order += [start + i for i in head]
    return weight[order]
''', '''
def permute_rope(weight, head_dim, interleaved):
    heads = weight.unflatten(0, (-1, head_dim))
    if not interleaved: return torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1)
    half = head_dim // 2
    return torch.stack([heads[:, :half], heads[:, half:]], 2).flatten(0, 2)
'''],
    "RMSNorm": ['''
class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype)
''', '''
class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.dim, self.eps, self.weight = dim, eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        size = (torch.einsum("...c,...c->...", wide, wide) / self.dim + self.eps) ** 0.5
        return (wide / size[..., None] * self.weight).to(x.dtype)
'''],
    "SwiGLU": ['''
class SwiGLU(nn.Module):
    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        self.dim = dim
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.dropout(self.down_proj(gate * torch.sigmoid(gate) * up))
''', "the package's"],
    "causal_mask": ['''
def causal_mask(pos, S):
    keys = torch.arange(S)
    return keys <= pos.unsqueeze(-1)
''', '''
def causal_mask(pos, S):
    rows = [[s <= p for s in range(S)] for p in pos.flatten().tolist()]
    return torch.tensor(rows, dtype=torch.bool).view(*pos.shape, S)
'''],
    "attend": ['''
def attend(q, k, v, pos, scale=None):
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
    if scale is None: scale = q.shape[-1] ** -0.5
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    seen = causal_mask(torch.arange(T) if T == S else pos, S)
    if seen.ndim == 3: seen = seen[:, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)
''', '''
def attend(q, k, v, pos, scale=None):
    (B, T, H, D), S, H_kv = q.shape, k.shape[1], k.shape[2]
    scale = scale or 1 / D ** 0.5
    if T == S: pos = torch.arange(T)
    pos = pos.expand(B, T)
    rows = []
    for b in range(B):
        for h in range(H):
            key, value = k[b, :, h * H_kv // H], v[b, :, h * H_kv // H]
            for t in range(T):
                p = int(pos[b, t]) + 1
                rows.append((scale * key[:p] @ q[b, t, h]).softmax(0) @ value[:p])
    return torch.stack(rows).view(B, H, T, -1).transpose(1, 2)
'''],
    "GroupedQueryAttention": ["the package's", '''
    def forward(self, x, pos, cache=None):
        B, T, _ = x.shape
        q = apply_rope(self.q_proj(x).view(B, T, -1, self.head_dim), pos, theta=self.rope_theta)
        k = apply_rope(self.k_proj(x).view(B, T, -1, self.head_dim), pos, theta=self.rope_theta)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if cache is not None: k, v = cache.update(k, v)
        return self.dropout(self.o_proj(attend(q, k, v, pos).reshape(B, T, -1)))
'''],
    "absorbed_attend": ["the package's", '''
def absorbed_attend(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, pos):
    T, S = q_nope.shape[1], c_kv.shape[1]
    q = torch.stack([q_nope[:, :, h] @ W_UK[h] for h in range(len(W_UK))], 1)
    scores = q @ c_kv[:, None].mT + q_rope.transpose(1, 2) @ k_rope[:, None].mT
    scores = scores / (q_nope.shape[-1] + q_rope.shape[-1]) ** 0.5
    seen = causal_mask(torch.arange(T) if T == S else pos, S)
    seen = seen if seen.ndim == 2 else seen[:, None]
    mean = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ c_kv[:, None]
    return torch.einsum("bhtr,hdr->bthd", mean, W_UV)
'''],
    "MultiHeadLatentAttention": ["the package's"],
    "LayerCache": ["the package's", '''
    def update(self, *new):
        T, length = new[0].shape[1], self.cache.length
        if length + T > self.cache.max_length: raise ValueError("full")
        if len(new) != len(self.stores): raise ValueError("another kind of layer")
        for store, x in zip(self.stores, new):
            if x.shape != (len(store), T, *store.shape[2:]): raise ValueError("another shape")
        held = []
        for store, x in zip(self.stores, new):
            store.narrow(1, length, T).copy_(x.detach())
            held.append(store.narrow(1, 0, length + T))
        return tuple(held)
'''],
    "Cache": ["the package's", '''
    @property
    def nbytes(self):
        total = 0
        for store in self.stores: total += store.numel() * store.element_size()
        return total

    def end_after(self, T):
        end = self.length + T
        if end <= self.max_length: return end
        raise ValueError(f"the cache holds {self.max_length} tokens")

    def layer(self, i): return LayerCache(self, i)

    def advance(self, T):
        self.length = self.end_after(T)

    def reset(self):
        self.length = 0
'''],
    "Block": ['''
class Block(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.attention = attention
        self.attention_norm = RMSNorm(config.embedding_dim, config.norm_eps)
        self.feedforward = SwiGLU(config.embedding_dim, config.ffn_dim, config.dropout)
        self.feedforward_norm = RMSNorm(config.embedding_dim, config.norm_eps)

    def forward(self, x, pos, cache=None, keep_last=None):
        y = self.attention(self.attention_norm(x), pos, cache) + x
        if keep_last: y = y[:, y.shape[1] - keep_last:]
        return self.feedforward(self.feedforward_norm(y)) + y
''', "the package's"],
    "init_weights": ['''
def init_weights(model, std=0.02):
    small = std / (2 * len(model.blocks)) ** 0.5
    for name, p in model.named_parameters():
        if p.ndim == 1: continue
        writer = name.endswith("attention.o_proj.weight") or name.endswith("feedforward.down_proj.weight")
        nn.init.normal_(p, 0.0, small if writer else std)
''', '''
def init_weights(model, std=0.02):
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.copy_(torch.randn_like(p) * std)
        for block in model.blocks:
            for p in (block.attention.o_proj.weight, block.feedforward.down_proj.weight):
                p /= (2 * len(model.blocks)) ** 0.5
'''],
    "lm_loss": ['''
def lm_loss(hidden, weight, targets, fused=False):
    counted = targets != -100
    hidden, targets = hidden[counted], targets[counted]
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = logits.gather(1, targets[:, None])[:, 0]
    return (logits.logsumexp(-1) - wanted).mean()
''', '''
def lm_loss(hidden, weight, targets, fused=False):
    total, count = 0, 0
    for start in range(0, len(hidden), 64):
        h, t = hidden[start:start + 64], targets[start:start + 64]
        logits = h @ weight.T
        if logits.dtype != torch.float64: logits = logits.float()
        logp = logits.log_softmax(-1)
        keep = t != -100
        total = total - (logp[torch.arange(len(t)), t.clamp(min=0)] * keep).sum()
        count = count + keep.sum()
    return total / count
'''],
    "LanguageModel.hidden": ['''
def hidden(self, tokens, cache=None, pos=None, keep_last=None):
    check_tokens(tokens, self.config.vocab_size, read_gpu=not self.training)
    pos = positions(tokens, pos, cache, self.config.rope_seq_len)
    x = self.dropout(self.embedding(tokens))
    for i, block in enumerate(self.blocks):
        last = i == len(self.blocks) - 1
        x = block(x, pos, cache.layer(i) if cache is not None else None, keep_last if last else None)
    if cache is not None: cache.advance(tokens.shape[1])
    return self.norm(x)
''', '''
def hidden(self, tokens, cache=None, pos=None, keep_last=None):
    T = tokens.shape[1]
    if pos is None: pos = torch.arange(T) + (cache.length if cache is not None else 0)
    x, last = self.dropout(self.embedding(tokens)), self.blocks[-1]
    for i, block in enumerate(self.blocks[:-1]): x = block(x, pos, cache and cache.layer(i))
    x = last(x, pos, cache and cache.layer(len(self.blocks) - 1), keep_last=keep_last)
    if cache: cache.advance(T)
    return self.norm(x)
'''],
}

RIGHT["MultiHeadLatentAttention"].append('''
class LatentProjections(nn.Module):
{init}
    def queries(self, x, pos):
        B, T, _ = x.shape
        q = self.q_up_proj(self.q_norm(self.q_down_proj(x))).view(B, T, self.num_heads, -1)
        n = self.qk_nope_head_dim
        return q[..., :n], apply_rope(q[..., n:], pos, self.rope_theta)

    def latents(self, x, pos):
        both = self.kv_down_proj(x)
        c_kv, k = both[..., :self.kv_lora_rank], both[..., self.kv_lora_rank:]
        return self.kv_norm(c_kv), apply_rope(k.unsqueeze(2), pos, self.rope_theta).squeeze(2)


class MultiHeadLatentAttention(LatentProjections):
    absorb_up_to = 64

    def _matrices(self, like):
        W = self.kv_up_proj.weight.to(like.dtype).view(self.num_heads, -1, self.kv_lora_rank)
        return W[:, :self.qk_nope_head_dim], W[:, self.qk_nope_head_dim:]

    def expanded(self, q_nope, q_rope, c_kv, k_rope, pos):
        W_UK, W_UV = self._matrices(c_kv)
        k_nope = torch.einsum("bsr,hdr->bshd", c_kv, W_UK)
        v = torch.einsum("bsr,hdr->bshd", c_kv, W_UV)
        k_rope = k_rope[:, :, None].repeat(1, 1, self.num_heads, 1)
        return attend(torch.cat([q_rope, q_nope], -1), torch.cat([k_rope, k_nope], -1), v, pos)

    def absorbed(self, q_nope, q_rope, c_kv, k_rope, pos):
        return absorbed_attend(q_nope, q_rope, c_kv, k_rope, *self._matrices(c_kv), pos)

    def forward(self, x, pos, cache=None):
        q, kept = self.queries(x, pos), self.latents(x, pos)
        if cache is not None: kept = cache.update(*kept)
        few = x.shape[1] < min(kept[0].shape[1], self.absorb_up_to + 1)
        y = self.absorbed(*q, *kept, pos) if few else self.expanded(*q, *kept, pos)
        return self.dropout(self.o_proj(y.flatten(2)))
''')

WRONG = {
    "apply_rope": [
        ("keep the length", "a * cos - b * sin\n", "a * cos + b * sin\n"),
        ("+pos", "angle.cos(), angle.sin()", "angle.cos(), -angle.sin()"),
        ("interleaved=", "if interleaved:", "if not interleaved:"),
        ("theta", "rope_angles(pos, D, theta, wide.dtype)", "rope_angles(pos, D, dtype=wide.dtype)"),
        ("position", "rope_angles(pos,", "rope_angles(pos + 1,"),
        ("position 0", "b = wide[..., first], wide[..., second]", "b = wide[..., first], wide[..., first]"),
        ("bfloat16", "return y.to(x.dtype)", "return y"),
        ("float32", "rope_angles(pos, D, theta, wide.dtype)", "rope_angles(pos, D, theta, x.dtype)"),
        ("keep the length", "y = torch.empty_like(wide)", "y = wide"),
    ],
    "permute_rope": [
        ("interleaved=False", "if interleaved else half", "if not interleaved else half"),
        ("every row", "range(0, len(weight), head_dim)", "range(0, len(weight), len(weight))"),
        ("interleaved=True", "[half.index(i) for i in range(head_dim)]", "half"),
        ("even rows", "[*even, *odd]", "[*odd, *even]"),
        ("every row", "[*even, *odd]", "[*even, *even]"),
        ("copy", "return weight[order]", "weight[:] = weight[order]\n    return weight"),
    ],
    "RMSNorm": [
        ("gain", "self.weight * y", "y"),
        ("root-mean-square 1", "(wide * wide).mean(-1, keepdim=True)",
         "wide.var(-1, keepdim=True, correction=0)"),
        ("token", ".mean(-1, keepdim=True)", ".mean()"),
        ("eps", "+ self.eps)", ")"),
        ("eps", "keepdim=True) + self.eps)", "keepdim=True)) + self.eps"),
        ("float16", "x.to(torch.promote_types(x.dtype, torch.float32))", "x"),
        ("float16", ".to(x.dtype)", ".float()"),
        ("float64", "x.to(torch.promote_types(x.dtype, torch.float32))", "x.float()"),
        ("root-mean-square 1", ".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"),
        ("ones", "torch.ones(dim)", "torch.zeros(dim)"),
        ("named", "weight", "gain"),
    ],
    "SwiGLU": [
        ("silu", "gate * torch.sigmoid(gate) * up", "up * torch.sigmoid(up) * gate"),
        ("silu", "gate * torch.sigmoid(gate) * up", "torch.sigmoid(gate) * up"),
        ("silu", "gate * torch.sigmoid(gate) * up", "torch.relu(gate) * up"),
        ("named", "self.gate_proj = nn.Linear(dim, hidden, bias=False)",
         "self.gate_proj = nn.Linear(dim, hidden)"),
        ("dropout", "self.dropout(self.down_proj(gate * torch.sigmoid(gate) * up))",
         "self.down_proj(gate * torch.sigmoid(gate) * up)"),
        ("one by one", "self.dropout(self.down_proj(gate * torch.sigmoid(gate) * up))",
         "self.down_proj(gate * torch.sigmoid(gate) * up) * self.dropout(torch.ones(*x.shape[:-1], 1))"),
        ("must be down", "self.dropout(", "F.dropout(p=0.9, input="),
    ],
    "causal_mask": [
        ("own position", "<=", "<"),
        ("own position", "<=", ">="),
        ("positions count", "pos.unsqueeze(-1)", "torch.arange(pos.shape[-1]).unsqueeze(-1)"),
        ("(B, T, S)", "pos.unsqueeze(-1)", "pos.unsqueeze(-1).flatten(0, -2)"),
        ("dtype", "keys <= pos.unsqueeze(-1)", "(keys <= pos.unsqueeze(-1)).float()"),
    ],
    "attend": [
        ("see all", "masked_fill(~seen, float(\"-inf\"))", "masked_fill(seen, 0)"),
        ("keys 0", "weights = scores.masked_fill(~seen, float(\"-inf\")).softmax(-1)",
         "weights = scores.softmax(-1) * seen"),
        ("see all", "causal_mask(torch.arange(T) if T == S else pos, S)", "causal_mask(torch.arange(T), S)"),
        ("`pos` too", "torch.arange(T) if T == S else pos", "pos"),
        ("h // (H / H_kv)", "k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)",
         "k.repeat(1, 1, G, 1), v.repeat(1, 1, G, 1)"),
        ("/ sqrt(D)", "q.shape[-1] ** -0.5", "1.0"),
        ("given", "if scale is None: scale", "scale"),
        ("/ sqrt(D)", "scale = q.shape[-1] ** -0.5", "scale = v.shape[-1] ** -0.5"),
        ("keys", ".softmax(-1)", ".softmax(-2)"),
        ("overflow", ".softmax(-1)", ".exp()\n    weights = weights / weights.sum(-1, keepdim=True)"),
        ("each row", "seen = seen[:, None]", "seen = seen[0]"),
    ],
    "GroupedQueryAttention": [
        ("turned by RoPE", "q, k = apply_rope(q, pos, self.rope_theta), apply_rope(k, pos, self.rope_theta)",
         "q = apply_rope(q, pos, self.rope_theta)"),
        ("theta", "apply_rope(q, pos, self.rope_theta), apply_rope(k, pos, self.rope_theta)",
         "apply_rope(q, pos), apply_rope(k, pos)"),
        ("o_proj", "self.dropout(self.o_proj(y.flatten(-2)))", "self.dropout(y.flatten(-2))"),
        ("dropout", "self.dropout(self.o_proj(y.flatten(-2)))", "self.o_proj(y.flatten(-2))"),
        ("cache", "if cache is not None: k, v = cache.update(k, v)",
         "if cache is not None: cache.update(k, v)"),
        ("its own value", "if cache is not None",
         "v = apply_rope(v, pos, self.rope_theta)\n        if cache is not None"),
        ("o_proj", "y.flatten(-2)", "y.transpose(2, 3).flatten(-2)"),
    ],
    "absorbed_attend": [
        ("1/sqrt", "(d_nope + d_rope) ** -0.5", "d_nope ** -0.5"),
        ("k_rope", "beta=scale", "beta=0"),
        ("W_UV", "torch.einsum(\"bthr,hdr->bthd\", y_latent, W_UV)",
         "torch.einsum(\"bthr,hdr->bthd\", y_latent, -W_UV)"),
        ("keys 0", "masked_fill(~seen[..., None, :], float(\"-inf\"))",
         "masked_fill(~seen[..., None, :], 0)"),
        ("`pos` too", "pos if T < S else torch.arange(T, device=pos.device)", "pos"),
        ("keys 0", "causal_mask(pos if T < S else", "causal_mask(pos + 1 if T < S else"),
        ("k_rope", "torch.bmm(q_rope.flatten(1, 2), k_rope.mT)",
         "torch.bmm(q_rope.flatten(1, 2), k_rope.mT.flip(-1))"),
    ],
    "MultiHeadLatentAttention": [
        ("stage 1", "return q_nope, apply_rope(q_rope, pos, self.rope_theta)", "return q_nope, q_rope"),
        ("stage 1", "self.q_up_proj(self.q_norm(self.q_down_proj(x)))",
         "self.q_up_proj(self.q_down_proj(x))"),
        ("stage 2", "return self.kv_norm(c_kv), k_rope[:, :, 0]", "return c_kv, k_rope[:, :, 0]"),
        ("stage 2", "return self.kv_norm(c_kv), k_rope[:, :, 0]", "return self.kv_norm(c_kv), k_rope"),
        ("stage 3", "torch.cat([q_nope, q_rope], dim=-1), k, v", "torch.cat([q_rope, q_nope], dim=-1), k, v"),
        ("stage 4", "absorbed_attend(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, pos)",
         "absorbed_attend(q_nope, q_rope, c_kv, k_rope, W_UK, -W_UV, pos)"),
        ("build no key", "self.absorbed if T < S and T <= self.absorb_up_to else self.expanded",
         "self.expanded"),
        ("on a memory", "c_kv, k_rope = cache.update(c_kv, k_rope)", "cache.update(c_kv, k_rope)"),
        ("dropout", "self.dropout(self.o_proj(y.flatten(-2)))", "self.o_proj(y.flatten(-2))"),
    ],
    "LayerCache": [
        ("all tokens", "tuple(store[:, :end] for", "tuple(store[:, start:end] for"),
        ("all tokens", "store[:, start:end] = x.detach()", "store[:, :T] = x.detach()"),
        ("advance", "return tuple", "self.cache.length = end\n        return tuple"),
        ("views", "store[:, :end] for", "store[:, :end].clone() for"),
        ("graph", "tuple(store[:, :end] for store in self.stores)",
         "tuple(torch.cat([s[:, :start], x], 1) for s, x in zip(self.stores, new))"),
        ("batch of 1", "if x.shape != wanted", "if x.shape[1:] != wanted[1:]"),
        ("more tokens", "self.cache.end_after(T)", "min(start + T, self.cache.max_length)"),
        ("nothing be written", "            if x.shape != wanted", "            if x.shape == wanted: "
         "store[:, start:end] = x.detach()\n            if x.shape != wanted"),
    ],
    "Cache": [
        ("max_length", "self.length + T > self.max_length", "self.length + T >= self.max_length"),
        ("add to length", "self.length = self.end_after(T)", "self.length = T"),
        ("refused", "self.length = self.end_after(T)", "self.length += T"),
        ("every slot", "sum(store.nbytes for store in self.stores)", "self.stores[0].nbytes"),
        ("forget", "def reset(self): self.length = 0", "def reset(self): self.stores[0].zero_()"),
        ("change nothing", "        return self.length + T",
         "        self.length += T\n        return self.length"),
        ("layer i", "LayerCache(self, i)", "LayerCache(self, 0)"),
    ],
    "Block": [
        ("x + attention", " + x\n", "\n"),
        ("norm(x)", "self.attention(self.attention_norm(x), pos, cache)", "self.attention(x, pos, cache)"),
        ("norm(x)", "self.attention(self.attention_norm(x), pos, cache) + x",
         "self.attention_norm(self.attention(x, pos, cache) + x)"),
        ("norm", "self.feedforward(self.feedforward_norm(y))", "self.feedforward(self.attention_norm(y))"),
        ("cache", "self.attention_norm(x), pos, cache)", "self.attention_norm(x), pos)"),
        ("keep_last", "y = y[:, y.shape[1] - keep_last:]", "y = y[:, :keep_last]"),
        ("named", "self.feedforward_norm = RMSNorm(config.embedding_dim, config.norm_eps)",
         "self.feedforward_norm = self.attention_norm"),
    ],
    "init_weights": [
        ("sqrt(2 L)", "(2 * len(model.blocks))", "len(model.blocks)"),
        ("sqrt(2 L)", "or name.endswith(\"feedforward.down_proj.weight\")", ""),
        ("gains", "if p.ndim == 1: continue", "pass"),
        ("given", "small if writer else std)", "small if writer else 0.02)"),
        ("0.02", "small if writer else std)", "small)"),
    ],
    "lm_loss": [
        ("mean", ").mean()", ").sum()"),
        ("-100", "counted = targets != -100",
         "counted = targets >= -100\n    targets = targets.clamp(min=0)"),
        ("overflow", "logits.logsumexp(-1)", "logits.exp().sum(-1).log()"),
        ("float32", "logits = logits.to(torch.promote_types(logits.dtype, torch.float32))", "pass"),
        ("gradients", "logits = hidden @ weight.T", "logits = hidden @ weight.detach().T"),
        ("float64", "logits.to(torch.promote_types(logits.dtype, torch.float32))", "logits.float()"),
    ],
    "LanguageModel.hidden": [
        ("the last norm", "return self.norm(x)", "return x"),
        ("chunk after chunk", "cache.advance(tokens.shape[1])", "pass"),
        ("chunk after chunk", "cache.layer(i) if", "cache.layer(0) if"),
        ("keep_last", "keep_last if last else None", "keep_last"),
        ("pos", "positions(tokens, pos, cache,", "positions(tokens, None, cache,"),
        ("dropout", "self.dropout(self.embedding(tokens))", "self.embedding(tokens)"),
        ("keep_last", "keep_last if last else None", "None"),
    ],
}
