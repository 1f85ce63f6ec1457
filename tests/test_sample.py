"""evals/sample.py: the same text from the same seed, greedy where asked, and clear refusals."""

from __future__ import annotations

import base64
import json
import shutil
import types

import helpers as H
import pytest
import torch

from evals import sample
from variants import gpt2

T = H.T
ARMS = ("softmax", "diff_v1", "diff_v2", f"{H.ARMS / 'temperature.py'}:Temperature")


@pytest.fixture(scope="module")
def run(text_data, tmp_path_factory):
    """A run folder with a checkpoint after 8 steps."""
    out = tmp_path_factory.mktemp("sample")
    return T.train(H.tiny(text_data, out, save_final=True, run_id="r"))["run"]


@pytest.fixture(scope="module")
def loaded(run):
    return sample.load(run)


def flat_model(eot_logit: float, vocab: int = 257):
    """A stand-in that gives every token the same logit, but for end-of-text."""
    head = torch.zeros(vocab + 3, 1)
    head[vocab - 1] = eot_logit
    head[vocab:] = 1e9  # padding rows must never be drawn

    class Flat(torch.nn.Module):
        def forward(self, tokens, docs, window):
            return torch.ones(*tokens.shape, 1)

    model = Flat()
    model.head, model.softcap, model.cfg = head, 0.0, types.SimpleNamespace(vocab=vocab)
    return model, {"window": 128, "config": {"row_tokens": 32, "vocab": vocab}}


def test_same_seed_same_tokens(loaded):
    model, meta = loaded
    one = sample.generate(model, meta, [256, 84], 256, tokens=40, seed=1)
    assert one == sample.generate(model, meta, [256, 84], 256, tokens=40, seed=1)
    assert one != sample.generate(model, meta, [256, 84], 256, tokens=40, seed=2)


def test_top_k_1_is_argmax(loaded):
    model, meta = loaded
    how = {"tokens": 40, "end": False}
    greedy = sample.generate(model, meta, [256], 256, temperature=0.0, **how)
    for seed in (0, 7):
        assert greedy == sample.generate(model, meta, [256], 256, top_k=1, seed=seed, **how)
    # and argmax of the trainer's own logits, the context cut as trained: 32 tokens
    ids = [256]
    for _ in range(40):
        shown = torch.tensor([ids[-32:]], dtype=torch.int32)
        logits = model.logits(shown, torch.zeros_like(shown), T.windows(128, "cpu"))[0, -1]
        logits[256] = -torch.inf
        ids.append(int(logits.argmax()))
    assert greedy == ids[1:]


def test_top_k_bounds_the_choice():
    logits = torch.arange(10.0)
    how, gen = sample.Sampling(temperature=5.0, top_k=3), torch.Generator().manual_seed(0)
    assert {sample.next_token(logits, how, gen) for _ in range(200)} == {7, 8, 9}
    how = sample.Sampling(temperature=50.0, top_k=0)
    assert len({sample.next_token(logits, how, gen) for _ in range(500)}) == 10


def test_end_of_text_ends_and_is_no_text():
    model, meta = flat_model(eot_logit=50.0)
    assert sample.generate(model, meta, [256], 256, tokens=9) == []
    tokenizer = sample.tokenizer_of(meta)
    text = "".join(sample.write(model, meta, tokenizer, "Hé", sample.Sampling(tokens=9)))
    assert text == "Hé"
    ids = sample.generate(model, meta, [256], 256, tokens=300, end=False, top_k=0)
    assert len(ids) == 300
    assert max(ids) < 256  # neither end-of-text nor padding
    assert sample.token_pieces(tokenizer)[256] == b""


def test_prompt_starts_a_document():
    """The model is shown end-of-text, then the prompt's bytes, then what it wrote."""
    model, meta = flat_model(eot_logit=-50.0)
    seen = []
    model.forward = lambda tokens, docs, window: (
        seen.append((tokens[0].tolist(), window.tolist())) or torch.ones(*tokens.shape, 1)
    )
    how = sample.Sampling(tokens=3, context=4)
    "".join(sample.write(model, meta, sample.tokenizer_of(meta), "ab", how))
    assert seen[0] == ([256, 97, 98], [128, 128])
    assert seen[1][0][:3] == [256, 97, 98]
    assert len(seen[2][0]) == 4
    assert seen[2][0][:2] == [97, 98]


@pytest.mark.parametrize("arm", ARMS, ids=lambda a: a.rpartition("/")[2])
def test_every_arm_and_checkpoint_folder(arm, text_data, tmp_path, capsys):
    cfg = H.tiny(text_data, tmp_path, arm=arm, save_final=True, run_id="r", tokens=512)
    done = T.train(cfg)
    folder = T.find_checkpoint(done["run"])
    capsys.readouterr()
    assert sample.main([str(folder), "--tokens", "12", "--prompt", "Return"]) == 0
    assert capsys.readouterr().out.startswith("Return")


def test_gpt2_variant(text_data, tmp_path, capsys):
    small = {"n_layer": 2, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (0, 1)}
    cfg = T.make_config(
        "gpt2",
        **{**small, "row_tokens": 32, "val_row_tokens": 32, "val_call_tokens": 256},
        **{"stages": (T.Stage(1.0, 256, 1.0, (128, 128)),), "tokens": 512, "looks": 0},
        **{"require_gpu": False, "device": "cpu", "compile": False, "final_val": False},
        **{"dev_tokens": 512, "data": str(text_data), "out": str(tmp_path)},
    )
    run = T.train(cfg, hooks=gpt2.make_hooks(cfg))["run"]
    model, _ = sample.load(run)
    assert isinstance(model, gpt2.GPT2)
    capsys.readouterr()
    assert sample.main([run, "--tokens", "40", "--prompt", "Return"]) == 0
    assert capsys.readouterr().out.startswith("Return")
    assert sample.main([run, "--context", "2000"]) == 2


def test_command_line(run, capsys):
    words = [run, "--prompt", "The ", "--tokens", "20", "--seed", "3"]
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert sample.main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("The ")
    assert len(texts[0]) > 10


def refused(words: list[str], capsys) -> str:
    assert sample.main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_sentence_and_2(run, tmp_path, capsys, monkeypatch):
    assert "no whole checkpoint" in refused([str(tmp_path / "nothing")], capsys)
    assert "no whole checkpoint" in refused([str(tmp_path)], capsys)
    assert "--tokens 0" in refused([run, "--tokens", "0"], capsys)
    assert "--temperature nan" in refused([run, "--temperature", "nan"], capsys)
    assert "--top-k" in refused([run, "--top-k", "-1"], capsys)
    assert "tokenizer" in refused([run, "--tokenizer", str(tmp_path / "none")], capsys)
    if not torch.cuda.is_available():
        assert "GPU" in refused([run, "--device", "cuda"], capsys)


def test_damaged_checkpoints(run, tmp_path, capsys):
    for number, damage in enumerate(("state", "meta", "shape")):
        folder = tmp_path / str(number)
        shutil.copytree(T.find_checkpoint(run), folder)
        if damage == "state":
            (folder / "state.pt").write_bytes(b"nothing")
        elif damage == "meta":
            (folder / "meta.json").write_text("{}")
        else:
            meta = json.loads((folder / "meta.json").read_text())
            meta["config"]["d_model"] = 48
            (folder / "meta.json").write_text(json.dumps(meta))
        assert str(folder) in refused([str(folder)], capsys)


def vocabulary(path, extra: int):
    """A tiktoken file of the bytes and `extra` pairs of letters."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([97 + i, 97]) for i in range(extra)]
    lines = [base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def test_tokenizer_from_a_file(tmp_path):
    pytest.importorskip("tiktoken")
    name = vocabulary(tmp_path / "small.tiktoken", extra=3)
    model, meta = flat_model(eot_logit=-50.0, vocab=260)
    with pytest.raises(T.InputError, match="--tokenizer FILE"):
        sample.tokenizer_of(meta)
    tokenizer = sample.tokenizer_of(meta, name)
    assert tokenizer.encoder()(["baa"]).tokens.tolist() == [259, 98, 256]
    text = "".join(sample.write(model, meta, tokenizer, "baa", sample.Sampling(tokens=5)))
    assert text.startswith("baa")
    meta["config"]["vocab"] = 50_257
    with pytest.raises(T.InputError, match="260 tokens, the model 50257"):
        sample.tokenizer_of(meta, name)


def test_gpt2_tokens_without_a_network(run, tmp_path, capsys, monkeypatch):
    """A checkpoint of 50,257 tokens where tiktoken cannot fetch the vocabulary."""
    tiktoken = pytest.importorskip("tiktoken")

    def no_network(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    model, meta = flat_model(eot_logit=0.0, vocab=50_257)
    monkeypatch.setattr(sample, "load", lambda *_: (model, meta))
    assert "--tokenizer FILE" in refused([run], capsys)
