"""Writes a trained model as a Hugging Face folder, which needs no other file of this project.

    python -m evals.export RUN OUT                      # a run folder, or one of its checkpoints
    python -m evals.export RUN OUT --tokenizer gpt2.tiktoken        # where it cannot be fetched

    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)

A softmax run of variants/gpt2.py with GPT-2's own settings becomes a stock GPT2LMHeadModel, which
every tool loads without remote code; everything else comes with evals/modeling_nca.py. Before
anything is written, the folder's model is compared with the trainer's.

Windows: the folder attends as far as `val_loss_ext` did, the figure by which tracks are ranked, for
a longer text is what the extension is for; what was trained is in `config.trained_windows`. A
checkpoint from the middle of a run, which has no `val_loss_ext`, keeps the windows of its step.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T
from data import shards
from evals import exported, hf_tokenizer, sample
from evals.configuration_nca import NCAConfig
from evals.modeling_nca import NCAForCausalLM
from records import logs
from variants import gpt2

CODE = ("configuration_nca.py", "modeling_nca.py")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ARMS = {T.Softmax: "softmax", T.DiffV1: "diff_v1", T.DiffV2: "diff_v2", T.Selective: "selective"}
ARMS |= {T.Paired: "paired"}
# The comparison: tokens, windows short enough to bind, and the largest difference of two logits.
# Measured: 0 at 12 x 768 on a CPU, 5e-7 for GPT2LMHeadModel; another BLAS may sum in another order.
CHECKED, CHECKED_WINDOWS, CHECKED_BAND, TOLERANCE = 256, (96, 40), 24, 1e-4
TABLE = "model.ngram.table"  # in the folder: a buffer, which no optimizer has


# ---- The trainer's model in other words ---------------------------------------------------------


def attention_spec(model: T.GPT, layer: int) -> dict | None:
    """A block's attention as NCAConfig describes it; None where it has none."""
    cfg, attn = model.cfg, model.blocks[layer].attn
    if attn is None:
        return None
    arm = attn.arm
    heads = arm.heads if isinstance(arm, T.Paired) else arm.heads_q  # which are one, in pairs
    key_dim = arm.q.weight.size(0) // heads
    value_dim = arm.n_out // arm.heads
    return {
        "arm": ARMS[type(arm)],
        "heads": arm.heads,
        "query_heads": heads,
        "key_heads": arm.k.weight.size(0) // key_dim,
        "value_heads": arm.kv_width // value_dim,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "scale": model.score_scale(key_dim),
        "window": 0 if layer in cfg.long_layers else 1,
        "second_window": cfg.window2 if arm.head_windows else None,
        "value_table": T.value_slot(cfg, layer),
        "lambda_init": getattr(arm, "lam_init", None),
        "key_offset": cfg.key_offset and layer in cfg.long_layers,
        "selectors": int(arm.selective),
    }


def windows_of(meta: dict) -> tuple[list[int], list[int]]:
    """The [long, short] windows to use, and those of the checkpoint's last step."""
    both = (sample.best_window(meta), int(meta["window"]))
    used, trained = (T.windows(long, "cpu").tolist() for long in both)
    return used, trained


def nca_config(model: T.GPT, meta: dict, eot: int) -> NCAConfig:
    """Everything that modeling_nca.py needs to know, resolved."""
    cfg, is_gpt2 = model.cfg, isinstance(model, gpt2.GPT2)
    used, trained = windows_of(meta)
    mlps = [block.mlp.up.weight.size(0) for block in model.blocks]
    return NCAConfig(
        vocab_size=cfg.vocab,
        hidden_size=cfg.d_model,
        num_attention_heads=cfg.n_head,
        max_position_embeddings=gpt2.BLOCK_SIZE if is_gpt2 else int(meta["config"]["row_tokens"]),
        family="gpt2" if is_gpt2 else "speedrun",
        windows=used,
        trained_windows=trained,
        blocks=[{"mlp": w, "attention": attention_spec(model, i)} for i, w in enumerate(mlps)],
        rotary=("half" if cfg.half_rope else "full") if cfg.rope else None,
        **{name: getattr(cfg, name) for name in ("qk_norm", "gate", "xsa", "bias")},
        **{name: getattr(cfg, name) for name in ("x0", "skip", "backout", "smear", "value_gate")},
        ngram=cfg.ngram,
        ngram_dtype=str(model.ngram.table.dtype).removeprefix("torch.") if cfg.ngram else None,
        copy_band=int(model.pointer.band) if cfg.copy else 0,
        softcap=model.softcap,
        value_tables=[] if is_gpt2 else [table.size(1) for table in model.values],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot),
        tie_word_embeddings=is_gpt2,
        architectures=["NCAForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_nca.NCAConfig",
            "AutoModelForCausalLM": "modeling_nca.NCAForCausalLM",
        },
    )


def attention_state(attn: T.Attention) -> dict[str, Tensor]:
    """The parameters of one attention. Two maps, stored map-major, come out with heads in pairs."""
    arm = attn.arm
    names = {"gate": "gate.weight", "ve_mix": "value_mix", "gain": "head_gain"}
    names |= {"value_gate": "value_gate.weight"}
    names |= {"lam": "lambda_qk" if isinstance(arm, T.DiffV1) else "lam.weight"}
    names |= {"lam_bias": "lam.bias"}
    out = {}
    for name, p in attn.named_parameters():
        name = name.removeprefix("arm.")
        if getattr(getattr(arm, name.partition(".")[0], None), "maps", 1) == 2:
            p = p.unflatten(0, (2, arm.heads, -1)).transpose(0, 1).flatten(0, 2)
        out[names.get(name, name)] = p
    return out


def nca_state(model: T.GPT) -> dict[str, Tensor]:
    """Every parameter, and those buffers that are no constants, under the name that it has in
    modeling_nca.py, vocabularies unpadded."""
    vocab, state, tables = model.cfg.vocab, {}, getattr(model, "values", ())
    names = {"embed": "model.embed.weight", "head": "lm_head.weight"}
    names |= {f"values.{i}": f"model.values.{i}.weight" for i in range(len(tables))}
    of_tokens = set(names)
    names |= {"resid": "model.residual", "mix": "model.residual_mix"}
    names |= {"position": "model.position.weight"}
    names |= {"norm.gain": "model.norm_out.weight", "norm.bias": "model.norm_out.bias"}
    names |= {f"pointer.{n}.weight": f"pointer.{n}.weight" for n in "qk"}
    names |= {f"pointer.{n}": f"pointer.copy_{n}" for n in ("gain", "sink", "gate", "bias")}
    for name, p in model.named_parameters():
        if ".attn." not in name:  # GPT-2's norms say gain
            name_there = names.get(name, f"model.{name.replace('.gain', '.weight')}")
            state[name_there] = p[:vocab] if name in of_tokens else p
    if model.cfg.ngram:
        state["model.ngram.signs"] = model.ngram.signs
        if model.ngram.table is not None:
            state[TABLE] = model.ngram.table
    if isinstance(model, gpt2.GPT2):
        state["model.embed.weight"] = state["lm_head.weight"]
    for i, block in enumerate(model.blocks):
        if block.attn is not None:
            own = attention_state(block.attn)
            state |= {f"model.blocks.{i}.attn.{name}": p for name, p in own.items()}
    return state


# ---- GPT-2 as it is -----------------------------------------------------------------------------


def is_stock(model: T.GPT, meta: dict) -> bool:
    """Whether transformers' own GPT2LMHeadModel computes the same for a single document."""
    cfg = model.cfg
    if not isinstance(model, gpt2.GPT2):
        return False
    arms = {type(block.attn.arm) for block in model.blocks}
    long, short = T.windows(int(meta["window"]), "cpu").tolist()
    reach = min(long if i in cfg.long_layers else short for i in range(cfg.n_layer))
    return (
        arms == {T.Softmax}
        and reach >= gpt2.BLOCK_SIZE
        and cfg.n_head * cfg.head_dim == cfg.d_model
        and model.score_scale(cfg.head_dim) == cfg.head_dim**-0.5
        and len({block.mlp.up.weight.size(0) for block in model.blocks}) == 1
        and cfg.bias
        and not (cfg.qk_norm or cfg.gate or cfg.xsa)
    )


def stock_config(model: gpt2.GPT2, eot: int) -> transformers.GPT2Config:
    cfg = model.cfg
    return transformers.GPT2Config(
        vocab_size=cfg.vocab,
        n_positions=gpt2.BLOCK_SIZE,
        n_embd=cfg.d_model,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_inner=model.blocks[0].mlp.up.weight.size(0),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot),
        architectures=["GPT2LMHeadModel"],
    )


def stock_state(model: gpt2.GPT2) -> dict[str, Tensor]:
    """The parameters as GPT2LMHeadModel names them; its Conv1D holds [in, out]."""
    state = {"lm_head.weight": model.head[: model.cfg.vocab]}
    state["transformer.wte.weight"] = state["lm_head.weight"]
    state["transformer.wpe.weight"] = model.position

    def put(name: str, *linears: T.Linear) -> None:
        state[f"{name}.weight"] = torch.cat([linear.weight for linear in linears]).t()
        state[f"{name}.bias"] = torch.cat([linear.bias for linear in linears])

    def put_norm(name: str, norm: gpt2.LayerNorm) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = norm.gain, norm.bias

    put_norm("transformer.ln_f", model.norm)
    for i, block in enumerate(model.blocks):
        at, arm = f"transformer.h.{i}", block.attn.arm
        put_norm(f"{at}.ln_1", block.norm_attn)
        put_norm(f"{at}.ln_2", block.norm_mlp)
        put(f"{at}.attn.c_attn", arm.q, arm.k, arm.v)
        put(f"{at}.attn.c_proj", block.attn.o)
        put(f"{at}.mlp.c_fc", block.mlp.up)
        put(f"{at}.mlp.c_proj", block.mlp.down)
    return state


# ---- Building and comparing ---------------------------------------------------------------------


def state_of(model: T.GPT, meta: dict) -> dict[str, Tensor]:
    """The model's numbers under the names of its folder. They are moved and never changed, which
    evals/exported.py relies on."""
    return stock_state(model) if is_stock(model, meta) else nca_state(model)


def build(model: T.GPT, meta: dict, eot: int) -> transformers.PreTrainedModel:
    """The trainer's model as transformers', fp32, on the CPU. Only an n-gram table, of which a
    second may not fit, is the trainer's own, wherever it is."""
    stock = is_stock(model, meta)
    state = {k: p.detach() for k, p in state_of(model, meta).items()}
    if stock:
        theirs = transformers.GPT2LMHeadModel(stock_config(model, eot))
    else:
        config = nca_config(model, meta, eot)
        with torch.device("meta"):  # or there would be two tables for a moment
            theirs = NCAForCausalLM(config)
        state |= {k: p.to("cpu", copy=True) for k, p in state.items() if k != TABLE}
    try:
        theirs.load_state_dict(state, assign=not stock)
        theirs.tie_weights()
    except RuntimeError as e:
        said = " ".join(str(e).split())
        raise T.InputError(f"evals/modeling_nca.py lacks what train_gpt.py has: {said}") from None
    return theirs.eval()


@torch.no_grad()
def difference(theirs: transformers.PreTrainedModel, ours: T.GPT, eot: int) -> float:
    """The largest difference between two logits in a row of CHECKED random tokens, fp32: documents
    of about 50 tokens and short windows, or one document where GPT-2 knows neither."""
    gen = torch.Generator().manual_seed(0)
    tokens, windows = torch.randint(eot, (1, CHECKED), generator=gen), (T.NO_LIMIT, T.NO_LIMIT)
    config, own = theirs.config, getattr(theirs.config, "windows", None)
    if own:
        tokens[torch.rand(tokens.shape, generator=gen) < 0.02] = eot
        config.windows = windows = CHECKED_WINDOWS
    band = ours.pointer and config.copy_band
    if band:
        config.copy_band = CHECKED_BAND
        ours.pointer.band.fill_(CHECKED_BAND)
    docs = (tokens == eot).cumsum(1).int()
    got = theirs(tokens).logits
    wanted = ours.logits(tokens, docs, torch.tensor(windows, dtype=torch.int32))
    if own:
        config.windows = own
    if band:
        config.copy_band = band
        ours.pointer.band.fill_(band)
    return float((got - wanted).abs().max())


# ---- The folder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What was written: the model, its largest difference from the trainer's logits, its weights'
    dtype."""

    folder: Path
    model: transformers.PreTrainedModel
    difference: float
    dtype: str

    @property
    def stock(self) -> bool:
        return isinstance(self.model, transformers.GPT2LMHeadModel)

    @property
    def parameters(self) -> int:
        """With the numbers of an n-gram table, which was learned, too."""
        table = dict(self.model.named_buffers()).get(TABLE)
        learned = sum(p.numel() for p in self.model.parameters())
        return learned + (0 if table is None else table.numel())


def export(path: str | Path, out: str | Path, dtype: str = "bf16", tokenizer: str = "") -> Exported:
    """Writes the folder `out` for a run or checkpoint folder; InputError where that cannot be, and
    then nothing is written. `dtype`: a key of DTYPES. `tokenizer`: see hf_tokenizer.load."""
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise T.InputError(f"{out} is there already: name a folder that is empty or new")
    meta = sample.meta_of(path)
    refuse_own_arm(meta)
    words = hf_tokenizer.load(meta, tokenizer)
    eot = words.token_to_id(hf_tokenizer.END_OF_TEXT)
    ours, _ = sample.load(path, "cpu", CHECKED)
    theirs = build(ours, meta, eot)
    tuned = (meta.get("labels") or {}).get("finetuned")
    if tuned:  # evals/task.py reads it: some tasks mean nothing for this model
        theirs.config.finetuned = tuned
    apart = difference(theirs, ours, eot)
    if not apart <= TOLERANCE:
        raise T.InputError(
            f"the folder's model would be {apart:.1e} from the trainer's logits: train_gpt.py "
            "computes what evals/modeling_nca.py does not"
        )
    done = Exported(out, cast(theirs, DTYPES[dtype]), apart, dtype)
    card = model_card(done, meta, run_of(path))
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        write(done, words, card, aside)
        exported.write(aside, ours, meta, CHECKED)
        os.rename(aside, out)  # over an empty folder, too
    except OSError as e:
        raise T.InputError(f"cannot write {out}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return done


def refuse_own_arm(meta: dict) -> None:
    arm, _ = T.parse_arm(meta["config"]["arm"])
    if arm not in T.ARMS:
        raise T.InputError(
            f"arm {arm!r} is not built in: a folder needs modelling code of its own for it, and "
            f"evals/modeling_nca.py has {', '.join(T.ARMS)}"
        )


def cast(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The weights in `dtype`, but for the few that the trainer computes with in fp32, and for an
    n-gram table, which keeps its own."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name, p in model.named_parameters():
        if not any(word in name for word in kept):
            p.data = p.data.to(dtype)
    model.config.dtype = dtype
    return model


def write(done: Exported, words, card: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    model = done.model
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id")}
    model.generation_config = transformers.GenerationConfig(pad_token_id=ids["eos_token_id"], **ids)
    model.save_pretrained(folder)
    hf_tokenizer.save(words, folder, model.config.max_position_embeddings)
    if not done.stock:
        for name in CODE:
            shutil.copy(Path(__file__).with_name(name), folder / name)
    (folder / "README.md").write_text(card)


# ---- The card -----------------------------------------------------------------------------------


def run_of(path: str | Path) -> logs.Run | None:
    """The run that a checkpoint belongs to, or None where its log is not beside it."""
    folder = T.find_checkpoint(path).parents[1]
    if not logs.log_of(folder).is_file():
        return None
    try:
        return logs.load_run(folder)
    except logs.BadLog as e:
        raise T.InputError(f"{e}: without {folder}/run.jsonl the card has no figures") from None


def figures(run: logs.Run, meta: dict) -> dict[str, str]:
    """What the log says of this checkpoint: losses are those of its own step, none of a later."""
    h, env, step = run.header, run.header["env"], meta["step"]
    tuned = [entry["trained_on"] for entry in run.labels.get("finetuned", [])]
    files = [f"{d['name']} ({d['sha256'][:12]})" for d in h["data"]]
    more = f" and {len(files) - 8:,} files more" if len(files) > 8 else ""
    out = {
        "arm": f"`{h['arm']}`",
        "preset, seed, data seed": f"{h['preset']}, {h['seed']}, {h['data_seed']}",
        "step": f"{step:,} of {meta['steps']:,}",
        "tokens trained": f"{meta['tokens']:,}",
        "training time": f"{meta['train_s']:.1f} s",
        "machine": f"{env['count']}x {env['gpu'] or 'CPU'}, torch {env['torch']}",
        "parameters": ", ".join(f"{n:,} {kind}" for kind, n in h["params"].items()),
    }
    if tuned:
        out["fine-tuned on"] = ", then ".join(tuned)
    names = {
        "dev_loss": "dev loss, nats a token",
        "val_loss": "val loss at the trained windows, nats a token",
        "val_loss_ext": "val loss at the extended windows, nats a token",
    }
    at_step = [val for val in run.vals if val["step"] == step]
    for val in at_step:
        out |= {text: f"{val[name]:.4f}" for name, text in names.items() if name in val}
        if val["bpb"] is not None:
            out[f"{val['split']} bits a byte"] = f"{val['bpb']:.4f}"
    out["data (sha256)"] = ", ".join(files[:8]) + more
    out["log, last hash"] = f"{run.run_id}, {run.last_h}"
    return out


USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
inputs = tokenizer("The moon is", return_tensors="pt")  # <|endoftext|> comes first by itself
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=True)[0]))
```

    lm_eval --model hf --model_args pretrained=FOLDER{trust_eval},add_bos_token=True --tasks ...
"""

NOTES = """\
- Documents are what end-of-text ids in `input_ids` open; attention stays within one. Padding is
  what `attention_mask` says, on either side.
- Attention windows, tokens: {windows} in long and short layers, as in `val_loss_ext` where the run
  has one; trained last: {trained}. `from_pretrained(..., windows={trained})` computes exactly
  what was trained.
- The key-value cache is a `DynamicCache` that keeps all keys; static caches and attention kernels
  other than torch's SDPA are not supported.
"""

COPY_NOTE = """\
- A copy head is mixed into the output: `logits` are log-probabilities, which a softmax leaves as
  they are.
"""

TABLE_NOTE = """\
- `{name}`, {rows:,} rows for pairs and triples of tokens, is a buffer in {dtype},
  whatever the other weights are loaded as: training this folder further leaves it as it is.
"""

STOCK_NOTES = """\
- A stock `GPT2LMHeadModel`: it knows no documents, so put one document of at most {positions:,}
  tokens in a row; there its logits are the trainer's.
"""

COMMON_NOTES = """\
- Logits cover the {vocab:,} tokens of the vocabulary. The trainer's loss also counts the padding
  rows of its head, so that the loss here is lower by what it gives to them.
- Every training document began with `<|endoftext|>`, and the tokenizer puts it there. In the
  Evaluation Harness, tasks of the rolling kind (wikitext) put one there themselves: for them
  `add_bos_token=False`.
- Weights are {dtype}. In fp32 the logits were {apart:.1g} from the trainer's at most, over a row of
  {checked} tokens.
"""


def model_card(done: Exported, meta: dict, run: logs.Run | None) -> str:
    """README.md of the folder."""
    config = done.model.config
    trust = "" if done.stock else ", trust_remote_code=True"
    notes = STOCK_NOTES.format(positions=gpt2.BLOCK_SIZE)
    if not done.stock:
        notes = NOTES.format(windows=config.windows, trained=config.trained_windows)
        notes += COPY_NOTE if config.copy_band else ""
        if config.ngram:
            notes += TABLE_NOTE.format(name=TABLE, rows=config.ngram, dtype=config.ngram_dtype)
    notes += COMMON_NOTES.format(
        vocab=config.vocab_size, dtype=done.dtype, apart=done.difference, checked=CHECKED
    )
    table = "No run log was beside the checkpoint, so there are no figures here.\n"
    if run is not None:
        rows = [f"| {name} | {value} |\n" for name, value in figures(run, meta).items()]
        table = "| | |\n| --- | --- |\n" + "".join(rows)
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
    title = f"# {run.run_id if run else done.folder.name}\n\n"
    intro = (
        f"A language model of {done.parameters:,} parameters, {config.num_hidden_layers} layers of "
        f"width {config.hidden_size}, attention `{meta['arm']}`, trained by train_gpt.py.\n\n"
    )
    use = USE.format(trust=trust, trust_eval=trust.replace(", ", ","))
    return f"{head}{title}{intro}{table}\n## Use\n\n{use}\n## Good to know\n\n{notes}"


# ---- Command line -------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, or a checkpoint in it (ckpt/step_*)")
    add("out", metavar="OUT", help="the folder to write: new, or empty")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights (bf16)")
    add(
        "--tokenizer",
        default="",
        metavar="PATH",
        help="tiktoken file or tokenizer.json, or a folder with one; not needed for bytes, nor "
        "where GPT-2's can be fetched",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Writes the folder and says so; 2 for bad input, with one sentence."""
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        done = export(args.model, args.out, args.dtype, args.tokenizer)
    except (T.InputError, shards.InputError) as e:
        print(f"export: {e}", file=sys.stderr)
        return 2
    size = sum(f.stat().st_size for f in done.folder.glob("*.safetensors"))
    trust = "" if done.stock else ", trust_remote_code=True"
    print(
        f"{done.folder}: {type(done.model).__name__}, {done.parameters:,} parameters in "
        f"{done.dtype}, {size / 1e6:,.1f} MB; logits at most {done.difference:.1g} from the "
        f"trainer's\nAutoModelForCausalLM.from_pretrained({str(done.folder)!r}{trust})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
