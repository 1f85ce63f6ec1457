"""evals/look.py: its maps are the model's, its figures those of hand-worked cases, and its page
holds the same numbers, needs nothing from outside, and runs nothing that a text says."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import re
import shutil
import subprocess

import helpers as H
import numpy as np
import pytest
import torch

from evals import look
from variants import gpt2

T = H.T
LENGTH = 40
DOCS = torch.tensor([0] * 13 + [1] * 20 + [2] * 7, dtype=torch.int32)
WINDOWS = torch.tensor([24, 9], dtype=torch.int32)  # both bind inside the second document
SMALL = {"n_layer": 3, "d_model": 32, "n_head": 2, "head_dim": 16, "long_layers": (1,)}
SPEEDRUN = {**SMALL, "no_attention": (), "backout": -1, "skip": (), "value_tables": 1}
TEMPERATURE = f"{H.ARMS / 'temperature.py'}:Temperature"


def config(preset="r28", **changes) -> T.Config:
    small = SMALL if preset == "gpt2" else SPEEDRUN
    return T.make_config(preset, **{**small, "vocab": H.BYTE_VOCAB, "row_tokens": 64, **changes})


def model_of(cfg: T.Config) -> T.GPT:
    """Random and sharp: no map is near uniform, and no lambda near a half."""
    model = (gpt2.GPT2 if cfg.preset == "gpt2" else T.GPT)(cfg.model, 64)
    H.randomise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if re.search(r"arm\.(q\.weight|lam)$", name) and p.size(0) != 4:  # not diff_v1's lambda
                p.mul_(3)
    return model.eval()


def checkpoint(folder, preset="r28", **changes):
    """A run folder with a checkpoint of a random model."""
    cfg = config(preset, **changes)
    meta = {"schema": T.SCHEMA, "step": 8, "steps": 8, "tokens": 4096, "window": 128}
    meta |= {"arm": cfg.model.arm, "config": cfg.flat()}
    T.save_checkpoint(folder / "ckpt", {"model": model_of(cfg).state_dict()}, meta, 1)
    return folder


def tokens_like(docs) -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, docs.shape, generator=gen, dtype=torch.int32)


# ---- Maps ---------------------------------------------------------------------------------------


def naive_map(q, k, scale: float, window: int) -> torch.Tensor:
    """q, k [T, D] -> [T, T], one weight after the other, in fp64."""
    q, k = q.detach().double(), k.detach().double()
    out = torch.zeros(len(q), len(q), dtype=torch.float64)
    for t in range(len(q)):
        seen = [s for s in range(t + 1) if DOCS[s] == DOCS[t] and t - s < window]
        weights = [math.exp(scale * float(q[t] @ k[s])) for s in seen]
        out[t, seen] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return out


def heads_of(linear, x, dim: int, ctx, qk_norm: bool) -> list[torch.Tensor]:
    """Each head's [T, dim], in the order in which its rows are stored."""
    flat = x[0] @ linear.weight.t() + (0 if linear.bias is None else linear.bias)
    heads = flat.view(len(flat), -1, dim)
    if qk_norm:
        heads = heads / heads.square().mean(-1, keepdim=True).sqrt()
    return list(T.rotate(heads[None], ctx)[0].unbind(1))


def naive_layer(model, layer: int, x):
    """First and second maps [H, T, T] and lambda [H, T] (None for softmax), from the parameters."""
    cfg, arm = model.cfg, model.blocks[layer].attn.arm
    ctx = model.contexts(DOCS[None], WINDOWS)[layer]
    v1, two = isinstance(arm, T.DiffV1), not isinstance(arm, T.Softmax)
    dim = arm.dim
    window = int(WINDOWS[0 if layer in cfg.long_layers else 1])
    q = heads_of(arm.q, x, dim, ctx, cfg.qk_norm)
    k = heads_of(arm.k, x, dim, ctx, cfg.qk_norm)

    def maps(which: int, most: int):
        own = which * arm.heads  # map-major
        keys = range(own, own + arm.heads) if v1 else [h * len(k) // arm.heads for h in range(99)]
        pairs = zip(q[own : own + arm.heads], keys)
        return torch.stack([naive_map(a, k[i], model.score_scale(dim), most) for a, i in pairs])

    if not two:
        return maps(0, window), None, None
    if v1:
        a, b, c, d = arm.lam.double()
        lam = torch.exp(a @ b) - torch.exp(c @ d) + 0.8 - 0.6 * math.exp(-0.3 * layer)
        lam = lam.expand(arm.heads, LENGTH)
    else:
        lam = torch.sigmoid(x[0] @ arm.lam.t() + arm.lam_bias).t()
    return maps(0, window), maps(1, min(window, cfg.window2 or window)), lam


@pytest.mark.parametrize(
    "preset, arm",
    [
        *(("r28", arm) for arm in H.BUILT_IN),
        ("r28", "diff_v2,window2=5"),
        ("r28", "diff_v2,layers=1"),
        ("r28", "diff_v1,head_dim=128"),  # q and k of 64, values of 128
        ("r28", "softmax,no_attention=1"),
        ("r28", "softmax,head_dim=32,qk_dim=16"),
        ("r28", "diff_v2,head_dim=32,qk_dim=16"),
        ("gpt2", "diff_v2"),
        ("gpt2", "diff_v1"),
    ],
)
def test_maps_are_the_models(preset, arm):
    """Maps and lambda as worked out one weight at a time, and their difference is what the layer
    sums its values with."""
    model = model_of(config(preset, arm=arm))
    seen = {}
    for i, block in enumerate(model.blocks):
        if block.attn is not None:
            block.attn.arm.register_forward_hook(lambda m, x, y, i=i: seen.update({i: (x[0], y)}))
    layers = look.attention_maps(model, tokens_like(DOCS), DOCS, WINDOWS)
    assert [i for i, x in enumerate(layers) if x is None] == list(model.cfg.no_attention)
    for i, layer in enumerate(layers):
        if layer is None:
            continue
        x, (y, v) = seen[i]
        first, second, lam = naive_layer(model, i, x)
        torch.testing.assert_close(layer.first.double(), first, atol=2e-6, rtol=1e-5)
        if second is None:
            assert layer.second is None
            assert layer.lam is None
            used = first
        else:
            torch.testing.assert_close(layer.second.double(), second, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(layer.lam.double(), lam.double(), atol=1e-6, rtol=1e-5)
            used = first - lam.double()[..., None] * second
        torch.testing.assert_close(layer.used.double(), used, atol=5e-6, rtol=1e-5)
        if v is not None:  # diff_v1 normalises afterwards and gives no values
            v = v[0].transpose(0, 1).repeat_interleave(len(used) // v.size(2), 0)
            sums = (layer.used @ v).transpose(0, 1).flatten(1)
            torch.testing.assert_close(sums, y[0], atol=2e-5, rtol=1e-4)


def test_paired_heads_are_shown_by_token():
    """A pair's weights on both keys of a token, from those that its row of twice the length has;
    the whole page is made of them."""
    cfg = config(paired=(0, 2), n_head=4, head_dim=8)
    model, window = model_of(cfg), 9
    inputs = []
    model.blocks[0].attn.arm.register_forward_hook(lambda m, x, y: inputs.append(x[0]))
    layers = look.attention_maps(model, tokens_like(DOCS), DOCS, WINDOWS)
    assert [layer.first.shape for layer in layers] == [(4, LENGTH, LENGTH)] * 3
    assert [bool(layer.note) for layer in layers] == [True, False, True]
    assert {layer.arm for layer in layers} == {"softmax"}
    arm, (x,) = model.blocks[0].attn.arm, inputs
    q, k = ((x[0] @ m.weight.T).view(1, LENGTH, 2, 2, 8).flatten(1, 2) for m in (arm.q, arm.k))
    q, k = (t[0] for t in arm.position(q, k, model.contexts(DOCS[None], WINDOWS)[0]))
    scale = model.score_scale(8)
    for head in range(4):
        for t in (0, 5, 14, 32):
            at, own = 2 * t + head // 2, torch.zeros(LENGTH)
            seen = [s for s in range(max(0, at - window + 1), at + 1) if DOCS[s // 2] == DOCS[t]]
            weights = torch.softmax(scale * k[seen, head % 2] @ q[at, head % 2], 0)
            own.index_add_(0, torch.tensor(seen) // 2, weights)
            torch.testing.assert_close(layers[0].first[head, t], own, atol=1e-6, rtol=1e-5)
    assert len(look.head_figures(layers[0], DOCS)) == 4


def test_rows_sum_to_one_and_respect_the_mask():
    model = model_of(config(arm="diff_v2,window2=5"))
    t = torch.arange(LENGTH)
    back = t[:, None] - t
    for i, layer in enumerate(look.attention_maps(model, tokens_like(DOCS), DOCS, WINDOWS)):
        window = 24 if i == 1 else 9
        for maps, most in ((layer.first, window), (layer.second, 5)):
            torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))
            hidden = (back < 0) | (back >= most) | (DOCS[:, None] != DOCS)
            assert (maps[:, hidden] == 0).all()
            assert (maps[:, ~hidden] > 0).all()


def test_looking_changes_nothing():
    model, tokens = model_of(config(arm="diff_v2")), tokens_like(DOCS)
    before, attend = model(tokens[None], DOCS[None], WINDOWS), T.attend
    with look.recording(model) as records:
        assert torch.equal(model(tokens[None], DOCS[None], WINDOWS), before)
    with pytest.raises(ZeroDivisionError), look.recording(model):
        raise ZeroDivisionError
    assert T.attend is attend
    records.clear()
    model(tokens[None], DOCS[None], WINDOWS)
    assert not records


def test_a_users_arm(tmp_path):
    layer = look.attention_maps(
        model_of(config(arm=TEMPERATURE)), tokens_like(DOCS), DOCS, WINDOWS
    )[0]
    assert layer.arm == "Temperature"
    assert layer.first.shape == (2, LENGTH, LENGTH)
    assert "afterwards" in layer.note
    source = "import torch\nimport train_gpt as T\n\n\nclass Mean(T.Softmax):\n"
    source += "    def forward(self, x, ve, ctx):\n"
    source += "        v = self.mix(self.v(x).unflatten(-1, (self.heads, -1)), ve)\n"
    source += "        n = torch.arange(1, x.size(1) + 1)[:, None, None]\n"
    source += "        return (v.cumsum(1) / n).flatten(2), v\n"
    (tmp_path / "mean.py").write_text(source)
    model = model_of(config(arm=f"{tmp_path / 'mean.py'}:Mean,layers=0"))
    mine, other, _ = look.attention_maps(model, tokens_like(DOCS), DOCS, WINDOWS)
    assert len(mine.first) == 0
    assert "does not call T.attend" in mine.note
    assert (other.arm, len(other.first), other.note) == ("softmax", 2, "")
    assert look.described(mine, DOCS)["heads"] == []
    assert look.packed([mine, other]) == look.packed([other])


# ---- Figures ------------------------------------------------------------------------------------


def hand_made() -> look.Layer:
    """Two heads, two documents of two and three tokens; the second head's maps are alike."""
    first = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])
    second = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0.5, 0.5]])
    both = torch.zeros(2, 2, 5, 5)
    both[:, :, 0, 0] = both[:, :, 1, 1] = 1  # the first document, where each looks at itself
    both[0, :, 2:, 2:], both[1, 0, 2:, 2:], both[1, 1, 2:, 2:] = first, second, first
    lam = torch.tensor([[9, 0.5, 9, 0.5, 1], [9, 1, 9, 1, 1]])
    return look.Layer("diff_v2", both[0], both[1], lam)


def test_figures_by_hand():
    """Queries 1, 3 and 4 count; 0 and 2 start a document, and their lambda of 9 would show."""
    docs = torch.tensor([0, 0, 1, 1, 1])
    mixed, same = look.head_figures(hand_made(), docs)
    # used: query 1 [0, 0.5], 3 [0, 0.5], 4 [0.25, -0.25, 0]
    assert mixed["sink"] == pytest.approx([0.75 / 3, 1 / 3, 0.25 / 3])
    assert mixed["entropy"] == pytest.approx([(0 + 1 + 1.5) / 3, (0 + 0 + 1) / 3, (0 + 0 + 1) / 3])
    assert mixed["cancelled"] == pytest.approx((0.5 + 0.5 + 0.75) / 3)
    assert mixed["negative"] == pytest.approx(0.25 / 3)
    assert mixed["lambda"] == pytest.approx(2 / 3)
    # lambda 1 and equal maps: all of it cancels, and nothing is left to have an entropy
    assert same["cancelled"] == pytest.approx(1)
    assert (same["negative"], same["sink"][2], same["entropy"][2]) == (0, 0, 0)
    plain = look.head_figures(look.Layer("softmax", hand_made().first), docs)[0]
    assert plain == {"sink": mixed["sink"][:1], "entropy": mixed["entropy"][:1]}


# ---- The page -----------------------------------------------------------------------------------


class Parsed(html.parser.HTMLParser):
    """Tags, attributes and the text of each script, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in zip(self.tags, self.texts) if name == tag]


def data_of(text: str) -> dict:
    return json.loads(Parsed(text).text_of("script")[0])


def unpacked(model: dict, length: int):
    """(layer, head, which, map [T, T]) for each map of the page, and each layer's lambda [H, T]."""
    values = np.frombuffer(base64.b64decode(model["maps"]), "<u2") / 65_535
    lam = np.frombuffer(base64.b64decode(model["lambda"]), "<f4").reshape(-1, length)
    maps, at = [], 0
    for i, layer in enumerate(model["layers"]):
        for h in range(len(layer["heads"]) if layer else 0):
            for which in range(1 + layer["two"]):
                full = np.zeros((length, length))
                for q in range(length):
                    full[q, : q + 1] = values[at : at + q + 1]
                    at += q + 1
                maps.append((i, h, which, full))
    assert at == len(values)
    return maps, lam


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look") / "a-run"
    return checkpoint(folder, arm="diff_v2,layers=0", no_attention=(1,))


def test_page_holds_the_maps(run, tmp_path):
    text = "The cat.\n\tThe cät"
    page = look.write([run], text, tmp_path / "look.html").read_text("utf-8")
    data = data_of(page)
    ids = [H.EOT, *text.encode()]
    assert data["tokens"][:4] == ["⟨start⟩", "T", "h", "e"]
    assert data["tokens"][9:11] == ["↵", "⇥"]
    assert data["tokens"][-3:] == ["\\xc3", "\\xa4", "t"]
    assert (len(data["tokens"]), data["total"]) == (len(ids), len(ids))
    (model,) = data["models"]
    assert model["name"] == "diff_v2,layers=0"
    assert model["about"].startswith("a-run: ")
    assert model["layers"][1] is None
    loaded, meta = T.load_model(run)
    tokens = torch.tensor(ids, dtype=torch.int32)
    window = T.windows(meta["window"], "cpu")
    layers = look.attention_maps(loaded, tokens, torch.zeros_like(tokens), window)
    maps, lam = unpacked(model, len(ids))
    assert len(maps) == 2 * 2 + 2  # two pairs, no attention, two heads
    for i, head, which, full in maps:
        want = (layers[i].second if which else layers[i].first)[head].numpy()
        assert np.abs(full - want).max() <= 0.5 / 65_535 + 1e-7
    assert np.array_equal(lam, layers[0].lam.numpy())
    figures = look.head_figures(layers[2], torch.zeros_like(tokens))
    assert model["layers"][2]["heads"] == [{k: list(v) for k, v in x.items()} for x in figures]


def test_a_long_text_is_cut(run, tmp_path):
    page = look.write([run], "abcdefgh" * 20, tmp_path / "look.html", max_tokens=12).read_text()
    data = data_of(page)
    assert (len(data["tokens"]), data["total"]) == (12, 161)


EVIL = (
    """</script><script>alert(1)</script><!-- <script> {{title}} {{data}} <img src=x onerror=y>"""
)


def test_a_text_stays_text(run, tmp_path):
    page = look.write([run], EVIL, tmp_path / "look.html", max_tokens=256).read_text("utf-8")
    plain = look.write([run], "a", tmp_path / "plain.html").read_text("utf-8")
    parsed, usual = Parsed(page), Parsed(plain)
    assert parsed.tags == usual.tags
    assert parsed.attributes == usual.attributes
    assert "".join(data_of(page)["tokens"]) == "⟨start⟩" + EVIL
    entry = {**data_of(plain)["models"][0], "name": EVIL, "about": EVIL}
    parsed = Parsed(look.page([entry], ["a", EVIL], 2))
    assert parsed.tags == usual.tags
    data, code = parsed.text_of("script")
    assert json.loads(data)["tokens"] == ["a", EVIL]
    assert code == usual.text_of("script")[1]
    assert parsed.text_of("title") == ["Where the heads look: " + EVIL + "\n"]


def test_the_page_needs_nothing_from_outside(run, tmp_path):
    page = look.write([run], "a", tmp_path / "look.html").read_text("utf-8")
    for word in ("http:", "https:", "//cdn", "src=", "url(", "@import", "import(", "fetch("):
        assert word not in page.lower()
    parsed = Parsed(page)
    assert not {"link", "img", "iframe", "object", "base"} & set(parsed.tags)
    assert any("default-src 'none'" in (value or "") for _, value in parsed.attributes)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in page


def test_twelve_layers_fit_in_two_megabytes():
    """12 layers of 12 pairs at 64 tokens, GPT-2's shape with diff_v2."""
    maps = torch.rand(12, 64, 64).tril()
    layers = [look.Layer("diff_v2", maps, maps, torch.rand(12, 64))] * 12
    docs = torch.zeros(64, dtype=torch.int32)
    entry = {"name": "a", "about": "", "maps": look.packed(layers)}
    entry |= {"lambda": look.packed_lambda(layers)}
    entry |= {"layers": [look.described(layer, docs) for layer in layers]}
    assert len(look.page([entry], ["x"] * 64, 64).encode()) < 2_000_000


@pytest.mark.parametrize(
    "piece, shown",
    [
        (b" the", " the"),
        ("é".encode(), "é"),
        (b"\xc3", "\\xc3"),
        (b"\n\n", "↵↵"),
        (b"\r\x00", "\\u000d\\u0000"),
        ("\u202eabc".encode(), "\\u202eabc"),
    ],
)
def test_tokens_can_be_seen(piece, shown):
    assert look.visible(piece) == shown


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), ""
)


@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
def test_in_a_browser(tmp_path):
    """The page's own code unpacks the maps: the last query's strongest key and its weights."""
    run = checkpoint(tmp_path / "r", arm="diff_v2,layers=0+2", no_attention=(1,), lambda_bias=0.5)
    text = "<script>document.title='caught'</script>"
    page = look.write([run, run], text, tmp_path / "look.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    dom = subprocess.run(
        [BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    assert dom.count('class="model"') == 2
    assert len(re.findall(r'<button[^>]*class="thumb', dom)) == 2 * 4
    assert dom.count("no attention</span>") == 2
    assert "<title>Where the heads look" in dom
    model = data_of(page.read_text("utf-8"))["models"][0]
    maps, lam = unpacked(model, len(text) + 1)
    cancelled = [head["cancelled"] for i in (0, 2) for head in model["layers"][i]["heads"]]
    best = int(np.argmax(cancelled))
    assert best == 2  # a head of the last layer: whatever is misplaced before it shows
    first, second = (maps[2 * best + which][3][-1] for which in (0, 1))
    used = first - lam[best, -1] * second
    key = int(np.abs(used).argmax())
    said = re.sub(r"<[^>]*>", "", re.search(r'<p class="readout".*?</p>', dom)[0])
    said = said.replace("\N{MINUS SIGN}", "-").replace("\N{MULTIPLICATION SIGN}", "x")
    want = f"({key}): {first[key]:.3f} - {lam[best, -1]:.3f} x {second[key]:.3f} = {used[key]:.3f}"
    assert said.endswith(want)


# ---- Command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["softmax", "diff_v1", "diff_v2,form=light+", TEMPERATURE])
def test_command(arm, tmp_path, capsys):
    folder, out = checkpoint(tmp_path / "r", arm=arm), tmp_path / "page.html"
    out.write_text("an older page")
    assert look.main([str(T.find_checkpoint(folder)), "Some text", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(str(out))
    assert data_of(out.read_text("utf-8"))["total"] == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "r"]


def test_an_exported_folder_shows_what_its_run_shows(tmp_path):
    pytest.importorskip("transformers")
    from evals import export

    run = checkpoint(tmp_path / "r", arm="diff_v2", ext_window=0)
    export.export(run, tmp_path / "hf", "fp32")
    page = look.write([run, tmp_path / "hf"], "Some text", tmp_path / "page.html")
    first, second = data_of(page.read_text("utf-8"))["models"]
    assert second["about"].startswith("hf: ")
    assert {**first, "about": ""} == {**second, "about": ""}


def test_several_models_and_the_usual_text(run, tmp_path):
    other, out = checkpoint(tmp_path / "g", "gpt2"), tmp_path / "page.html"
    assert look.main([str(run), str(other), "--out", str(out), "--max-tokens", "200"]) == 0
    data = data_of(out.read_text("utf-8"))
    assert [m["name"] for m in data["models"]] == ["diff_v2,layers=0", "softmax"]
    assert "".join(data["tokens"]).startswith("⟨start⟩The cat sat")
    assert len(data["tokens"]) == 200


def test_bad_words(run, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    other = checkpoint(tmp_path / "v", vocab=300)
    damaged = checkpoint(tmp_path / "d")
    (T.find_checkpoint(damaged) / "state.pt").write_bytes(b"no")
    out = tmp_path / "page.html"
    cases = [
        ([tmp_path / "nowhere"], "holds no whole checkpoint"),
        ([run, f"{tmp_path}/typo"], "holds no whole checkpoint"),
        ([tmp_path / "hf"], "Hugging Face folder"),
        ([run, other], "different vocabularies"),
        ([other], "--tokenizer"),
        ([damaged], "damaged"),
        ([run, ""], "empty"),
        ([run, "a\udce4"], "UTF-8"),
        ([run, "--max-tokens", "1"], "2 to 256"),
        ([run, "--max-tokens", "257"], "2 to 256"),
        ([run, "--out", tmp_path], "name a file"),
        ([run, "--out", tmp_path / "no" / "page.html"], "name a file"),
    ]
    for words, said in cases:
        before = sorted(tmp_path.rglob("*"))
        assert look.main(["--out", str(out), *map(str, words)]) == 2, words
        err = capsys.readouterr().err.strip()
        assert said in err
        assert len(err.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before
