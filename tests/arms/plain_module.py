"""An arm of torch's own layers, none of whose parameters say how they start or who updates them."""

from torch import nn

import train_gpt as T


class Plain(nn.Module):
    head_windows = None

    def __init__(self, cfg, layer):
        super().__init__()
        self.heads, self.dim = cfg.n_head, cfg.head_dim
        self.n_out = self.kv_width = cfg.n_head * cfg.head_dim
        self.qkv = nn.Linear(cfg.d_model, 3 * self.n_out)
        self.norm = nn.LayerNorm(cfg.d_model)

    def forward(self, x, ve, ctx):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.dim)).unbind(2)
        q, k = T.rotate(T.norm(q), ctx), T.rotate(T.norm(k), ctx)
        v = v if ve is None else v + ve.view_as(v)
        return T.attend(q, k, v, ctx).flatten(2), v

    def flops_per_token(self, mean_keys):
        return 4 * mean_keys * self.n_out
