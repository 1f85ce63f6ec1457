"""GPT-2 small as nanoGPT trains it, run by train_gpt.py's loop; its attention is the same switch.

Learned positions, LayerNorm, GELU, biases, a tied head, AdamW: no idea of the speedrun stack.
Twelve heads of 64 (diff_v2: 24 query and 6 KV heads, diff_v1: 6 pairs with values of 128).
Positions restart in each row of 1,024 tokens, in training and validation, so that its losses
compare with each other and with other models on rows of 1,024 alone.

    python variants/gpt2.py --data DIR --arm diff_v2     # train_gpt.py's flags; preset gpt2

Sources: karpathy/nanoGPT and karpathy/build-nanogpt (initialisation, AdamW, clipping, lr 6e-4 to
a tenth of it); Radford et al. 2019 (shape). The lr falls linearly, where theirs follows a cosine.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # run as a file: its own folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import train_gpt as T

BLOCK_SIZE = 1024  # tokens: positions there are
INIT_STD = 0.02
# What the speedrun stack has and GPT-2 lacks, and how a config says that it is off.
LACKS = {"rope": False, "softcap": 0.0, "x0": False, "skip": (), "backout": -1, "value_tables": 0}
LACKS |= {"no_attention": (), "fp8": False, "value_layers": (), "value_gate": False}
LACKS |= {"ngram": 0, "smear": False, "shifted_cap": False}
LACKS |= {"normuon": 0.0, "cautious_wd": 0.0, "tie": False, "adam_every": 1}
LACKS |= dict.fromkeys(("head_betas", "value_betas", "scalar_betas"), (0.8, 0.95))
LACKS |= {"cautious_adam_wd": 0.0, "paired": (), "copy": False, "mlp_fp8": "", "qk_dim": 0}

T.PRESETS["gpt2"] = {
    **{"require_gpu": True, **LACKS, "qk_norm": False, "gate": False, "bias": True},
    **{"n_head": 12, "head_dim": 64, "long_layers": tuple(range(12))},
    # matrix_lr is every group's lr; adam_wd falls on matrices alone.
    **{"matrix_lr": 6e-4, "adam_wd": 0.1, "adam_eps": 1e-8, "grad_clip": 1.0},
    **{"stages": (T.Stage(1.0, 65_536, 1.0, (BLOCK_SIZE, BLOCK_SIZE)),), "ext_window": 0},
    **{"warmup": 0.04, "cooldown": 0.96, "lr_floor": 0.1},
    **{"row_tokens": BLOCK_SIZE, "val_row_tokens": BLOCK_SIZE, "val_call_tokens": 65_536},
}


class LayerNorm(nn.Module):
    """LayerNorm with gain and bias, in fp32 as under nanoGPT's autocast; out comes `dtype`."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.gain = T.parameter((width,), ("constant", 1.0), "scalar")
        self.bias = T.parameter((width,), ("zeros",), "scalar")

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, 1e-5).to(self.dtype)


class MLP(nn.Module):
    """gelu(x W1 + b1) W2 + b2, with the tanh form of GELU."""

    def __init__(self, cfg: T.ModelConfig, layer: int):
        super().__init__()
        width = T.mlp_width(cfg, layer)
        self.up = T.Linear(width, cfg.d_model, bias=cfg.bias)
        self.down = T.Linear(cfg.d_model, width, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is fp32."""

    def __init__(self, cfg: T.ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.norm_attn, self.norm_mlp = (LayerNorm(cfg.d_model, dtype) for _ in range(2))
        self.attn, self.mlp = T.Attention(cfg, layer), MLP(cfg, layer)

    def forward(self, x: Tensor, ctx: T.Context) -> Tensor:
        x = x + self.attn(self.norm_attn(x), None, ctx)
        return x + self.mlp(self.norm_mlp(x))


class GPT2(T.GPT):
    """GPT-2 behind T.GPT's interface: forward(tokens, docs [B, T] int32, window [2]) -> hidden
    [B, T, d]; T <= 1,024. Contexts, score scale (head_dim^-1/2) and `logits` are T.GPT's own."""

    positions = BLOCK_SIZE

    def __init__(self, cfg: T.ModelConfig, max_length: int, dtype: torch.dtype = torch.float32):
        nn.Module.__init__(self)  # none of T.GPT's parameters
        self.cfg, self.dtype, self.softcap, self.flex, self.rope_dims = cfg, dtype, 0.0, None, []
        self.pointer = None
        # The tied matrix: the loop's Head adds its gradient to what autograd finds for the lookup.
        shape = (T.padded(cfg.vocab), cfg.d_model)
        self.head = T.parameter(shape, ("normal", INIT_STD), "head")
        self.position = T.parameter((BLOCK_SIZE, cfg.d_model), ("normal", INIT_STD), "embed")
        self.blocks = nn.ModuleList(Block(cfg, i, dtype) for i in range(cfg.n_layer))
        self.norm = LayerNorm(cfg.d_model, dtype)
        for name, module in self.named_modules():
            if isinstance(module, T.Linear):
                residual = name.endswith((".attn.o", ".mlp.down"))
                shrink = (2 * cfg.n_layer) ** -0.5 if residual else 1.0
                module.weight.init = ("normal", INIT_STD * shrink)

    def forward(self, tokens: Tensor, docs: Tensor, window: Tensor) -> Tensor:
        x = F.embedding(tokens, self.head) + self.position[: tokens.size(1)]
        for block, ctx in zip(self.blocks, self.contexts(docs, window), strict=True):
            x = block(x, ctx)
        return self.norm(x)


def assign(name: str, p: nn.Parameter) -> str:
    """Weight decay for matrices (tied table and positions too), none for biases, norms, lambda."""
    return "decay" if T.group_of(name, p) in ("matrix", "head", "embed") else "plain"


def make_optimizer(model: nn.Module, cfg: T.Config, world: T.World) -> T.Optimizer:
    """AdamW with one lr. eps is times LOSS_SCALE, as the gradients are."""
    o = cfg.optim
    adam = functools.partial(
        T.Group, "adam", o.matrix_lr, (0.9, 0.95), eps=o.adam_eps * T.LOSS_SCALE
    )
    return T.Optimizer(model, {"decay": adam(wd=o.adam_wd), "plain": adam()}, world, assign=assign)


def make_hooks(cfg: T.Config) -> T.Hooks:
    """The hooks of a GPT-2 run; InputError where the settings are another model's."""
    values = {name: getattr(getattr(cfg, T.FLAGS[name][0]), name) for name in LACKS}
    wrong = ["--" + name.replace("_", "-") for name in LACKS if values[name] != LACKS[name]]
    problems = []
    if wrong or cfg.preset != "gpt2":
        said = ", ".join(wrong) or f"preset {cfg.preset}"
        problems.append(f"variants/gpt2.py has no {said}: run it with --preset gpt2")
    if max(cfg.data.row_tokens, cfg.data.val_row_tokens) > BLOCK_SIZE:
        problems.append(f"GPT-2 has {BLOCK_SIZE} positions: rows are to be within")
    if problems:
        raise T.InputError("; ".join(problems))
    return T.Hooks(model=lambda c, n, dtype: GPT2(c.model, n, dtype), optimizer=make_optimizer)


def main(argv: list[str] | None = None) -> int:
    """train_gpt.py's command line with --preset gpt2; its exit codes."""
    argv = sys.argv[1:] if argv is None else argv
    given = any(a.partition("=")[0] == "--preset" for a in argv)
    return T.main(argv if given else ["--preset", "gpt2", *argv], make_hooks)


if __name__ == "__main__":
    sys.exit(main())
