"""The whole loop on real text: every arm falls below what any table of bigrams can reach, and does
not without attention; the log is what it promises; reset, hooks and exit codes work."""

from __future__ import annotations

import json
import math
import shutil

import helpers as H
import numpy as np
import pytest
import torch

T = H.T

# ---- does it learn? -----------------------------------------------------------------------------

# 2 blocks of width 96, 128 bytes of context: below the bigram after some 50k tokens.
LEARN = {
    **{"n_layer": 2, "d_model": 96, "n_head": 4, "head_dim": 32, "long_layers": (0, 1)},
    **{"backout": 0, "row_tokens": 128, "micro_batch_tokens": 512},
    **{"stages": (T.Stage(1.0, 512, 1.0, (128, 128)),), "tokens": 112 * 512, "data_seed": 1},
    **{"matrix_lr": 0.05, "embed_lr": 0.1, "momentum_warmup": 50, "looks": 0},
    **{"val_row_tokens": 128, "val_call_tokens": 8192, "val_tokens": 10**6, "dev_tokens": 2048},
}


def learn(data, out, arm) -> tuple[T.Trainer, float, float]:
    """(trainer after its run, its final loss on val, what the best bigram table gets there)."""
    trainer = T.Trainer(H.tiny(data, out, **LEARN, arm=arm, run_id="learn"))
    loss = trainer.run()["val_loss"]
    (shard,) = trainer.corpus.splits["val"]
    return trainer, loss, H.bigram_nats(shard.load())


@pytest.mark.parametrize(
    "arm",
    [
        "softmax",
        pytest.param("diff_v1", marks=pytest.mark.long),
        "diff_v2",
        *(pytest.param(a, marks=pytest.mark.long) for a in (*H.FORMS, "diff_v2,form=light+")),
        pytest.param("selective", marks=pytest.mark.long),
        pytest.param("diff_v2,selective=true", marks=pytest.mark.long),
        f"{H.ARMS / 'temperature.py'}:Temperature",
    ],
    ids=lambda a: a[-24:],
)
def test_every_arm_falls_below_the_bigram(text_data, tmp_path, arm):
    """The bound is the conditional entropy of val's own bigrams, which no function of the present
    token alone can beat on val; so the same model must rise above it without its attention."""
    trainer, loss, bigram = learn(text_data, tmp_path, arm)
    assert 2 < bigram < 3
    assert loss < bigram - 0.05, (loss, bigram)
    with torch.no_grad():
        for block in trainer.model.blocks:
            block.attn.o.weight.zero_()
    blind = trainer.evaluate("val", 128)
    assert blind["loss"] > bigram
    assert blind["targets"] == trainer.corpus.tokens("val") - 1
    curve = H.losses(tmp_path / "learn")
    assert curve[0] == pytest.approx(math.log(T.padded(H.BYTE_VOCAB)), abs=1e-5)  # a head of zeros


def test_trained_without_attention_it_stays_above_the_bigram(text_data, tmp_path):
    _, loss, bigram = learn(text_data, tmp_path, f"{H.ARMS / 'broken.py'}:Zero")
    assert bigram < loss < bigram + 1, "it learns what a bigram can, and no more"


# ---- run.jsonl ----------------------------------------------------------------------------------

HEADER = {
    *("schema", "run_id", "arm", "preset", "track", "seed", "data_seed", "argv", "config"),
    *("source_sha256", "git", "env", "data", "params", "flops_per_token", "peak_flops", "world"),
}
ENV = {"gpu", "count", "driver", "torch", "triton", "python", "host"}
STEP = {"step", "loss", "tokens", "train_s", "ms", "stage", "lr", "window", "grad_norm"}
END = {
    *("status", "code", "train_s", "compile_s", "door_s", "tokens", "tokens_per_s"),
    *("peak_alloc", "peak_reserved", "joules"),
}


@pytest.fixture(scope="module")
def run(text_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    arm = f"{H.ARMS / 'temperature.py'}:Temperature"
    cfg = H.tiny(text_data, out, arm=arm, run_id="logged", seed=3, track="demo", looks=2)
    return T.train(cfg), out / "logged", cfg


def test_header(run, text_data):
    result, folder, cfg = run
    (header,) = H.read_log(folder, "header")
    assert H.read_log(folder)[0] == header, "it comes first"
    assert set(header) >= HEADER, HEADER - set(header)
    assert set(header["env"]) >= ENV, ENV - set(header["env"])
    assert set(header["params"]) == {"active_matmul", "stored", "attention"}
    said = [header[k] for k in ("run_id", "arm", "preset", "track", "seed", "data_seed", "world")]
    assert said == ["logged", cfg.model.arm, "demo", "demo", 3, 0, 1]
    assert header["peak_flops"] is None and header["env"]["gpu"] is None
    again = T.config_from_flat(header["config"])
    assert again == cfg.with_(vocab=H.BYTE_VOCAB), "the log is enough to run it again"
    assert header["source_sha256"] == {
        "trainer": T.sha256(H.ROOT / "train_gpt.py"),
        "arm": T.sha256(H.ARMS / "temperature.py"),
    }
    manifest = json.loads((text_data / "manifest.json").read_text())["files"]
    want = [{k: f[k] for k in ("name", "split", "tokens", "sha256")} for f in manifest]
    assert header["data"] == want
    model = T.GPT(cfg.with_(vocab=H.BYTE_VOCAB).model, 64)
    assert header["params"]["stored"] == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".weight"))
    assert header["params"]["active_matmul"] >= matrices + model.head.numel()
    assert header["flops_per_token"] >= 6 * header["params"]["active_matmul"]


def test_step_val_and_end_lines(run):
    result, folder, cfg = run
    steps = H.read_log(folder, "step")
    assert [s["step"] for s in steps] == list(range(1, 9))
    assert [s["tokens"] for s in steps] == [256 * i for i in range(1, 9)]
    assert all(set(s) >= STEP and s["window"] == 128 and s["stage"] == 0 for s in steps)
    assert [s["train_s"] for s in steps] == sorted(s["train_s"] for s in steps)
    plan = T.plan_steps(cfg, 256 * 8)
    assert [s["lr"] for s in steps] == pytest.approx([p.lr for p in plan], abs=1e-6)
    *looks, dev, val = H.read_log(folder, "val")
    assert [v["step"] for v in (*looks, dev, val)] == [4, 8, 8]
    for line in (*looks, dev):
        assert line["split"] == "dev" and line["targets"] == 512
        assert {"dev_loss", "bpb", "by_position", "tokens", "train_s"} <= set(line)
    assert val["split"] == "val" and {"val_loss", "val_loss_ext", "bpb", "by_position"} <= set(val)
    (end,) = H.read_log(folder, "end")
    assert set(end) >= END and (end["status"], end["code"], end["tokens"]) == ("done", 0, 2048)
    assert H.read_log(folder)[-1] == end
    assert result["val_loss"] == val["val_loss"] and result["dev_loss"] == dev["dev_loss"]
    text = (folder / "run.log").read_text()
    assert text.count("\nstep:") >= 8 and f"val_loss:{val['val_loss']:.4f}" in text
    assert "active matmul" in text and "in attention" in text and "stored" in text


def test_hash_chain(run, tmp_path):
    """It verifies by what it promises; and any edit, cut or swap in the middle shows."""
    _, folder, _ = run
    assert H.chain_breaks(folder) == []
    lines = (folder / "run.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 8

    def breaks(changed):
        (tmp_path / "run.jsonl").write_text("".join(changed))
        return H.chain_breaks(tmp_path)

    assert breaks(lines) == []
    edited = [*lines]
    edited[3] = edited[3].replace('"loss": ', '"loss": 1')
    assert 3 in breaks(edited)
    assert breaks([*lines[:4], *lines[5:]])[0] == 4
    assert breaks([*lines[:4], lines[5], lines[4], *lines[6:]])[0] == 4


# ---- seeds, reset, warm-up ----------------------------------------------------------------------


@pytest.mark.parametrize("arm", [pytest.param("softmax", marks=pytest.mark.long), "diff_v2"])
def test_reset_equals_a_fresh_process(text_data, tmp_path, arm):
    """After a run with other seeds, reset gives to the bit what a new process gives."""
    fresh = {"arm": arm, "seed": 5, "data_seed": 2}
    done = H.run_forked(H.tiny_argv(text_data, tmp_path, run_id="fresh", **fresh))
    assert done.returncode == 0, done.stderr
    trainer = T.Trainer(H.tiny(text_data, tmp_path, arm=arm, seed=1, run_id="first"))
    trainer.run()
    trainer.reset(5, 2)
    trainer.run()
    assert trainer.folder != tmp_path / "first"
    a, b, other = (H.losses(f) for f in (tmp_path / "fresh", trainer.folder, tmp_path / "first"))
    assert a == b and len(a) == 8 and a != other
    for key in ("dev_loss", "val_loss"):
        a, b = (
            [v.get(key) for v in H.read_log(f, "val")] for f in (tmp_path / "fresh", trainer.folder)
        )
        assert a == b
    header = H.read_log(trainer.folder, "header")[0]
    assert (header["seed"], header["data_seed"]) == (5, 2)


def test_warm_up_leaves_no_trace(text_data, tmp_path):
    cfg = H.tiny(text_data, tmp_path)
    warm, cold = T.Trainer(cfg), T.Trainer(cfg)
    warm.warm_up()
    batch = next(cold.default_batches(cold.steps[:1], cold.cfg, cold.world))
    for trainer in (warm, cold):
        trainer.train_step(trainer.steps[0], batch)
    for (name, a), b in zip(warm.model.named_parameters(), cold.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    a, b = (t.optimizer.state_dict() for t in (warm, cold))
    for name in a:
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name


def test_data_seed_changes_order_but_not_content(tmp_path):
    """A run over one whole pass trains on every token once, whatever the order."""
    gen = np.random.default_rng(0)
    texts = [bytes(gen.integers(97, 123, n, np.uint8)) for n in gen.integers(10, 80, 60)]
    tokens = H.tokens_of(texts)[: 256 * 8 + 1]
    data = H.write_corpus(
        tmp_path / "d", {"train": [tokens[:-1]], "dev": [tokens], "val": [tokens]}
    )
    seen, curves = {}, {}
    for seed in (0, 1, 2):
        cfg = H.tiny(data, tmp_path, data_seed=seed, run_id=f"d{seed}", tokens=0, passes=1)
        seen[seed] = []

        def watch(steps, cfg, world, log=seen[seed]):
            shards = T.Corpus.open(cfg.data.data).splits["train"]
            stream = T.TokenStream(shards, H.EOT, cfg.data.data_seed)
            for batch in T.train_batches(stream, steps, cfg, world):
                log.extend(batch.tokens.flatten().tolist())
                yield batch

        T.train(cfg, hooks=T.Hooks(batches=watch))
        curves[seed] = H.losses(tmp_path / f"d{seed}")
    assert seen[0] == tokens[:-1].tolist()
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(seen[2])
    assert seen[0] != seen[1] != seen[2]
    assert curves[0][1:] != curves[1][1:] != curves[2][1:]


def test_seed_and_arm_share_the_data(text_data, tmp_path):
    """The first loss is that of a zero head for all; seeds differ after it."""
    curves = []
    for seed in (0, 1):
        cfg = H.tiny(text_data, tmp_path, seed=seed, run_id=f"s{seed}", looks=0, final_val=False)
        T.train(cfg)
        curves.append(H.losses(tmp_path / f"s{seed}"))
    assert curves[0][0] == curves[1][0] and curves[0][2:] != curves[1][2:]


# ---- hooks --------------------------------------------------------------------------------------


def test_after_step_and_on_eval(text_data, tmp_path):
    steps, evals = [], []
    hooks = T.Hooks(
        after_step=lambda trainer, step: steps.append((step.index, type(trainer))),
        on_eval=lambda trainer, out: evals.append(set(out)),
    )
    T.train(H.tiny(text_data, tmp_path, looks=2, run_id="h"), hooks=hooks)
    assert steps == [(i, T.Trainer) for i in range(8)]
    assert len(evals) == 2
    assert evals[0] == {"dev_loss", "dev_bpb"} and {"val_loss", "val_loss_ext"} <= evals[-1]


def test_loss_mask(text_data, tmp_path):
    """All true is no mask; else the loss and its gradient are means over what is kept."""
    cfg = H.tiny(text_data, tmp_path, looks=0, final_val=False)

    def first_step(mask):
        trainer = T.Trainer(cfg, T.Hooks(loss_mask=mask) if mask else None)
        H.randomise(trainer.model)
        batch = next(trainer.default_batches(trainer.steps[:1], trainer.cfg, trainer.world))
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        figures, norm = trainer.train_step(trainer.steps[0], batch)
        return float(figures[0]), float(norm), before, batch, trainer

    plain = first_step(None)
    full = first_step(lambda batch: torch.ones_like(batch.targets, dtype=torch.bool))
    assert full[:2] == pytest.approx(plain[:2], rel=1e-6)

    masked = first_step(lambda batch: batch.position % 3 == 0)
    batch, trainer = masked[3], masked[4]
    keep = (batch.position % 3 == 0).flatten()
    assert 0.2 < keep.float().mean() < 0.5
    twin = T.GPT(trainer.cfg.model, 64)
    twin.load_state_dict(masked[2])
    again = next(trainer.default_batches(trainer.steps[:1], trainer.cfg, trainer.world))
    window = T.windows(128, torch.device("cpu"))
    h = twin(again.tokens, again.docs, window).flatten(0, 1)
    z = T.softcap(h @ twin.head.t(), twin.softcap)
    loss = torch.nn.functional.cross_entropy(z[keep], again.targets.flatten()[keep])
    loss.backward()
    assert masked[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in twin.parameters() if p.grad is not None]).norm()
    assert masked[1] == pytest.approx(float(norm), rel=1e-4)


def test_model_and_optimizer_hooks(text_data, tmp_path):
    """A variant's own model, and another optimizer for the same loop."""
    made = []

    class Other(torch.nn.Module):
        softcap = 0.0

        def __init__(self, vocab):
            super().__init__()
            self.embed = torch.nn.Embedding(vocab, 16)
            self.head = torch.nn.Parameter(torch.zeros(vocab, 16))

        def forward(self, tokens, docs, window):
            return self.embed(tokens)

    def model(cfg, length, dtype):
        made.append((cfg.model.vocab, length, dtype))
        return Other(T.padded(cfg.model.vocab))

    def optimizer(model, cfg, world):
        groups = {"all": T.Group("adam", 0.03)}
        return T.Optimizer(model, groups, world, assign=lambda name, p: "all")

    cfg = H.tiny(text_data, tmp_path, run_id="other", tokens=256 * 40)
    result = T.train(cfg, hooks=T.Hooks(model=model, optimizer=optimizer))
    assert set(made) == {(H.BYTE_VOCAB, 64, torch.float32)}
    curve = H.losses(tmp_path / "other")
    assert curve[-1] < curve[0] - 0.5 and result["status"] == "done"


# ---- ends ---------------------------------------------------------------------------------------


def test_non_finite_loss_ends_with_3(text_data, tmp_path, capsys):
    """(A rate of 1e30 does not do it: every norm divides it out again.)"""

    def poison(trainer, step):
        if step.index == 4:
            with torch.no_grad():
                trainer.model.head[0, 0] = float("nan")

    argv = H.tiny_argv(text_data, tmp_path, run_id="bad")
    assert T.main(argv, lambda cfg: T.Hooks(after_step=poison)) == 3
    assert "step 6" in capsys.readouterr().err
    said = json.loads((tmp_path / "bad" / "exit.json").read_text())
    assert said["code"] == 3 and "loss" in said["reason"]
    event = H.read_log(tmp_path / "bad", "event")[-1]
    assert event["kind"] == "non-finite"
    assert H.chain_breaks(tmp_path / "bad") == []
    curve = H.losses(tmp_path / "bad")
    assert len(curve) == 5 and all(math.isfinite(v) for v in curve)


def test_a_good_run_ends_with_0(text_data, tmp_path):
    """In a process of its own, through the command line; the same losses as in this one."""
    cfg = {"run_id": "cli", "arm": "diff_v2,form=light+", "grad_clip": 0.5}
    done = H.run_script(H.tiny_argv(text_data, tmp_path / "a", **cfg))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a" / "cli" / "exit.json").read_text())["code"] == 0
    assert "step:8/8" in done.stdout and "val_loss:" in done.stdout
    T.train(H.tiny(text_data, tmp_path / "b", **cfg))
    assert H.losses(tmp_path / "a" / "cli") == H.losses(tmp_path / "b" / "cli")


def test_gradient_clipping_holds_the_norm(text_data, tmp_path):
    """Recorded is the norm before clipping; Adam's first moment shows what it used."""
    cfg = H.tiny(text_data, tmp_path, grad_clip=1e-3, looks=0, final_val=False)
    trainer = T.Trainer(cfg)
    H.randomise(trainer.model)
    batch = next(trainer.default_batches(trainer.steps[:1], trainer.cfg, trainer.world))
    _, norm = trainer.train_step(trainer.steps[0], batch)
    assert norm > 1e-2
    total = 0.0
    for bank in trainer.optimizer.banks:
        if bank.group.kind == "adam":
            moment = bank.state()["exp_avg"] / (1 - bank.group.betas[0])
        else:
            moment = bank.momentum / (1 - trainer.steps[0].momentum)
        total += float(moment.square().sum())
    assert math.sqrt(total) / T.LOSS_SCALE == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled_equals_eager_without_recompiling(text_data, tmp_path):
    """Two stages with different rows, windows that grow, looks: no graph is new after warm-up
    (error_on_recompile would raise), and the losses are the eager ones."""
    stages = (T.Stage(0.5, 256, 1.0, (128, 256)), T.Stage(0.5, 512, 1.0, (256, 512)))
    cfg = H.tiny(text_data, tmp_path, stages=stages, tokens=256 * 12, ext_window=640, n_layer=1)
    cfg = cfg.with_(long_layers=(0,), value_tables=0, arm="diff_v2", micro_batch_tokens=128)
    T.train(cfg.with_(compile=True, run_id="compiled"))
    T.train(cfg.with_(run_id="eager"))
    a, b = (H.losses(tmp_path / name) for name in ("compiled", "eager"))
    assert len(a) == 8 and a == pytest.approx(b, abs=1e-4)
    a, b = (H.read_log(tmp_path / n, "val")[-1]["val_loss_ext"] for n in ("compiled", "eager"))
    assert a == pytest.approx(b, abs=1e-4)


def test_the_same_seed_gives_the_same_run_and_deterministic_mode_too(text_data, tmp_path):
    """Losses to the last digit: in this process, in another, and with --deterministic."""
    argv = [H.tiny_argv(text_data, tmp_path, run_id=name) for name in ("a", "b")]
    T.train(H.tiny(text_data, tmp_path, run_id="here"))
    for words in (argv[0], [*argv[1], "--deterministic"]):
        done = H.run_forked(words)
        assert done.returncode == 0, done.stderr
    assert H.losses(tmp_path / "a") == H.losses(tmp_path / "here") == H.losses(tmp_path / "b")
    assert H.read_log(tmp_path / "b", "header")[0]["config"]["deterministic"] is True


def test_an_evaluation_that_fails_does_not_lose_the_model(text_data, tmp_path, monkeypatch):
    """The last checkpoint is begun before the last evaluation, and ends although that raises."""
    cfg = H.tiny(text_data, tmp_path, run_id="r", looks=0, save_final=True)
    trainer = T.Trainer(cfg)

    def crash(*_):
        raise MemoryError("made up")

    trainer.warm_up()
    monkeypatch.setattr(trainer, "evaluate", crash)
    with pytest.raises(MemoryError):
        trainer.run()
    state, meta = T.load_checkpoint(tmp_path / "r")
    assert meta["step"] == 8
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, state["model"][name]), name


def test_windows_go_to_the_device_once_a_step(text_data, tmp_path, monkeypatch):
    """However many calls a step or a look is made of."""
    trainer = T.Trainer(H.tiny(text_data, tmp_path, micro_batch_tokens=64, val_call_tokens=64))
    batch = T.make_batch(
        T.TokenStream(trainer.corpus.splits["train"], trainer.corpus.eot), 0, 8, 32
    )
    sent, windows = [], T.windows
    monkeypatch.setattr(T, "windows", lambda *args: sent.append(args) or windows(*args))
    trainer.gradients(trainer.steps[0], batch)
    trainer.evaluate("dev", 128)
    assert len(sent) == 2
