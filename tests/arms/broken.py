"""Arms that must be refused, each for its own reason, and one that attends to nothing."""

import torch
import torch.nn.functional as F

import train_gpt as T


class FutureNorm(T.Softmax):
    """A GroupNorm over heads *and time*: its statistics see the future (a published 12 % win)."""

    def forward(self, x, ve, ctx):
        y, v = super().forward(x, ve, ctx)
        return F.group_norm(y.transpose(1, 2), self.heads).transpose(1, 2), v


class OneAhead(T.Softmax):
    """Reads the next token's value."""

    def forward(self, x, ve, ctx):
        y, v = super().forward(x, ve, ctx)
        return y + 0.01 * F.pad(y[:, 1:], (0, 0, 0, 1)), v


class CrossDocument(T.Softmax):
    """Causal, but a running mean goes on from one document into the next."""

    def forward(self, x, ve, ctx):
        y, v = super().forward(x, ve, ctx)
        count = torch.arange(1, y.size(1) + 1, dtype=y.dtype)[:, None]
        return y + y.cumsum(1) / count, v


class BeyondWindow(T.Softmax):
    """Causal and inside its document, but without the window."""

    def forward(self, x, ve, ctx):
        far = torch.ones_like(ctx.mask).cumsum(-1).transpose(-1, -2) >= 0
        causal = far.tril()
        same = ctx.mask | ctx.mask.transpose(-1, -2)
        for _ in range(8):  # documents are what the window's steps connect
            same = (same.float() @ same.float()) > 0
        return super().forward(x, ve, T.Context(same & causal, ctx.rope, ctx.scale))


class CrossRow(T.Softmax):
    """Statistics over the batch."""

    def forward(self, x, ve, ctx):
        y, v = super().forward(x, ve, ctx)
        return y - y.mean(0, keepdim=True), v


class Zero(T.Softmax):
    """No attention: what is left is a function of the present token."""

    def forward(self, x, ve, ctx):
        y, v = super().forward(x, ve, ctx)
        return y * 0, v
