"""variants/gpt2.py: its logits are transformers' GPT-2, every arm trains, AdamW is nanoGPT's."""

from __future__ import annotations

import helpers as H
import pytest
import torch

from records.causality import check_causal
from variants import gpt2

T = H.T
TINY = {
    **{"n_layer": 2, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (0, 1)},
    **{"row_tokens": 32, "micro_batch_tokens": 128, "val_row_tokens": 64, "val_call_tokens": 256},
    **{"val_tokens": 512, "dev_tokens": 512, "stages": (T.Stage(1.0, 256, 1.0, (128, 128)),)},
    **{"tokens": 256 * 8, "looks": 2, "matrix_lr": 3e-3, "save_final": False},
    **{"require_gpu": False, "device": "cpu", "compile": False},
}
FULL = {"vocab": 50_257}
# Twelve heads of 64 (issue: "There D = 64"): query and KV heads, width of y.
SHAPES = {
    "softmax": (12, 12, 768),
    "diff_v1": (12, 12, 768),
    "diff_v2": (24, 6, 768),
    "diff_v2,form=full": (24, 12, 768),
    "diff_v2,form=light": (12, 6, 384),
    "diff_v2,form=light+": (12, 6, 384),
}


def config(arm="softmax", **changes) -> T.Config:
    return T.make_config("gpt2", arm=arm, **changes)


def build(arm="softmax", **changes) -> gpt2.GPT2:
    model = gpt2.GPT2(config(arm, **changes).model, 0)
    T.init_parameters(model, 0)
    return model


def copy_to(theirs, ours: gpt2.GPT2, vocab: int) -> None:
    """Our weights into a GPT2LMHeadModel, whose Conv1D holds [in, out]."""

    def put(layer, *linears):
        layer.weight.copy_(torch.cat([lin.weight for lin in linears]).t())
        layer.bias.copy_(torch.cat([lin.bias for lin in linears]))

    def put_norm(layer, norm):
        layer.weight.copy_(norm.gain)
        layer.bias.copy_(norm.bias)

    body = theirs.transformer
    with torch.no_grad():
        body.wte.weight.copy_(ours.head[:vocab])
        body.wpe.weight.copy_(ours.position)
        put_norm(body.ln_f, ours.norm)
        for a, b in zip(body.h, ours.blocks, strict=True):
            put_norm(a.ln_1, b.norm_attn)
            put_norm(a.ln_2, b.norm_mlp)
            put(a.attn.c_attn, b.attn.arm.q, b.attn.arm.k, b.attn.arm.v)
            put(a.attn.c_proj, b.attn.o)
            put(a.mlp.c_fc, b.mlp.up)
            put(a.mlp.c_proj, b.mlp.down)


@pytest.mark.parametrize("length", [5, 1024])
def test_logits_are_transformers(length):
    transformers = pytest.importorskip("transformers")
    vocab = 300
    shape = {"n_layer": 3, "d_model": 128, "n_head": 2, "head_dim": 64, "vocab": vocab}
    ours = build(long_layers=(0, 1, 2), **shape)
    H.randomise(ours, seed=1, std=1.0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocab, n_embd=128, n_layer=3, n_head=2)
    ).eval()
    assert theirs.config.activation_function == "gelu_new"
    assert theirs.config.layer_norm_epsilon == 1e-5
    copy_to(theirs, ours, vocab)
    tokens = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(2))
    docs = torch.zeros(2, length, dtype=torch.int32)
    mine = ours.logits(tokens.int(), docs, torch.tensor([1024, 1024]))
    with torch.no_grad():
        want = theirs(tokens).logits
    assert want.std() > 0.5
    assert (mine - want).abs().max() < 1e-4


@pytest.mark.parametrize("arm", SHAPES)
def test_heads_at_full_size(arm):
    with torch.device("meta"):
        model = gpt2.GPT2(config(arm, **FULL).model, 0)
    for block in model.blocks:
        a = block.attn.arm
        assert (a.heads_q, a.heads_kv, a.n_out) == SHAPES[arm]
        assert block.attn.o.weight.shape == (768, a.n_out)
    assert model.score_scale(64) == 1 / 8
    if arm == "diff_v1":
        assert (model.blocks[0].attn.arm.dim, model.blocks[0].attn.arm.heads) == (64, 6)


def test_parameter_count():
    """124.4M as GPT-2 small (124,439,808), and 47 rows of padding."""
    with torch.device("meta"):
        model = gpt2.GPT2(config(**FULL).model, 0)
    count = T.count_parameters(model)
    assert count["stored"] == 124_439_808 + (50_304 - 50_257) * 768
    # Each token is multiplied with the blocks' matrices and, once, the tied one; not positions.
    assert count["active_matmul"] == 12 * 12 * 768**2 + 50_304 * 768
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    assert len([n for n in names if n.startswith("head")]) == 1
    with torch.device("meta"):
        matched = gpt2.GPT2(config("diff_v2", **FULL).model, 0)
    # matched: softmax's 4 d^2; lambda is 12 x (768 + 1), and K and V lack half of their biases.
    more = T.count_parameters(matched)["stored"] - count["stored"]
    assert more == 12 * (12 * 769 + 768 - 2 * 384)


def test_initialisation():
    model = build(**FULL | {"n_layer": 4, "long_layers": (0, 1, 2, 3)})
    for name, p in model.named_parameters():
        if p.ndim == 1:
            want = 1.0 if name.endswith("gain") else 0.0
            assert (p == want).all(), name
        else:
            residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
            want = 0.02 / 8**0.5 if residual else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.02), name


@pytest.mark.parametrize("arm", SHAPES)
def test_every_arm_trains(arm, text_data, tmp_path):
    cfg = config(arm, **TINY, data=str(text_data), out=str(tmp_path), run_id="r")
    out = T.train(cfg, hooks=gpt2.make_hooks(cfg))
    curve = H.losses(out["run"])
    assert len(curve) == 8
    assert curve[-1] < curve[0] - 0.05
    assert out["dev_loss"] < curve[0]
    header = H.read_log(out["run"], "header")[0]
    assert header["preset"] == "gpt2"
    assert not H.chain_breaks(out["run"])


def test_a_users_arm_trains(text_data, tmp_path):
    arm = f"{H.ARMS / 'temperature.py'}:Temperature"
    cfg = config(arm, **TINY, data=str(text_data), out=str(tmp_path))
    curve = H.losses(T.train(cfg, hooks=gpt2.make_hooks(cfg))["run"])
    assert curve[-1] < curve[0] - 0.05


@pytest.mark.parametrize("arm", ["softmax", "diff_v1", "diff_v2"])
def test_is_causal(arm):
    done = check_causal(arm, preset="gpt2", make_model=lambda c, n, d: gpt2.GPT2(c.model, n, d))
    assert done["window"] == 2 * 12


def trainer(text_data, tmp_path, **changes) -> T.Trainer:
    cfg = config(**{**TINY, **changes}, data=str(text_data), out=str(tmp_path))
    return T.Trainer(cfg, gpt2.make_hooks(cfg))


def test_tied_gradient_is_autograds(text_data, tmp_path):
    """Head adds its part by hand, the lookup's part comes from autograd: together, over two
    micro-batches, what autograd finds for the whole loss."""
    t = trainer(text_data, tmp_path)
    H.randomise(t.model, seed=3)
    stream = T.TokenStream(t.corpus.splits["train"], t.corpus.eot)
    batch = T.make_batch(stream, 0, 8, 32)
    window = torch.tensor([1024, 1024], dtype=torch.int32)
    h = t.model(batch.tokens, batch.docs, window)
    logits = (h @ t.model.head.t()).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten())
    params = dict(t.model.named_parameters())
    want = torch.autograd.grad(loss, list(params.values()))
    seen = {}

    def step(lr, momentum, figures, **_):
        seen.update({n: p.grad.clone() / T.LOSS_SCALE for n, p in params.items()})
        return torch.zeros(())

    t.optimizer.step = step
    t.train_step(t.steps[0], batch)
    for (name, got), right in zip(seen.items(), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: n + m)


def test_updates_are_torchs_adamw(text_data, tmp_path):
    """Three steps against torch.optim.AdamW on unscaled gradients with clipping at 1, as nanoGPT
    writes them: shows lr, betas, eps beside LOSS_SCALE, clipping, and who decays."""
    t = trainer(text_data, tmp_path)
    H.randomise(t.model, seed=4)
    mine = {n: p for n, p in t.model.named_parameters()}
    theirs = {n: torch.nn.Parameter(p.detach().clone()) for n, p in mine.items()}
    groups = [
        {"params": [p for p in theirs.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    gen = torch.Generator().manual_seed(5)
    for size in (10.0, 1e-3, 1e-7):  # clipped, not clipped, as small as eps
        for name, p in mine.items():
            grad = torch.randn(p.shape, generator=gen) * size
            p.grad = grad * T.LOSS_SCALE
            theirs[name].grad = grad
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adam.step()
        said = t.optimizer.step(1.0, 0.0) / T.LOSS_SCALE
        torch.testing.assert_close(said, norm, rtol=1e-4, atol=0)
        for name, p in mine.items():
            torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("arm", ["softmax", "diff_v1", "diff_v2"])
def test_only_matrices_decay(arm):
    model = build(arm, **FULL | {"n_layer": 1, "long_layers": (0,)})
    decayed = {n for n, p in model.named_parameters() if gpt2.assign(n, p) == "decay"}
    assert decayed == {"head", "position"} | {
        n for n, p in model.named_parameters() if n.endswith(".weight") and p.ndim == 2
    }


def test_schedule_of_the_preset():
    """65,536 tokens a step in rows of 1,024, 4 % warm-up, down to a tenth, full windows."""
    cfg = config(**FULL)
    assert T.check_config(cfg) == []
    steps = T.plan_steps(cfg, 100 * 65_536)
    assert len(steps) == 100
    assert [round(s.lr, 4) for s in steps[:5]] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert steps[-1].lr == pytest.approx(0.1, abs=0.02)
    assert {s.window for s in steps} == {1024}
    assert T.step_rows(65_536, cfg.data.row_tokens) == (64, 1024)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"rope": True, "x0": True}, "--rope, --x0"),
        ({"value_tables": 3}, "--value-tables"),
        ({"fp8": True}, "--fp8"),
        ({"row_tokens": 2048}, "1024 positions"),
    ],
)
def test_what_gpt2_lacks_is_refused(changes, word):
    with pytest.raises(T.InputError, match=word):
        gpt2.make_hooks(config(**{**TINY, **changes}))


def test_command_line(text_data, tmp_path, capsys):
    flags = []
    for name, value in {**TINY, "arm": "diff_v2", "save_final": True}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{flag}")
        else:
            flags += [f"--{flag}", T.format_value(value)]
    flags += ["--data", str(text_data), "--out", str(tmp_path), "--run-id", "r"]
    assert gpt2.main(flags) == 0
    assert "params" in H.read_log(tmp_path / "r", "header")[0]
    model, meta = T.load_model(tmp_path / "r", make=gpt2.GPT2)
    assert meta["config"]["preset"] == "gpt2"
    tokens = torch.zeros(1, 8, dtype=torch.int32)
    assert model.logits(tokens, tokens, torch.tensor([1024, 1024])).shape == (1, 8, 257)
    assert gpt2.main(["--preset", "speedrun", "--data", str(text_data)]) == 2
    assert "--preset gpt2" in capsys.readouterr().err
