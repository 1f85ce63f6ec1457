"""A GPT with softmax, differential or selective attention; needs torch and transformers alone.

Copied as it is into every folder that evals/export.py writes, and loaded from there by

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Documents: an end-of-text id in `input_ids` opens a new one, and attention stays within it.
Padding: `attention_mask` alone, on either side. Positions are rotary, so that it does not matter
where in its row a sequence starts, or learned ("gpt2"), and then they count what is not padding.
What is computed in fp32 here is so in training, too.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_nca import NCAConfig


def norm(x):
    """x / RMS(x) over the last dimension, no gain."""
    return F.rms_norm(x, (x.size(-1),))


def inverse_rms(x32):
    """1 / RMS(x) [..., 1], fp32."""
    return (x32.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()


def norm_and_kept(x):
    """norm(x), and x made of it again: what the trainer keeps of its residual stream. In fp32 it is
    x but for the last bit; in bfloat16 it is rounded once more."""
    x32 = x.float()
    root = inverse_rms(x32)
    h = (x32 * root).to(x.dtype)
    return h, (h / root).to(x.dtype)


def rotary_table(start, length, dim, kind):
    """cos, sin [length, 1, dim / 2] of positions start, start + 1, ...: pairs are (j, j + dim / 2).

    "half": dim / 4 frequencies from 1 to 1/1024 radians a token, the other pairs stand still;
    "full": base 10,000. In fp64 on the CPU: in fp32 far positions are wrong, and no buffer of a
    custom model survives from_pretrained unaided.
    """
    if kind == "half":
        n = dim // 4
        freq = (1 / 1024) ** (torch.arange(n, dtype=torch.float64) / max(1, n - 1))
        freq = torch.cat([freq, freq.new_zeros(dim // 2 - n)])
    else:
        freq = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(start, start + length, dtype=torch.float64)[:, None, None] * freq
    return angle.cos().float(), angle.sin().float()


def rotate(x, table, normed=False):
    """RoPE on x [B, T, H, D], or on norm(x), computed in fp32 and rounded once."""
    cos, sin = table
    x32 = x.float()
    a, b = x32.chunk(2, dim=-1)
    y = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
    return (y * inverse_rms(x32) if normed else y).to(x.dtype)


def before(x):
    """x [B, T, ...] of the token before; the first of a row keeps its own."""
    return torch.cat([x[:, :1], x[:, :-1]], dim=1)


def offset_keys(k, starts):
    """k [B, H, S, D] with the dimensions that half RoPE leaves alone taken from the token before,
    where there is one."""
    still = torch.arange(k.size(-1), device=k.device) // (k.size(-1) // 4) % 2 == 1
    earlier = before(k.transpose(1, 2)).transpose(1, 2)
    return torch.where(still & ~starts[:, None, :, None], earlier, k)


def reach(cache, slot):
    """Gives the cache a layer `slot`, where it has none yet."""
    while len(cache.layers) <= slot:
        cache.layers.append(DynamicLayer())


class Rows:
    """The T tokens of this call beside all S that the cache and they make: who sees whom.

    documents: [B, S] running number; real: [B, S] False at padding; tokens: [B, S] ids.
    """

    def __init__(self, documents, marks, length):
        self.documents, self.length, self.masks = documents, length, {}
        self.real, self.tokens = marks[..., 0] != 0, marks[..., 1]

    @classmethod
    def of(cls, input_ids, attention_mask, end_of_text, cache, slot):
        """Adds the call's tokens to the cache's `slot`, as whatever reorders, selects or crops a
        cache does it to all its layers."""
        length = input_ids.size(1)
        starts = (input_ids == end_of_text).long()
        real = torch.ones_like(starts)
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.size(1) < length:
                raise ValueError(
                    f"attention_mask {tuple(attention_mask.shape)} must be [batch, tokens], 0 at "
                    "padding; documents are what end-of-text ids separate"
                )
            real = (attention_mask[:, -length:] != 0).long()
        documents, marks = starts.cumsum(1), torch.stack([real, input_ids], dim=-1)
        if cache is not None:
            reach(cache, slot)
            if cache.get_seq_length(slot):
                documents = documents + cache.layers[slot].keys[:, 0, -1].to(documents.device)
            documents, marks = cache.update(documents[:, None, :, None], marks[:, None], slot)
            documents, marks = documents[:, 0, :, 0], marks[:, 0]
        return cls(documents, marks, length)

    @classmethod
    def held(cls, cache, slot, length):
        """Those of a call that has added its tokens to the cache."""
        layer = cache.layers[slot]
        return cls(layer.keys[:, 0, :, 0], layer.values[:, 0], length)

    @property
    def starts(self):
        """[B, S] bool: tokens that no real one of their document comes before."""
        other = (self.documents != before(self.documents)) | ~before(self.real)
        other[:, 0] = True
        return other

    def pairs(self):
        """(starts, the token before or 0 there) of the call's tokens, [B, T] each."""
        starts = self.starts
        last = before(self.tokens).masked_fill(starts, 0)
        return starts[:, -self.length :], last[:, -self.length :]

    def triples(self):
        """`pairs`; then the same of the token before that: True and 0 where a document has not two
        before."""
        starts = self.starts
        early = starts | before(starts)
        last = before(self.tokens).masked_fill(starts, 0)
        second = before(last).masked_fill(early, 0)
        return tuple(t[:, -self.length :] for t in (starts, last, early, second))

    @property
    def positions(self):
        """[B, T] number of real tokens before each, in its row."""
        return (self.real.long().cumsum(1) - 1).clamp(min=0)[:, -self.length :]

    def mask(self, window, second_window, heads, each=1):
        """Bool [B, 1 or heads, T, S]: causal, same document, real, within the window. A token sees
        itself, padding too: a softmax over nothing is NaN, and NaN spreads through v. each: of rows
        that have every token so many times, [B, 1 or heads, each T, each S]."""
        key = (window, second_window, heads if second_window else 1, each)
        if key not in self.masks:
            documents, real = (
                t.repeat_interleave(each, dim=1) for t in (self.documents, self.real)
            )
            total, length = documents.size(1), each * self.length
            at = torch.arange(total, device=documents.device, dtype=torch.int32)
            back = at[total - length :, None] - at
            same = documents[:, -length:, None] == documents[:, None, :]
            seen = (same & real[:, None, :] & (back > 0))[:, None]
            near = back < window
            if second_window:
                pair = torch.stack([near, near & (back < second_window)])
                near = pair.repeat(heads // 2, 1, 1)
            self.masks[key] = (seen & near) | (back == 0)
        return self.masks[key]


class Softmax(nn.Module):
    """The attention of one block with all that the arms share; subclasses combine two maps."""

    each = 1  # times that a row has a token

    def __init__(self, config, block, slot):
        super().__init__()
        self.spec, self.slot, d = config.blocks[block]["attention"], slot, config.hidden_size
        self.qk_norm, spec, bias = config.qk_norm, self.spec, config.bias
        self.q = nn.Linear(d, spec["query_heads"] * spec["key_dim"], bias=bias)
        self.k = nn.Linear(d, spec["key_heads"] * spec["key_dim"], bias=bias)
        self.v = nn.Linear(d, spec["value_heads"] * spec["value_dim"], bias=bias)
        self.o = nn.Linear(spec["heads"] * spec["value_dim"], d, bias=bias)
        self.gate = nn.Linear(12, spec["heads"], bias=False) if config.gate else None
        self.xsa = nn.Parameter(torch.zeros(spec["heads"])) if config.xsa else None
        mixes = spec["value_table"] is not None
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if mixes else None
        gated = mixes and config.value_gate
        self.value_gate = nn.Linear(12, spec["value_heads"], bias=False) if gated else None

    def project(self, x, tables, rotary):
        """q, k [B, T, H, key_dim], normed and rotated; v [B, T, H, value_dim], table mixed in."""
        spec = self.spec
        q, k = (f(x).unflatten(-1, (-1, spec["key_dim"])) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, spec["value_dim"]))
        if rotary:
            q, k = (self.turn(t, rotary[spec["key_dim"], self.each]) for t in (q, k))
        elif self.qk_norm:
            q, k = norm(q), norm(k)
        if self.value_mix is not None:
            extra = tables[spec["value_table"]][..., : self.v.out_features].view_as(v)
            if self.value_gate is not None:
                extra = extra * (2 * torch.sigmoid(self.value_gate(x[..., :12])))[..., None]
            c = self.value_mix.to(v.dtype)
            v = c[0] * v + c[1] * extra
        return q, k, v

    def turn(self, x, table):
        """x [B, T, H, D], normed and in position."""
        return rotate(x, table, self.qk_norm)

    def selected(self, q, k, rows, end):
        """What q [B, 1, T, D], the queries up to `end`, take from each of all keys k [B, 1, S, D]:
        [B, 1, T, S], fp32. Only what is real takes, and never from itself, from what comes later,
        from another document or from a document's first token."""
        at = torch.arange(k.size(2), device=k.device)
        by = slice(end - q.size(2), end)
        takes = (at[by, None] > at) & (rows.documents[:, by, None] == rows.documents[:, None])
        takes = takes & rows.real[:, by, None] & ~rows.starts[:, None]
        scores = torch.where(takes[:, None], F.relu(q @ k.mT), 0.0)
        return scores.float() * self.spec["scale"]

    def masks(self, q, k, rows, cache):
        """F [B, 1, T, S]: what the queries before each of q [B, 1, T, D] took from k [B, 1, S, D].

        The cache holds, beside the keys, all that was taken from each and the queries that took it:
        where the cache was cropped since, the sum is made anew.
        """
        past, old = q.new_zeros(*k.shape[:3], dtype=torch.float32), k.size(2) - q.size(2)
        now = self.selected(q, k, rows, k.size(2))
        masks = torch.cat([torch.zeros_like(now[:, :, :1]), now[:, :, :-1]], dim=2).cumsum(2)
        if cache is None:
            return masks
        slot = self.slot + 1
        before_, queries = cache.update(past[:, :, old:, None], q, slot)
        layer = cache.layers[slot]
        if old and getattr(layer, "counted", old) != old:
            past = self.selected(queries[:, :, :old].to(k.dtype), k, rows, old).sum(2)
        else:
            past = before_[..., 0]
        masks = masks + past[:, :, None]
        layer.keys = (masks[:, :, -1] + now[:, :, -1])[..., None]
        layer.counted = k.size(2)
        return masks

    def attend(self, q, k, v, rows, windows, masks=None):
        """q [B, T, H, D] on k, v [B, H, S, D] -> [B, T, H, Dv]; query head n reads k and v head
        n // (H / heads of k or v). masks [B, 1, T, S] are taken from every head's scores."""
        spec, heads = self.spec, q.size(2)
        mask = rows.mask(windows[spec["window"]], spec["second_window"], heads, self.each)
        if masks is not None:
            mask = torch.where(mask, -masks.to(q.dtype), -torch.inf)
        # By hand: with enable_gqa and a mask, CUDA is left with the kernel that keeps all scores.
        k, v = (t.repeat_interleave(heads // t.size(1), dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, scale=spec["scale"])
        return y.transpose(1, 2)

    def combine(self, x, y):
        """The heads' outputs y [B, T, query_heads, Dv] -> [B, T, heads, Dv]."""
        return y

    def forward(self, x, tables, rotary, rows, windows, cache):
        q, k, v = self.project(x, tables, rotary)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.slot)
        if self.spec["key_offset"]:
            keys = offset_keys(keys, rows.starts)
        masks = None
        if self.spec["selectors"]:
            masks = self.masks(q[:, :, :1].transpose(1, 2), keys[:, :1], rows, cache)
        y = self.combine(x, self.attend(q, keys, values, rows, windows, masks))
        if self.xsa is not None:
            v = v.repeat_interleave(y.size(2) // v.size(2), dim=2)
            along = (y * v).sum(-1, keepdim=True) / ((v * v).sum(-1, keepdim=True) + 1e-6)
            y = y - torch.tanh(self.xsa.to(y.dtype))[:, None] * along * v
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))[..., None]
        return self.o(y.flatten(2))


class Paired(Softmax):
    """Heads i and i + heads / 2 are one on a row of twice the length: a token's query and key of
    the first, then those of the second. The cache has them by token, as everywhere."""

    each = 2

    @staticmethod
    def joined(x):
        """[B, T, H, D] -> [B, 2 T, H / 2, D]."""
        return x.unflatten(2, (2, -1)).flatten(1, 2)

    @staticmethod
    def parted(x):
        """[B, 2 T, H / 2, D] -> [B, T, H, D]."""
        return x.unflatten(1, (-1, 2)).flatten(2, 3)

    def turn(self, x, table):
        return self.parted(rotate(self.joined(x), table, self.qk_norm))

    def attend(self, q, k, v, rows, windows, masks=None):
        k, v = (self.joined(t.transpose(1, 2)).transpose(1, 2) for t in (k, v))
        return self.parted(super().attend(self.joined(q), k, v, rows, windows))


class DiffV2(Softmax):
    """a1 - sigmoid(lambda(x)) a2, both maps on the same keys and values; heads 2i, 2i + 1 pair."""

    def __init__(self, config, block, slot):
        super().__init__(config, block, slot)
        self.lam = nn.Linear(config.hidden_size, self.spec["heads"])

    def combine(self, x, y):
        a1, a2 = y.unflatten(2, (-1, 2)).unbind(3)
        return a1 - torch.sigmoid(self.lam(x))[..., None] * a2


class DiffV1(Softmax):
    """RMSnorm(a1 - lambda a2) (1 - lambda_init), lambda a scalar of four vectors (2410.05258)."""

    def __init__(self, config, block, slot):
        super().__init__(config, block, slot)
        self.lambda_qk = nn.Parameter(torch.zeros(4, self.spec["key_dim"]))  # q1, k1, q2, k2
        self.head_gain = nn.Parameter(torch.ones(self.spec["value_dim"]))

    def combine(self, x, y):
        start = self.spec["lambda_init"]
        q1, k1, q2, k2 = self.lambda_qk.float().unbind(0)
        lam = torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + start
        a1, a2 = y.float().unflatten(2, (-1, 2)).unbind(3)
        y = F.rms_norm(a1 - lam * a2, (y.size(-1),), self.head_gain.float(), eps=1e-5)
        return (y * (1 - start)).to(x.dtype)


ARMS = {
    **{"softmax": Softmax, "selective": Softmax, "paired": Paired},
    **{"diff_v1": DiffV1, "diff_v2": DiffV2},
}


class LayerNorm(nn.LayerNorm):
    """In fp32, whatever the weights' dtype."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    def forward(self, x):
        return norm(x)


def make_norm(config):
    return LayerNorm(config.hidden_size) if config.family == "gpt2" else RMSNorm()


class MLP(nn.Module):
    """relu(x W1)^2 W2, or GPT-2's tanh form of GELU between the two."""

    def __init__(self, config, block):
        super().__init__()
        self.gelu = config.family == "gpt2"
        d, width, bias = config.hidden_size, config.blocks[block]["mlp"], config.bias and self.gelu
        self.up, self.down = nn.Linear(d, width, bias), nn.Linear(width, d, bias)

    def forward(self, x):
        x = self.up(x)
        return self.down(F.gelu(x, approximate="tanh") if self.gelu else F.relu(x).square())


class NCABlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, block, slot):
        super().__init__()
        spec = config.blocks[block]["attention"]
        self.norm_attn = make_norm(config) if spec else None
        self.attn = ARMS[spec["arm"]](config, block, slot) if spec else None
        self.norm_mlp, self.mlp = make_norm(config), MLP(config, block)

    def forward(self, x, *context):
        if self.attn is not None:
            h, x = self.branch(self.norm_attn, x)
            x = x + self.attn(h, *context)
        h, x = self.branch(self.norm_mlp, x)
        return x + self.mlp(h)

    def branch(self, norm_of, x):
        """What attention or MLP read of x, and what their output is added to."""
        if isinstance(norm_of, RMSNorm):
            return norm_and_kept(x)
        return norm_of(x).to(self.mlp.up.weight.dtype), x


class Smear(nn.Module):
    """e + s sigmoid(w . e[:12]) x the embedding of the token before."""

    def __init__(self):
        super().__init__()
        self.gate, self.share = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(1))

    def forward(self, e, earlier, starts):
        gate = torch.sigmoid(F.linear(e[..., :12], self.gate[None]))
        return e + torch.where(starts[..., None], 0.0, gate * self.share) * earlier


class Ngram(nn.Module):
    """A table of embeddings for pairs of tokens and, its second half, for triples, with a row of
    random signs for each. It is a buffer and no parameter: training leaves it as it is."""

    def __init__(self, config):
        super().__init__()
        d, dtype = config.hidden_size, getattr(torch, config.ngram_dtype)
        self.scale = nn.Parameter(torch.zeros(len(config.blocks)))
        self.register_buffer("table", torch.zeros(config.ngram, d, dtype=dtype))
        self.register_buffer("signs", torch.ones(8192, d, dtype=torch.int8))

    def forward(self, x, starts, y, early, z, dtype):
        """x [B, T] ids, and what `Rows.triples` has of them -> [B, T, d]."""
        half = self.table.size(0) // 2
        pair = (x * 36_313) ^ (y * 27_191)
        triple = (x * 17_351) ^ (y * 60_961) ^ (z * 45_259)
        row = torch.where(starts, half - 1, pair % (half - 1))
        row3 = torch.where(early, half - 1, triple % (half - 1))
        sign = (x * 52_711) ^ (y * 39_119)
        sign3 = (x * 48_611) ^ (y * 21_379) ^ (z * 57_241)
        e = F.embedding(torch.stack([row, half + row3], dim=-1), self.table).to(dtype)
        signs = self.signs[torch.stack([sign, sign3], dim=-1) // 256 % 8192]
        return (e * signs).sum(-2)


COPY_DIM = 128
COPY_PIECE = 1024  # rows of logits that are mixed at once, for less memory


class Pointer(nn.Module):
    """p(y) = p_lm(y) (1 - a (1 - s)) + a c(y): a softmax over the last tokens of the document and a
    sink gives c, its weight on tokens y, and s, that on the sink; a is a gate."""

    def __init__(self, config, slot):
        super().__init__()
        self.slot, d = slot, config.hidden_size
        self.q, self.k = (nn.Linear(d, COPY_DIM, bias=False) for _ in range(2))
        self.copy_gain, self.copy_sink = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.copy_gate, self.copy_bias = (nn.Parameter(torch.zeros(n)) for n in (d, 1))

    def forward(self, logits, h, some, rows, band, cache):
        """logits [B, n, V] of the positions `some` of h [B, T, d] -> log p [B, n, V]."""
        q, k = norm(self.q(h[:, some])), norm(self.k(h))[:, None]
        own = (self.copy_gain, self.copy_sink, self.copy_gate, self.copy_bias)
        gain, sink, gate, bias = (p.float() for p in own)
        q = q * (gain * (15.36 / COPY_DIM)).to(q.dtype)
        if cache is not None:
            reach(cache, self.slot)
            k, _ = cache.update(k, k[..., :0], self.slot)
        seen = rows.mask(band, None, 1)[:, 0][:, some]
        scores = (q.float() @ k[:, 0].float().mT).masked_fill(~seen, -torch.inf)
        gate = h[:, some].float() @ gate + bias
        total, log_a = torch.logaddexp(scores.logsumexp(-1), sink), F.logsigmoid(gate)
        kept = torch.logaddexp(F.logsigmoid(-gate), log_a + sink - total)
        weight = torch.exp(scores + (log_a - total)[..., None])
        where = rows.tokens[:, None].expand_as(weight)
        pieces = (t.flatten(0, 1).split(COPY_PIECE) for t in (logits, kept, weight, where))
        return torch.cat([self.mixed(*part) for part in zip(*pieces)]).view_as(logits)

    @staticmethod
    def mixed(logits, kept, weight, where):
        copied = torch.zeros_like(logits).scatter_add(1, where, weight)
        # The log of 0 has no gradient.
        copied = copied.clamp(min=torch.finfo(copied.dtype).tiny).log()
        return torch.logaddexp(logits.log_softmax(-1) + kept[:, None], copied)


class NCAPreTrainedModel(PreTrainedModel):
    config_class = NCAConfig
    base_model_prefix = "model"
    _no_split_modules = ("NCABlock",)
    _supports_sdpa = True
    # The trainer computes with these in fp32; together they are a few thousand numbers.
    _keep_in_fp32_modules_strict = (
        *("lambda_qk", "head_gain", "residual_mix", "norm_attn", "norm_mlp", "norm_out"),
        *("copy_gain", "copy_sink", "copy_gate", "copy_bias"),
    )


class NCAModel(NCAPreTrainedModel):
    """Everything up to the head."""

    def __init__(self, config):
        super().__init__(config)
        d, self.gpt2 = config.hidden_size, config.family == "gpt2"
        self.embed = nn.Embedding(config.vocab_size, d)
        # Of the cache: attention has one, selective attention two, documents the last, behind which
        # is the copy head's.
        slots, self.slot = [], 0
        for block in config.blocks:
            slots.append(self.slot)
            spec = block["attention"]
            self.slot += 0 if spec is None else 2 if spec["selectors"] else 1
        self.blocks = nn.ModuleList(NCABlock(config, i, slot) for i, slot in enumerate(slots))
        self.norm_out = make_norm(config)
        specs = [b["attention"] for b in config.blocks if b["attention"]]
        self.turns = {(spec["key_dim"], ARMS[spec["arm"]].each) for spec in specs}
        if self.gpt2:
            self.position = nn.Embedding(config.max_position_embeddings, d)
        else:
            self.residual = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(len(slots), 1))
            self.residual_mix = nn.Parameter(torch.tensor([-1.5, 0.5]))  # skip, backout
        self.values = nn.ModuleList(nn.Embedding(config.vocab_size, w) for w in config.value_tables)
        self.smear = Smear() if config.smear else None
        self.ngram = Ngram(config) if config.ngram else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def embedded(self, input_ids, rows):
        """[B, T, d]: fp32 in GPT-2, whose residual stream is."""
        x = self.embed(input_ids)
        if self.smear is not None:
            starts, last = rows.pairs()
            x = self.smear(x, self.embed(last), starts)
        if not self.gpt2:
            return norm(x)
        if rows.documents.size(1) > self.position.num_embeddings:
            raise ValueError(
                f"{rows.documents.size(1)} tokens: this model has learned "
                f"{self.position.num_embeddings} positions"
            )
        return x.float() + self.position(rows.positions).float()

    def rotary(self, start, length, device):
        """{(head dimension, times that a row has a token): (cos, sin)} for the call's positions; {}
        without RoPE."""
        kind, out = self.config.rotary, {}
        for dim, each in self.turns if kind else ():
            table = rotary_table(each * start, each * length, dim, kind)
            out[dim, each] = tuple(t.to(device) for t in table)
        return out

    def check(self, input_ids, inputs_embeds, cache):
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: documents and value embeddings are looked up by them")
        if cache is not None and cache.is_compileable:
            raise ValueError("static caches are not supported: leave out cache_implementation")

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """input_ids [B, T]; attention_mask [B, T] or with what the cache holds, 0 at padding."""
        config, cache = self.config, past_key_values
        self.check(input_ids, inputs_embeds, cache)
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        start = 0 if cache is None else cache.get_seq_length(self.slot)
        rows = Rows.of(input_ids, attention_mask, config.eos_token_id, cache, self.slot)
        rotary = self.rotary(start, input_ids.size(1), input_ids.device)
        tables = [table(input_ids) for table in self.values]
        x = x0 = self.embedded(input_ids, rows)
        if self.ngram is not None:
            pairs = self.ngram(input_ids, *rows.triples(), x.dtype)
        states = [x]  # [i + 1]: the output of block i
        for i, block in enumerate(self.blocks):
            if config.skip and i == config.skip[1]:
                x = x + torch.sigmoid(self.residual_mix[0]).to(x.dtype) * states[config.skip[0] + 1]
            if config.x0:
                a, b = self.residual[i].to(x.dtype)
                x = a * x + b * x0 if i else (a + b) * x
            if self.ngram is not None:
                x = x + self.ngram.scale[i].to(x.dtype) * pairs
            x = block(x, tables, rotary, rows, config.windows, cache)
            states.append(x)
        if config.backout >= 0:
            x = x - self.residual_mix[1].to(x.dtype) * states[config.backout + 1]
        x = self.norm_out(x).to(self.embed.weight.dtype)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,
        )


class NCAForCausalLM(NCAPreTrainedModel, GenerationMixin):
    """The model with its head: logits fp32, over the vocabulary without the trainer's padding; with
    a copy head log-probabilities of the mixture, which another softmax leaves as they are."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012 - where tied

    def __init__(self, config):
        super().__init__(config)
        self.model = NCAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.pointer = Pointer(config, self.model.slot + 1) if config.copy_band else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """labels [B, T]: input_ids, or -100 where the loss, in nats, does not count.
        logits_to_keep: the last n positions (0: all), or their indices."""
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        some = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h, cache, slot = out.last_hidden_state, out.past_key_values, self.model.slot
        z, cap = self.lm_head(h[:, some]).float(), self.config.softcap
        if cap:  # c sigmoid(4 z / c), or top sigmoid((z + shift) / width)
            top, shift, width = (cap, 0.0, cap / 4) if isinstance(cap, (int, float)) else cap
        logits = top * torch.sigmoid((z + shift) * (1 / width)) if cap else z
        if self.pointer is not None:
            if cache is None:
                ids = (input_ids, attention_mask, self.config.eos_token_id)
                rows = Rows.of(*ids, None, slot)
            else:
                rows = Rows.held(cache, slot, h.size(1))
            logits = self.pointer(logits, h, some, rows, self.config.copy_band, cache)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=out.hidden_states,
        )
