"""The ideas that a config field turns on: each against loops written from its equations, causal and
within its document, nothing where it is off, and a short run that learns."""

from __future__ import annotations

import helpers as H
import pytest
import torch

from records.causality import check_causal

T = H.T
VOCAB = 64
SMALL = {
    **{"n_layer": 4, "d_model": 32, "n_head": 2, "head_dim": 16, "vocab": VOCAB},
    **{"long_layers": (0, 3), "no_attention": (), "skip": (), "backout": -1, "value_tables": 1},
}
# What a config says to have an idea, and nothing else.
IDEAS = {
    "bigram": {"bigram": 128},
    "bigram signs": {"bigram": 128, "bigram_dim": 16},
    "key offset": {"key_offset": True},
    "smear": {"smear": True},
}
# Without a parameter that starts as a no-op.
ACTS_AT_ONCE = {"key offset"}


def build(random: bool = True, **changes) -> T.GPT:
    cfg = T.make_config("speedrun", **{**SMALL, "require_gpu": False, **changes})
    assert not T.check_config(cfg)
    model = T.GPT(cfg.model, 64)
    T.init_parameters(model, 0)
    if random:
        H.randomise(model)
    return model


def rows_of_text(length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens, all different, and documents [2, T]: one that starts at once, one of a single token,
    and a row that starts in the middle of a document (number 0)."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(VOCAB, generator=gen)[: 2 * length].view(2, length).int()
    first = torch.zeros(2, length, dtype=torch.int32)
    first[0, [0, 4, 5]] = 1
    first[1, 7] = 1
    return tokens, first.cumsum(1).int()


def window(long: int = 64, short: int = 64) -> torch.Tensor:
    return torch.tensor([long, short], dtype=torch.int32)


def opens(docs, b: int, t: int) -> bool:
    return t == 0 or bool(docs[b, t] != docs[b, t - 1])


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("idea", IDEAS)
@pytest.mark.parametrize("arm", ["softmax", "diff_v2"])
def test_causal_and_within_the_document(idea, arm):
    check_causal(arm, IDEAS[idea])


@pytest.mark.parametrize("idea", [i for i in IDEAS if i not in ACTS_AT_ONCE])
def test_starts_as_nothing(idea):
    """At init the logits are those without it, and parameters that both have start the same; so
    whatever the idea brings has been learned."""
    tokens, docs = rows_of_text()
    with_it, without = build(False, **IDEAS[idea]), build(False)
    mine = dict(with_it.named_parameters())
    for name, p in without.named_parameters():
        if name in mine and mine[name].shape == p.shape:
            assert torch.equal(mine[name], p), name
    assert torch.equal(with_it(tokens, docs, window()), without(tokens, docs, window()))


@pytest.mark.parametrize("idea", IDEAS)
def test_every_parameter_has_a_group_and_learns(idea, text_data, tmp_path):
    """Eight steps on text: the loss falls, and each new parameter has moved by then."""
    start = build(False, **{**IDEAS[idea], "vocab": H.BYTE_VOCAB})
    new = set(dict(start.named_parameters())) - set(dict(build(False).named_parameters()))
    cfg = H.tiny(text_data, tmp_path, **IDEAS[idea], seed=0)
    trainer = T.Trainer(cfg)
    fresh = {n: p.detach().clone() for n, p in trainer.new_model().named_parameters()}
    trainer.run()
    losses = H.losses(trainer.folder)
    assert losses[-1] < losses[0] - 0.5, losses
    groups = T.parameter_groups(cfg.optim)
    for name, p in trainer.model.named_parameters():
        assert T.group_of(name, p) in groups
        if name in new:
            assert not torch.equal(p, fresh[name]), name


# ---- bigram -------------------------------------------------------------------------------------


def naive_pairs(model, tokens, docs) -> torch.Tensor:
    """What record 62 (and 83) says, pair by pair, in Python's integers."""
    table, rows = model.bigram.table, model.bigram.table.size(0)
    out = torch.zeros(*tokens.shape, table.size(1))
    for b in range(tokens.size(0)):
        for t in range(tokens.size(1)):
            now = int(tokens[b, t])
            last = 0 if opens(docs, b, t) else int(tokens[b, t - 1])
            row = ((36_313 * now) ^ (27_191 * last)) % (rows - 1)
            e = table[rows - 1 if opens(docs, b, t) else row]
            if hasattr(model.bigram, "signs"):
                e = e * model.bigram.signs[(last ^ now) % 8192]
            out[b, t] = e
    return out


@pytest.mark.parametrize("dim", [0, 16])
def test_bigram_rows(dim):
    model, (tokens, docs) = build(bigram=192, bigram_dim=dim), rows_of_text()
    got = model.bigram(tokens, T.starts_of(docs), torch.float32)
    assert torch.equal(got, naive_pairs(model, tokens, docs))


def test_bigram_joins_every_block():
    """A block's input has its share of the pair on top: here the blocks and x0 do nothing."""
    model, (tokens, docs) = build(bigram=192, bigram_dim=16), rows_of_text()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.weight.zero_(), block.mlp.down.weight.zero_()
        model.resid.copy_(torch.tensor([1.0, 0.0]))
    x = T.norm(model.embed[tokens.long()])
    x[..., :16] += model.bigram.scale.sum() * naive_pairs(model, tokens, docs)
    torch.testing.assert_close(model(tokens, docs, window()), T.norm(x), rtol=1e-5, atol=1e-5)


def test_bigram_hash_of_the_largest_gpt2_tokens_fits_32_bits():
    """The record computes it in int32; ours, in int64, is the same number."""
    top = 50_256
    assert 36_313 * top < 2**31 and 27_191 * top < 2**31


def test_signs_are_fair_and_kept():
    model = build(bigram=128, bigram_dim=16)
    signs = model.bigram.signs
    assert set(signs.unique().tolist()) == {-1, 1} and abs(float(signs.float().mean())) < 0.02
    assert torch.equal(build(bigram=128, bigram_dim=16).bigram.signs, signs)
    assert "bigram.signs" in model.state_dict()


# ---- key offset ---------------------------------------------------------------------------------


def test_key_offset_moves_what_stands_still():
    """By position and dimension: the dimensions that RoPE does not turn, found by turning them."""
    _, docs = rows_of_text()
    length, dim, heads = docs.size(1), 16, 3
    table = T.rope_table(length, dim, half=True)
    ctx = T.Context(None, {dim: table}, lambda d: 1.0)
    k = torch.randn(2, length, heads, dim, generator=torch.Generator().manual_seed(1))
    turned = (T.rotate(torch.ones_like(k), ctx) != 1).any(0).any(0).any(0)
    assert turned.sum() == dim // 2
    want = k.clone()
    for b in range(2):
        for t in range(length):
            if not opens(docs, b, t):
                want[b, t, :, ~turned] = k[b, t - 1, :, ~turned]
    assert torch.equal(T.offset_keys(k, T.starts_of(docs)), want)


@pytest.mark.parametrize("arm", ["softmax", "diff_v1", "diff_v2"])
def test_key_offset_is_on_long_layers_alone(arm, monkeypatch):
    seen = []
    attend = T.attend

    def spy(q, k, v, ctx):
        seen.append((q, k))
        return attend(q, k, v, ctx)

    monkeypatch.setattr(T, "attend", spy)
    (tokens, docs), changes = rows_of_text(), {"arm": arm, "backout": -1}
    for on in (False, True):  # the same weights: the idea brings none
        build(key_offset=on, **changes)(tokens, docs, window())
    without, with_it = seen[:4], seen[4:]
    assert torch.equal(without[0][0], with_it[0][0]), "queries stay"
    starts, moved = T.starts_of(docs), (without[0][1] != with_it[0][1]).any(-1)
    assert moved[~starts].all() and not moved[starts].any(), "every head, but no document's start"

    def keys(layer, on, x):
        arm = build(key_offset=on, **changes).blocks[layer].attn.arm
        ctx = build(key_offset=True, **changes).contexts(docs, window())[layer]
        return arm.position(x, x, ctx)[1]

    x = torch.randn(2, docs.size(1), 2, 16, generator=torch.Generator().manual_seed(2))
    x = x[..., : T.v1_qk_dim(build(**changes).cfg)]
    for layer in range(4):
        assert torch.equal(keys(layer, True, x), keys(layer, False, x)) == (layer in (1, 2))


def test_key_offset_needs_half_rope():
    for off in ({"half_rope": False}, {"rope": False}):
        cfg = T.make_config("speedrun", key_offset=True, **off)
        assert any("--key-offset" in p for p in T.check_config(cfg))


# ---- smear --------------------------------------------------------------------------------------


def test_smear():
    model, (_, docs) = build(smear=True), rows_of_text()
    e = torch.randn(2, docs.size(1), 32, generator=torch.Generator().manual_seed(1))
    got = model.smear(e, T.starts_of(docs))
    w, s = model.smear.gate.detach(), model.smear.share.item()
    assert abs(s) > 0.01
    for b in range(2):
        for t in range(docs.size(1)):
            want = e[b, t].clone()
            if not opens(docs, b, t):
                want += s * torch.sigmoid(w @ e[b, t, :12]) * e[b, t - 1]
            torch.testing.assert_close(got[b, t], want)


def test_smear_comes_before_the_norm():
    model, (tokens, docs) = build(smear=True), rows_of_text()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens, docs, window())
    x0 = T.norm(model.smear(model.embed[tokens.long()], T.starts_of(docs)))
    torch.testing.assert_close(seen[0], model.resid[0].sum() * x0)
