"""evals/export.py: the folder computes the trainer's logits, with and without a cache, for every
arm; padding, generation, tokenizers, the Evaluation Harness; what is refused."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import helpers as H
import pytest
import torch
from test_data_text import open_text

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from evals import export, hf_tokenizer, sample  # noqa: E402
from variants import gpt2  # noqa: E402

T = H.T
EOT, LENGTH = 256, 400
TRAINED, EXTENDED = 256, 384  # windows [256, 128] and [384, 128]: all bind within LENGTH
SMALL = {
    **{"n_layer": 4, "d_model": 64, "n_head": 4, "head_dim": 16, "long_layers": (0, 3)},
    **{"vocab": 257, "skip": (0, 2), "backout": 1, "value_tables": 2, "ext_window": EXTENDED},
    **{"row_tokens": 512},
}
GPT2 = {
    **{"n_layer": 2, "d_model": 64, "n_head": 4, "head_dim": 16, "long_layers": (0, 1)},
    **{"vocab": 257, "ext_window": 0, "row_tokens": 512},
}
IDEAS = {
    **{"smear": True, "key_offset": True, "value_gate": True, "shifted_cap": True},
}
FAINT = {"score_scale": 0.1}  # or masked tokens would leave nothing to compare
CASES = {
    **{arm: ("demo", {"arm": arm}) for arm in H.BUILT_IN},
    "window2": ("demo", {"arm": "diff_v2,form=full,window2=20"}),
    "mixed": ("demo", {"arm": "diff_v1,layers=0+2,mlp=96"}),
    "xsa": ("demo", {"arm": "softmax", "xsa": True}),
    "xsa v2": ("demo", {"arm": "diff_v2", "xsa": True}),
    "plain": ("demo", {"gate": False, "value_tables": 0, "skip": (), "backout": -1, "x0": False}),
    "no attention": ("demo", {"arm": "diff_v2", "no_attention": (0, 2)}),
    "full rope": ("demo", {"arm": "diff_v2", "half_rope": False, "softcap": 0.0}),
    "no rope": ("demo", {"rope": False, "qk_norm": False, "bias": True, "score_scale": 0.3}),
    "wide head v1": ("demo", {"arm": "diff_v1,layers=1", "n_head": 1, "head_dim": 128}),
    "ideas": ("demo", {"arm": "diff_v2", **IDEAS}),
    "more ideas": ("demo", {"value_layers": (1, 3), **IDEAS}),
    "paired": ("demo", {"paired": (1, 2)}),
    "copy": ("demo", {"copy": True, "arm": "diff_v2"}),
    "ngram": ("demo", {"ngram": 256, "x0": False}),
    "all of 2026": ("demo", {"paired": (1, 2), "copy": True, "ngram": 256, **IDEAS}),
    "selective": ("demo", {"arm": "selective", **FAINT, "key_offset": True}),
    "selective v2": ("demo", {"arm": "diff_v2,selective=true,window2=20", **FAINT}),
    "narrow": ("demo", {"head_dim": 32, "qk_dim": 16, "xsa": True, **IDEAS}),
    "narrow v2": ("demo", {"arm": "diff_v2,window2=20,head_dim=32,qk_dim=16", "half_rope": False}),
    "narrow selective": ("demo", {"arm": "selective,head_dim=32,qk_dim=16", **FAINT}),
    "selective gpt2": ("gpt2", {"arm": "selective", "score_scale": 0.05}),
    "gpt2 v1": ("gpt2", {"arm": "diff_v1"}),
    "gpt2 v2": ("gpt2", {"arm": "diff_v2,form=light+", "gate": True}),
    "gpt2 windows": ("gpt2", {"arm": "softmax"}),  # they bind: no stock GPT-2
}
STOCK = ("gpt2", {"arm": "softmax", "mlp": 80})
SELECTIVE = ("selective", "selective v2")
NEW = ("paired", "copy", "ngram", "all of 2026")
CACHED = ("softmax", "diff_v1", "window2", "no attention", "ideas", "gpt2 v2", *NEW, *SELECTIVE)
CACHED += ("narrow", "narrow selective")
BAND = 50  # of the copy head, so that it binds, too


# ---- models -------------------------------------------------------------------------------------


def checkpoint(
    folder: Path, preset: str, changes: dict, window: int = TRAINED, table_dtype=None, **meta
) -> Path:
    """A run folder whose checkpoint has random parameters, none of them zero."""
    cfg = T.make_config(preset, **{**(GPT2 if preset == "gpt2" else SMALL), **changes})
    model = (gpt2.GPT2 if preset == "gpt2" else T.GPT)(cfg.model, LENGTH)
    H.randomise(model)
    if cfg.model.copy:
        model.pointer.gain.data.fill_(1.7)  # it points
    if cfg.model.ngram:
        model.ngram.make(table_dtype)
        model.ngram.table.normal_(generator=torch.Generator().manual_seed(1))
    meta = {
        **{"step": 8, "steps": 8, "tokens": 2048, "train_s": 1.5, "window": window},
        **{"arm": cfg.model.arm, "config": cfg.flat()},
        **meta,
    }
    T.save_checkpoint(folder / "ckpt", {"model": model.state_dict()}, meta, 1)
    return folder


class Pair:
    """A checkpoint's model as the trainer has it, and as a folder gives it."""

    def __init__(self, base: Path, preset: str, changes: dict, dtype: str = "fp32", window=TRAINED):
        self.run = checkpoint(base / "run", preset, changes, window)
        self.folder = base / "folder"
        self.done = export.export(self.run, self.folder, dtype)
        make = gpt2.GPT2 if preset == "gpt2" else None
        self.ours, self.meta = T.load_model(self.run, "cpu", LENGTH, make)
        self.theirs = load(self.folder)

    @torch.no_grad()
    def wanted(self, tokens: torch.Tensor, window: int = EXTENDED) -> torch.Tensor:
        docs = (tokens == EOT).cumsum(1).int()
        window = window if self.meta["config"]["ext_window"] else TRAINED
        return self.ours.logits(tokens, docs, T.windows(window, "cpu"))


def load(folder: Path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


@pytest.fixture(scope="module", autouse=True)
def own_modules_cache(tmp_path_factory):
    """The code of loaded folders is copied to the home directory otherwise."""
    with H.own_modules_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module", autouse=True)
def short_band():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "COPY_REACH", BAND)
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}

    def pair(name: str) -> Pair:
        if name not in made:
            base = tmp_path_factory.mktemp(name.replace(" ", "_").replace(",", "_"))
            made[name] = Pair(base, *CASES[name])
        return made[name]

    return pair


def some_tokens(batch: int = 1, length: int = LENGTH, seed: int = 0, documents=True):
    """Random bytes [batch, length]; a document every 60 tokens or so."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (batch, length), generator=gen)
    if documents:
        tokens[torch.rand(tokens.shape, generator=gen) < 1 / 60] = EOT
    tokens[:, 0] = EOT
    return tokens


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ---- the trainer's logits -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_the_trainers(name, pairs):
    """With documents, at the extended windows and at the trained ones. Measured: 0."""
    pair, tokens = pairs(name), some_tokens(2)
    got = pair.theirs(tokens).logits
    assert got.shape == (2, LENGTH, 257)
    assert got.dtype == torch.float32
    assert gap(got, pair.wanted(tokens)) < 1e-5
    whole = some_tokens(documents=False)  # one document: the windows decide
    far = pair.theirs(whole).logits
    assert gap(far, pair.wanted(whole)) < 1e-5
    config = pair.theirs.config
    assert config.trained_windows == [256, 128]
    if pair.meta["config"]["ext_window"]:
        trained = load(pair.folder, windows=config.trained_windows)(whole).logits
        assert gap(trained, pair.wanted(whole, TRAINED)) < 1e-5
        assert gap(trained[:, EXTENDED:], far[:, EXTENDED:]) > 1e-4  # the windows do bind


BF16 = ("diff_v1", "diff_v2", "selective v2", "gpt2 v1", "gpt2 v2", "all of 2026")


@pytest.mark.parametrize("name", BF16)
@torch.no_grad()
def test_bf16(name, tmp_path):
    """bf16 weights and activations, as the trainer has on a GPU. Measured: 0, once GPT-2's tables,
    which the trainer adds up in fp32, are rounded as the folder's are; bf16 itself costs 0.007 to
    0.08, and the tables' rounding 0.008."""
    pair, tokens = Pair(tmp_path, *CASES[name], dtype="bf16"), some_tokens(2)
    exact, got = pair.wanted(tokens), pair.theirs(tokens).logits
    theirs = pair.theirs.named_parameters()
    kept = {n: p.dtype == torch.float32 for n, p in theirs}
    words = ("lambda_qk", "head_gain", "residual_mix", "norm_", "copy_")
    assert kept == {n: any(word in n for word in words) for n in kept}
    make = gpt2.GPT2 if name.startswith("gpt2") else T.GPT
    ours = make(pair.ours.cfg, LENGTH, torch.bfloat16)
    ours.load_state_dict(pair.ours.state_dict())
    if make is gpt2.GPT2:
        for table in (ours.head, ours.position):
            table.copy_(table.bfloat16())
    pair.ours = ours.eval()
    cost = gap(exact, pair.wanted(tokens))
    assert gap(got, pair.wanted(tokens)) < 0.1 * cost
    assert gap(load(pair.folder, dtype=torch.float32)(tokens).logits, exact) < 2 * cost


@torch.no_grad()
def test_a_table_keeps_its_dtype(tmp_path):
    """One of a GPU's run, in bf16: not widened on the way, whatever the folder is loaded as,
    and there is no copy of it while the folder is made."""
    run = checkpoint(tmp_path / "run", *CASES["ngram"], table_dtype=torch.bfloat16)
    done = export.export(run, tmp_path / "folder", "fp32")
    table, tokens = done.model.model.ngram.table, some_tokens(2)
    assert done.parameters == sum(p.numel() for p in done.model.parameters()) + table.numel()
    (file,) = (tmp_path / "folder").glob("*.safetensors")
    assert load_file(file)[export.TABLE].dtype == torch.bfloat16
    ours, _ = T.load_model(run, "cpu", LENGTH)
    theirs = load(tmp_path / "folder", dtype=torch.float32)
    assert theirs.model.ngram.table.dtype == torch.bfloat16
    docs = (tokens == EOT).cumsum(1).int()
    wanted = ours.logits(tokens, docs, T.windows(EXTENDED, "cpu"))
    assert gap(theirs(tokens).logits, wanted) < 1e-5
    again, _ = sample.load(tmp_path / "folder", "cpu", LENGTH)
    assert again.ngram.table.dtype == torch.bfloat16
    assert torch.equal(again.ngram.table, ours.ngram.table)
    meta = sample.meta_of(run)
    built = export.build(ours, meta, EOT).model.ngram.table
    assert built.data_ptr() == ours.ngram.table.data_ptr()
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "`model.ngram.table`, 256 rows" in card
    file.write_bytes(save({}))
    with pytest.raises(T.InputError, match=r"does not fit.*model.ngram.table is not there"):
        sample.load(tmp_path / "folder")


@pytest.mark.parametrize("name", ["copy", "all of 2026"])
@torch.no_grad()
def test_a_copy_heads_logits_are_log_probabilities(name, pairs):
    """They sum to 1, the card says it, and most of some is copied."""
    pair, tokens = pairs(name), some_tokens(2)
    logits = pair.theirs(tokens).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, LENGTH), rtol=1e-5, atol=0)
    assert "log-probabilities" in (pair.folder / "README.md").read_text()
    bias = pair.theirs.pointer.copy_bias
    before = bias.clone()
    bias.fill_(-50.0)
    assert gap(pair.theirs(tokens).logits.exp(), logits.exp()) > 0.1
    bias.copy_(before)


@pytest.mark.parametrize("name", ["softmax", *NEW])
@torch.no_grad()
def test_the_loss_is_that_of_the_trainers_evaluation(name, pairs):
    """`LanguageModel.losses`, by which val_loss is measured, with a head that has no padding."""
    pair, tokens = pairs(name), some_tokens(2)
    ours, docs = pair.ours, (tokens == EOT).cumsum(1).int()
    head = T.Head(ours.head[:257], ours.softcap, torch.float32, False, False)
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], dim=1)
    batch = T.Batch(tokens.int(), targets, docs, None)
    h = ours(tokens, docs, T.windows(EXTENDED, "cpu"))
    nats = T.LanguageModel(ours, head).losses(h, batch)
    wanted = float(nats.sum()) / (targets >= 0).sum()
    assert float(pair.theirs(tokens, labels=tokens).loss) == pytest.approx(float(wanted), abs=1e-5)


@torch.no_grad()
def test_stock_gpt2(tmp_path):
    """No remote code; equal on a single document of at most 1,024 tokens."""
    pair = Pair(tmp_path, *STOCK, window=1024)
    theirs = AutoModelForCausalLM.from_pretrained(pair.folder).eval()
    assert type(theirs) is transformers.GPT2LMHeadModel
    assert not list(pair.folder.glob("*.py"))
    tokens = some_tokens(2, documents=False)
    wanted = pair.ours.logits(tokens, torch.zeros_like(tokens), T.windows(1024, "cpu"))
    assert gap(theirs(tokens).logits, wanted) < 1e-5
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    half = export.export(pair.run, tmp_path / "half")
    assert half.stock
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "changes",
    [
        *({"n_head": 2}, {"score_scale": 0.1}, {"long_layers": (0,)}, {"arm": "diff_v2,layers=1"}),
        *({"mlp": 80, "mlp_layers": (0,)}, {"gate": True}, {"xsa": True}, {"qk_norm": True}),
        {"bias": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_not_quite_gpt2(changes, tmp_path):
    """What GPT2LMHeadModel cannot compute comes with code of its own."""
    run = checkpoint(tmp_path / "run", "gpt2", changes, window=1024)
    done = export.export(run, tmp_path / "out")
    assert not done.stock
    assert done.difference < 1e-5


def test_needs_no_other_file(pairs, tmp_path):
    """A process that has nothing of this project: same logits, and text."""
    pair, tokens = pairs("diff_v2"), some_tokens()
    torch.save(tokens, tmp_path / "tokens.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.save(model(torch.load("tokens.pt")).logits.detach(), "logits.pt")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("ab", return_tensors="pt")
assert inputs.input_ids.tolist() == [[256, 97, 98]]
assert model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
assert not {"train_gpt", "evals", "variants"} & set(sys.modules)
"""
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(pair.folder)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert gap(torch.load(tmp_path / "logits.pt"), pair.wanted(tokens)) < 1e-5


# ---- cache and padding --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_cache_is_no_cache(name, pairs):
    """In pieces, then token by token; document bounds inside the cache and after it."""
    model, tokens = pairs(name).theirs, some_tokens(2)
    assert (tokens[:, 300:] == EOT).any()
    whole = model(tokens, use_cache=False)
    assert whole.past_key_values is None
    cache, got = None, []
    for piece in tokens.split([170, 130, *[1] * 100], dim=1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
        got.append(out.logits)
    assert gap(torch.cat(got, 1), whole.logits) < 2e-5
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("name", SELECTIVE)
@torch.no_grad()
def test_a_cropped_cache_takes_back_what_was_taken(name, pairs):
    """Other tokens were in the cache for a while, and took from the keys that are still there."""
    model, tokens = pairs(name).theirs, some_tokens(2)
    other = tokens[:, :150].clone()
    other[:, 100:] = (other[:, 100:] + 1) % 256
    cache = model(other).past_key_values
    cache.crop(-50)
    rest = model(tokens[:, 100:], past_key_values=cache).logits
    assert gap(rest, model(tokens).logits[:, 100:]) < 2e-5


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_padding_is_the_mask_alone(name, pairs):
    """Left and right padding, of whatever tokens; with a cache and without. The rows open in the
    middle of a document: no end-of-text keeps the padding out."""
    model, rows = pairs(name).theirs, [some_tokens(1, n + 1, seed=n)[:, 1:] for n in (300, 211, 90)]
    for side in ("left", "right"):
        tokens, mask = torch.full((3, 300), EOT), torch.zeros(3, 300, dtype=torch.long)
        tokens[2] = 7
        for i, row in enumerate(rows):
            where = slice(300 - row.size(1), None) if side == "left" else slice(row.size(1))
            tokens[i, where], mask[i, where] = row[0], 1
        got = model(tokens, attention_mask=mask).logits
        assert torch.isfinite(got).all()
        for i, row in enumerate(rows):
            assert gap(got[i, mask[i] == 1][None], model(row).logits) < 2e-5
        if side == "left":
            out = model(tokens[:, :200], attention_mask=mask[:, :200])
            rest = model(tokens[:, 200:], attention_mask=mask, past_key_values=out.past_key_values)
            assert gap(torch.cat([out.logits, rest.logits], 1)[:, 210:], got[:, 210:]) < 2e-5


@torch.no_grad()
def test_documents_do_not_see_each_other(pairs):
    model, tokens = pairs("diff_v2").theirs, some_tokens(documents=False)
    tokens[:, 200] = EOT
    before = model(tokens).logits
    tokens[:, 100] = (tokens[:, 100] + 1) % 256
    after = model(tokens).logits
    changed = (before != after).any(-1)[0]
    assert changed[100:200].all()
    assert not changed[:100].any()
    assert not changed[200:].any()


# ---- generation ---------------------------------------------------------------------------------


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the second padded on the left with end-of-text."""
    tokens, mask = some_tokens(2, 150, seed=5), torch.ones(2, 150, dtype=torch.long)
    tokens[1, :40], mask[1, :40] = EOT, 0
    assert tokens[1, 40] != EOT
    return tokens, mask


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_generate_greedy(name, pairs):
    """The argmax of the trainer's logits, token by token; the same in a padded batch."""
    pair, (tokens, mask) = pairs(name), prompts()
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    got = pair.theirs.generate(tokens, attention_mask=mask, **how)
    assert torch.equal(
        got, pair.theirs.generate(tokens, attention_mask=mask, use_cache=False, **how)
    )
    for i, start in enumerate((0, 40)):
        ids = tokens[i, start:][None]
        for _ in range(24):
            ids = torch.cat([ids, pair.wanted(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        assert ids[0].tolist() == got[i, start:].tolist()


@pytest.mark.parametrize("name", ["window2", "all of 2026", *SELECTIVE])
@torch.no_grad()
def test_generate_sampling_beams_and_lookup(name, pairs):
    """What reorders, repeats and crops the cache does it to the documents, too, and to what was
    taken from each key."""
    model, (tokens, mask) = pairs(name).theirs, prompts()

    def generate(**how):
        torch.manual_seed(3)
        fixed = {"max_new_tokens": 20, "eos_token_id": None, "attention_mask": mask}
        return model.generate(tokens, **{**fixed, **how})

    for how in (
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 3},
    ):
        assert torch.equal(generate(**how), generate(use_cache=False, **how)), how
    mask, tokens = mask[:1], tokens[:1].clone()
    tokens[0, 75:] = tokens[0, :75]  # so that a lookup finds something to try
    plain = generate(do_sample=False)
    assert torch.equal(plain, generate(do_sample=False, prompt_lookup_num_tokens=4))


def test_generate_ends_with_the_document(pairs):
    """End-of-text is the folder's eos and pad."""
    model, tokens = pairs("softmax").theirs, some_tokens(1, 20)
    head = model.lm_head.weight
    with torch.no_grad():
        row, state = head[EOT].clone(), model.model(tokens).last_hidden_state[0, -1]
        head[EOT] = 50 * state
        got = model.generate(tokens, max_new_tokens=9, do_sample=False)
        head[EOT] = row
    assert got[0, 20:].tolist() == [EOT]
    assert model.generation_config.pad_token_id == EOT


# ---- training further ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diff_v1", "all of 2026"])
def test_loss_and_gradients(name, pairs):
    """The loss of labels is cross-entropy over the real vocabulary, and every parameter learns."""
    pair, tokens = pairs(name), some_tokens(2)
    labels = tokens.clone()
    labels[:, :50] = -100
    out = pair.theirs(tokens, labels=labels)
    z = pair.wanted(tokens)[:, 49:-1].flatten(0, 1)
    assert (
        abs(out.loss.item() - torch.nn.functional.cross_entropy(z, tokens[:, 50:].flatten()).item())
        < 1e-5
    )
    out.loss.backward()
    for name, p in pair.theirs.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    pair.theirs.zero_grad()


@torch.no_grad()
def test_options_of_forward(pairs):
    model, tokens = pairs("diff_v2").theirs, some_tokens(2, 40)
    exact = copy.deepcopy(model).double()  # in fp32 a product of fewer rows may round otherwise
    last = exact(tokens, logits_to_keep=3).logits
    assert gap(last, exact(tokens).logits[:, -3:]) < 1e-6
    whole = model(tokens, output_hidden_states=True)
    assert len(whole.hidden_states) == 5
    assert gap(model(tokens, return_dict=False)[0], whole.logits) == 0
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 64))
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens, attention_mask=torch.ones(2, 1, 40, 40))
    with pytest.raises(ValueError, match="static"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="1024 positions"):
        pairs("gpt2 v1").theirs(some_tokens(1, 1025))


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu(pairs, tmp_path):
    """fp32 as on the CPU; bf16 within bf16's own rounding; the cache in generate."""
    tokens, mask = prompts()
    for name in CACHED:
        pair = pairs(name)
        model, exact = load(pair.folder).cuda(), pair.wanted(some_tokens(2))
        got = model(some_tokens(2).cuda()).logits.cpu()
        assert gap(got, exact) < 1e-3, name
        how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        how["attention_mask"] = mask.cuda()
        text = model.generate(tokens.cuda(), **how)
        assert torch.equal(text, model.generate(tokens.cuda(), use_cache=False, **how)), name
        half = Pair(tmp_path / name.replace(" ", "_"), *CASES[name], dtype="bf16").theirs
        cost = gap(half(some_tokens(2)).logits, exact)
        assert gap(half.cuda()(some_tokens(2).cuda()).logits.cpu(), exact) < 3 * cost, name


def test_saved_again(pairs, tmp_path):
    """save_pretrained keeps what was loaded, as after fine-tuning; GPT-2's head is tied."""
    pair, tokens = pairs("gpt2 v2"), some_tokens(1, 60)
    assert pair.theirs.lm_head.weight is pair.theirs.model.embed.weight
    untied = pairs("diff_v2").theirs
    assert untied.lm_head.weight is not untied.model.embed.weight
    pair.theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert gap(load(tmp_path / "again")(tokens).logits, pair.theirs(tokens).logits) == 0


# ---- the trainer's model again ------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_the_trainers_model_again(name, pairs):
    """Every number, those of rows that pad the vocabulary included; the meta but for places."""
    pair = pairs(name)
    model, meta = sample.load(pair.folder, "cpu", LENGTH)
    wanted, found = pair.ours.state_dict(), model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert {k: v for k, v in meta.items() if k != "config"} == {
        k: v for k, v in pair.meta.items() if k != "config"
    }
    differ = {k for k, v in meta["config"].items() if v != pair.meta["config"][k]}
    assert differ <= {"data", "out", "run_id", "resume"}


def test_stock_gpt2_is_the_trainers_model_again(tmp_path):
    """Joined and turned matrices, a tied head, weights in bf16."""
    pair = Pair(tmp_path, *STOCK, dtype="bf16", window=1024)
    assert pair.done.stock
    model, _ = sample.load(pair.folder, "cpu", LENGTH)
    wanted, found = pair.ours.state_dict(), model.state_dict()
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        vocab = slice(257) if key == "head" else slice(None)
        assert torch.equal(found[key][vocab], value[vocab].bfloat16().float()), key
    assert torch.equal(found["head"][257:], wanted["head"][257:])


def test_folders_that_are_no_model_of_the_trainer(pairs, tmp_path):
    def said(folder: Path) -> str:
        with pytest.raises(T.InputError) as e:
            sample.load(folder)
        return str(e.value)

    theirs = shutil.copytree(pairs("softmax").folder, tmp_path / "theirs")
    other = shutil.copytree(pairs("diff_v1").folder, tmp_path / "other")
    shutil.copy(other / "trainer.npz", theirs / "trainer.npz")
    assert "does not fit its own trainer.npz" in said(theirs)
    (theirs / "model.safetensors").write_bytes(b"no")
    assert "does not fit its own trainer.npz" in said(theirs)
    (theirs / "trainer.npz").write_bytes(b"no")
    assert "trainer.npz is damaged" in said(theirs)
    (theirs / "trainer.npz").unlink()
    assert "without trainer.npz" in said(theirs)


# ---- tokenizers ---------------------------------------------------------------------------------

TEXT = "The moon's 12 craters:\n\n  naïve   café — 月 \U0001f319\tend \x00."


MERGED = b"th|in| t|er|the|re|an|on|ing|and| a| the| and|  |\n\n|er |st|\xc3\xaf".split(b"|")


def write_tiktoken(path: Path, merged: list[bytes] = MERGED) -> Path:
    """All bytes, the last first, and some merges."""
    tokens = [bytes([255 - b]) for b in range(256)] + merged
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def same_tokens(ours, folder: Path, texts: list[str]) -> None:
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    encoder, eot = ours.encoder(), ours.vocab.eot
    for text in texts:
        ids = theirs(text).input_ids
        assert ids == encoder([text]).tokens.tolist()
        assert theirs(text, add_special_tokens=False).input_ids == ids[1:]
        assert theirs.decode(ids[1:]) == text
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == eot
    assert len(theirs) == ours.vocab.size
    batch = theirs(["ab", "a longer one"], padding=True)
    assert batch["input_ids"][0][0] == eot
    assert batch["attention_mask"][0][0] == 0
    bare = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, add_bos_token=False)
    assert bare("ab").input_ids == theirs("ab", add_special_tokens=False).input_ids


def test_byte_tokenizer(pairs):
    ours = sample.tokenizer_of({"config": {"vocab": 257}})
    same_tokens(ours, pairs("softmax").folder, [TEXT, "", "x"])


def test_tokenizer_from_ranks(tmp_path):
    """A tiktoken file of few merges: the tokens of tiktoken itself."""
    pytest.importorskip("tiktoken")
    file, size = write_tiktoken(tmp_path / "few.tiktoken"), 257 + len(MERGED)
    run = checkpoint(tmp_path / "run", "demo", {"vocab": size})
    export.export(run, tmp_path / "out", tokenizer=str(file))
    texts = [TEXT, *(t.decode() for t in H.docstrings(20_000))]
    ours = sample.tokenizer_of({"config": {"vocab": size}}, str(file))
    same_tokens(ours, tmp_path / "out", texts)
    # and from the folder just written, as any with a tokenizer.json
    export.export(run, tmp_path / "again", tokenizer=str(tmp_path / "out"))
    files = [tmp_path / folder / "tokenizer.json" for folder in ("out", "again")]
    assert files[0].read_text() == files[1].read_text()
    write_tiktoken(file, [b"th", b"xyz"])
    with pytest.raises(T.InputError, match="token 257 is no merge"):
        hf_tokenizer.load({"config": {"vocab": 259}}, str(file))


def test_gpt2_tokenizer(tmp_path):
    """Made from gpt2.tiktoken: the vocabulary and the merges of GPT-2's own tokenizer.json."""
    folder = open_text()
    ours = hf_tokenizer.load({"config": {"vocab": 50_257}}, str(folder / "tokenizer"))
    theirs = folder / "tokenizer_hf" / "tokenizer.json"
    if not theirs.is_file():
        pytest.skip("no tokenizer_hf/tokenizer.json to compare with")
    mine, published = json.loads(ours.to_str())["model"], json.loads(theirs.read_text())["model"]
    assert mine["merges"] == published["merges"]
    assert {**mine["vocab"], "<|endoftext|>": 50_256} == published["vocab"]
    taken = hf_tokenizer.load({"config": {"vocab": 50_257}}, str(theirs))
    texts = [TEXT, *(t.decode() for t in H.docstrings(100_000))]
    for text in texts:
        assert ours.encode(text).ids == taken.encode(text).ids
    assert ours.encode("The moon").ids == [50_256, 464, 8824]


# ---- the Evaluation Harness ---------------------------------------------------------------------

CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
WORDS = """\
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{max_gen_toks: 8, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match}}]
"""


def log_likelihood(pair: Pair, question: str, answer: str) -> float:
    """Of the answer's bytes behind end-of-text and the question, by the trainer's logits."""
    ids = torch.tensor([[EOT, *f"{question} {answer}".encode()]])
    chances = torch.log_softmax(pair.wanted(ids)[0, :-1], -1)
    each = chances.gather(1, ids[0, 1:, None])[:, 0]
    return float(each[-len(f" {answer}".encode()) :].sum())


def test_evaluation_harness(pairs, tmp_path):
    """Its log-likelihoods are the trainer's, in right-padded batches; its texts, made in
    left-padded ones, are the greedy ones."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    pair = pairs("diff_v2")
    docs = [
        {"question": q, "choices": ["yes", "perhaps not"], "label": i % 2}
        for i, q in enumerate(["Is it?", "Was that so, long ago?", "A", "Is the moon made of it?"])
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in (("choices", CHOICES), ("words", WORDS)):
        task = text.format(data=data, cache=tmp_path / "cache")
        (tmp_path / f"{name}.yaml").write_text(task)
    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(pair.folder), "trust_remote_code": True},
        tasks=["tiny_choices", "tiny_words"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        **{"batch_size": 4, "device": "cpu", "bootstrap_iters": 0, "log_samples": True},
    )
    right = 0
    for row in result["samples"]["tiny_choices"]:
        doc = row["doc"]
        got = [float(r[0][0]) for r in row["resps"]]
        wanted = [log_likelihood(pair, doc["question"], c) for c in doc["choices"]]
        assert got == pytest.approx(wanted, abs=1e-3)
        right += max(range(2), key=wanted.__getitem__) == doc["label"]
    assert result["results"]["tiny_choices"]["acc,none"] == right / 4
    tokenizer = AutoTokenizer.from_pretrained(pair.folder, trust_remote_code=True)
    for row in result["samples"]["tiny_words"]:
        inputs = tokenizer(row["doc"]["question"], return_tensors="pt")
        ids = pair.theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(ids[0, inputs.input_ids.size(1) :], skip_special_tokens=True)
        assert row["resps"][0][0] == text.split("\n\n")[0]


# ---- the folder, and what is refused ------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(text_data, tmp_path_factory):
    """A run of 8 steps with checkpoints after 4 and 8."""
    out = tmp_path_factory.mktemp("trained")
    how = {"save_final": True, "save_every": 4, "run_id": "r", "ext_window": 256}
    return Path(T.train(H.tiny(text_data, out, **how))["run"])


def test_card_has_the_figures_of_its_step(trained, tmp_path):
    vals = {(v["split"], v["step"]): v for v in H.read_log(trained, "val")}
    export.export(trained, tmp_path / "last")
    card = (tmp_path / "last" / "README.md").read_text()
    for split, name in (("dev", "dev_loss"), ("val", "val_loss"), ("val", "val_loss_ext")):
        assert f"| {vals[split, 8][name]:.4f} |" in card
    assert f"| {vals['val', 8]['bpb']:.4f} |" in card
    assert "| 8 of 8 |" in card
    assert "softmax" in card
    export.export(trained / "ckpt" / "step_00000004", tmp_path / "middle")
    card = (tmp_path / "middle" / "README.md").read_text()
    assert f"| {vals['dev', 4]['dev_loss']:.4f} |" in card
    assert "val loss" not in card
    assert "| 4 of 8 |" in card
    # windows: as val_loss_ext where there is one, those of its step else
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("last", "middle")]
    assert [c["windows"] for c in configs] == [[256, 128], [128, 128]]
    assert [c["trained_windows"] for c in configs] == [[128, 128]] * 2


def test_edited_log_is_refused(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    log = folder / "run.jsonl"
    log.write_text(log.read_text().replace('"step": 8', '"step": 9', 1))
    with pytest.raises(T.InputError, match="hash chain"):
        export.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    log.unlink()
    export.export(folder, tmp_path / "out")
    assert "no figures" in (tmp_path / "out" / "README.md").read_text()


def test_command_line(trained, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert export.main([str(trained), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "NCAForCausalLM" in printed
    assert "bf16" in printed
    assert sorted(p.name for p in out.iterdir()) == [
        *("README.md", "config.json", "configuration_nca.py", "generation_config.json"),
        *("model.safetensors", "modeling_nca.py", "tokenizer.json", "tokenizer_config.json"),
        "trainer.npz",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert load(out).dtype == torch.bfloat16
    assert export.main([str(trained), str(tmp_path / "fp32"), "--dtype", "fp32"]) == 0
    assert load(tmp_path / "fp32").dtype == torch.float32


def refused(words: list, capsys) -> str:
    """The one sentence; OUT, the second word, is as it was."""
    out = Path(words[1])
    before = sorted(out.rglob("*")) if out.is_dir() else out.exists()
    capsys.readouterr()
    assert export.main([str(word) for word in words]) == 2
    assert (sorted(out.rglob("*")) if out.is_dir() else out.exists()) == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_sentence_and_2(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no whole checkpoint" in refused([tmp_path / "nothing", out], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert "empty or new" in refused([trained, tmp_path / "full"], capsys)
    assert "empty or new" in refused([trained, tmp_path / "full" / "mine.txt"], capsys)
    assert "cannot write" in refused([trained, tmp_path / "full" / "mine.txt" / "out"], capsys)
    tokenizer = ["--tokenizer", write_tiktoken(tmp_path / "few.tiktoken")]
    assert "tokens, the model 257" in refused([trained, out, *tokenizer], capsys)
    assert "cannot read" in refused([trained, out, "--tokenizer", tmp_path / "none"], capsys)
    (tmp_path / "bad.json").write_text("{")
    assert "no tokenizer.json" in refused(
        [trained, out, "--tokenizer", tmp_path / "bad.json"], capsys
    )
    odd = checkpoint(tmp_path / "odd", "demo", {"vocab": 999})
    assert "--tokenizer FILE" in refused([odd, out], capsys)
    mine = checkpoint(
        tmp_path / "mine", "demo", {"arm": f"{H.ARMS / 'temperature.py'}:Temperature"}
    )
    assert "not built in" in refused([mine, out], capsys)
    meta = next((tmp_path / "odd").rglob("meta.json"))
    said = json.loads(meta.read_text())
    said["config"] |= {"vocab": 257, "arm": "diff_v1"}
    meta.write_text(json.dumps(said))
    (meta.parent / "DONE").write_text("")  # as in a checkpoint without meta.json's digest
    assert "does not fit its model" in refused([tmp_path / "odd", out], capsys)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_trainer_that_computes_something_else_is_refused(trained, tmp_path, monkeypatch):
    """The comparison before writing: with an idea that modeling_nca.py does not know."""
    forward = T.MLP.forward
    monkeypatch.setattr(T.MLP, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(T.InputError, match="does not"):
        export.export(trained, tmp_path / "out")
    monkeypatch.undo()
    start = T.GPT.__init__

    def with_one_more_parameter(self, *args):
        start(self, *args)
        self.novel = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(T.GPT, "__init__", with_one_more_parameter)
    run = checkpoint(tmp_path / "run", "demo", {})
    with pytest.raises(T.InputError, match=r"lacks what train_gpt.py has.*novel"):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
