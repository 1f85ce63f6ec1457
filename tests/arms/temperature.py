"""Your own attention: softmax in which every head learns how sharp it is."""

import torch

import train_gpt as T


class Temperature(T.Arm):
    def __init__(self, cfg, layer):
        h, d, dim = cfg.n_head, cfg.d_model, cfg.head_dim
        super().__init__(cfg, layer, pairs=h, heads_q=h, heads_kv=h)
        self.n_out = self.kv_width = h * dim
        self.q, self.k, self.v = (T.Linear(h * dim, d, bias=cfg.bias) for _ in range(3))
        self.sharp = T.parameter((h,), ("zeros",), "gate")

    def forward(self, x, ve, ctx):
        q, k, v = T.project(x, [self.q, self.k, self.v], self.cfg.head_dim)
        q, k = self.position(q, k, ctx)
        q = q * torch.exp(self.sharp.to(q.dtype))[:, None]
        v = self.mix(v, ve)
        return T.attend(q, k, v, ctx).flatten(2), v

    def flops_per_token(self, mean_keys):
        return 4 * mean_keys * self.n_out
