"""What mixers are composed of.

B batch · T time · D width · H query heads · G key/value heads · K head size · F = 2 K features
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.mixers.base import Context
from convert.mixers.projections import Projections, Shape, weight_of

SILU_OF_ONE = 1.278464542761  # SiLU of it is 1: a gate that starts open (MOHAWK's official code)
# why a start is not exact
NO_MAPS = "its feature maps have yet to learn the softmax; swap in linear attention and align it first"
NO_SOFTMAX = "the layer is linear attention, which no softmax equals; start from the first teacher"


def wide(x: Tensor) -> Tensor:
    """In float32 at least: half precision is for matrix products."""
    return x if x.dtype == torch.float64 else x.float()


class HeadNorm(nn.RMSNorm):
    """In the dtype of its weight, whatever the projections are in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class QKV(nn.Module):
    """x [B, T, D] -> q [B, T, H, K], k, v [B, T, G, K]: projected, normed where the teacher does, rotated."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        inner, kv_inner = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q = nn.Linear(shape.width, inner, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.width, kv_inner, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.width, kv_inner, bias=shape.qkv_bias)
        self.q_norm = HeadNorm(shape.head_dim, eps=shape.norm_eps) if shape.norm_eps is not None else nn.Identity()
        self.k_norm = HeadNorm(shape.head_dim, eps=shape.norm_eps) if shape.norm_eps is not None else nn.Identity()

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x_BTD).unflatten(-1, (-1, self.shape.head_dim)) for p in (self.q, self.k, self.v))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    @torch.no_grad()
    def copy_(self, p: Projections) -> None:
        for linear, weight, bias in ((self.q, p.q, p.q_bias), (self.k, p.k, p.k_bias), (self.v, p.v, p.v_bias)):
            linear.weight.copy_(weight.flatten(0, 1))
            if bias is not None:
                linear.bias.copy_(bias.flatten())
        if p.q_norm is not None:
            self.q_norm.weight.copy_(p.q_norm)
            self.k_norm.weight.copy_(p.k_norm)

    def projections(self, o: Tensor, o_bias: Tensor | None, feature_maps=None) -> Projections:
        """The inverse of copy_, with an output projection o [D, H, K]."""
        linears, heads = (self.q, self.k, self.v), (-1, self.shape.head_dim)
        biases = [None if linear.bias is None else linear.bias.unflatten(0, heads) for linear in linears]
        norms = (None, None) if self.shape.norm_eps is None else (self.q_norm.weight, self.k_norm.weight)
        weights = (weight_of(linear).unflatten(0, heads) for linear in linears)
        return Projections(
            self.shape, *weights, o, *biases, o_bias, *norms, scale=self.shape.head_dim**-0.5, feature_maps=feature_maps
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first R dimensions of x [B, T, heads, K]; cos, sin [B, T, R], two-halves layout."""
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, -1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


class FeatureMap(nn.Module):
    """Hedgehog (arXiv 2402.04347; HedgeMamba, arXiv 2604.14191, Listing 3): phi(x) = softmax([Wx + b, -(Wx + b)]).

    x [B, T, heads, K] -> [B, T, heads, 2 K] in float32, positive, summing to one. W starts as the identity, b at zero
    (ours; the paper does not say)."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        u = wide(x.transpose(1, 2) @ self.weight.mT.to(x.dtype)) + self.bias[:, None]
        return torch.softmax(torch.cat([u, -u], -1), -1).transpose(1, 2)


class HedgehogHeads(nn.Module):
    """The projections of an attention layer with Hedgehog features of its queries and keys, and its output
    projection."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.qkv = QKV(shape)
        self.feature_q = FeatureMap(shape.num_heads, shape.head_dim)
        self.feature_k = FeatureMap(shape.num_kv_heads, shape.head_dim)
        self.out = nn.Linear(shape.num_heads * shape.head_dim, shape.width, bias=shape.out_bias)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q) [B, T, H, F], phi(k) [B, T, G, F], v [B, T, G, K], all float32."""
        q, k, v = self.qkv(x_BTD, cos, sin)
        return self.feature_q(q), self.feature_k(k), wide(v)

    @torch.no_grad()
    def copy_(self, p: Projections) -> None:
        self.qkv.copy_(p)
        self.out.weight.copy_(p.o.flatten(1))
        if p.o_bias is not None:
            self.out.bias.copy_(p.o_bias)
        if p.feature_maps is not None:
            for feature, (weight, bias) in zip((self.feature_q, self.feature_k), p.feature_maps, strict=True):
                feature.weight.copy_(weight)
                feature.bias.copy_(bias)

    def projections(self) -> Projections:
        """The inverse of copy_."""
        o = weight_of(self.out).unflatten(1, (-1, self.qkv.shape.head_dim))
        return self.qkv.projections(
            o, self.out.bias, tuple((feature.weight, feature.bias) for feature in (self.feature_q, self.feature_k))
        )


class ShortConv(nn.Module):
    """Causal depthwise convolution over `size` tokens that starts as the identity and sees no other document.

    x [B, T, D], state [B, size - 1, D] or None -> y [B, T, D], the next state."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, size))
        self.bias = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.weight[:, -1] = 1

    def forward(
        self, x: Tensor, real: Tensor | None, document_ids: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if real is not None:
            x = x * real[..., None]
        T, size = x.shape[1], self.weight.shape[1]
        if state is None:
            state = x.new_zeros(x.shape[0], size - 1, x.shape[2])
        seen = torch.cat([state.to(x.dtype), x], 1)
        weight = self.weight.to(x.dtype)
        y = F.conv1d(seen.mT, weight[:, None], self.bias.to(x.dtype), groups=x.shape[2]).mT
        tail = seen[:, T:]
        if document_ids is not None:
            documents = torch.cat([document_ids[:, :1].expand(-1, size - 1), document_ids], 1)
            same = documents.unfold(1, size, 1) == document_ids[..., None]  # [B, T, size]
            at = (~same.all(-1)).nonzero(as_tuple=True)  # the few tokens whose window reaches into another document
            fresh = (seen.unfold(1, size, 1)[at] * same[at][:, None] * weight).sum(-1) + self.bias
            y = y.index_put(at, fresh.to(y.dtype))
            tail = tail * (documents[:, T:] == document_ids[:, -1:])[..., None]
        return y, wide(tail).clone()  # a view would keep the whole text


class TimeStep(nn.Module):
    """Delta = softplus(W_up W_down x) through `rank` dimensions, exactly 1 everywhere at the start. [B, T, D] -> [B, T,
    size]."""

    def __init__(self, width: int, rank: int, size: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, size)
        nn.init.zeros_(self.up.weight)
        nn.init.constant_(self.up.bias, 0.541324854612918)  # softplus of it is 1

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(wide(self.up(self.down(x))))


class _NonNegative(torch.autograd.Function):
    """max(s, 0) with the gradient of the identity: gradients of micro-batches add up, and s = 0 is not dead."""

    @staticmethod
    def forward(ctx, s):
        return s.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g


class DecayRate(nn.Module):
    """Rates >= 0, [channels, states] or [heads]: the state decays by exp(-Delta rate). s = 0 is no decay, and can
    learn.

    rate = max(s, 0) (1 .. N): Mamba's spread of rates once s moves (ours; Mamba's own log parameter has no gradient at
    0)."""

    def __init__(self, *size: int):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(*size))

    def forward(self) -> Tensor:
        spread = torch.arange(1, self.s.shape[-1] + 1, device=self.s.device)
        return _NonNegative.apply(wide(self.s)) * spread


@torch.no_grad()
def project_gradients(model: nn.Module) -> None:
    """Where a rate is at its bound or below, leave only a gradient that would raise it. Called once per step, on the
    gradients of the whole batch: the signs of a micro-batch's gradients are not those of their sum."""
    for module in model.modules():
        if isinstance(module, DecayRate) and module.s.grad is not None:
            module.s.grad.masked_fill_((module.s <= 0) & (module.s.grad >= 0), 0)


def open_gate(width: int, inner: int) -> nn.Linear:
    """A projection whose SiLU starts at exactly 1."""
    gate = nn.Linear(width, inner)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, SILU_OF_ONE)
    return gate


class MambaBlock(nn.Module):
    """What both Mambas share: everything but the decay and the scan. `num_steps`: how many Deltas a token has."""

    def __init__(self, shape: Shape, conv: int, dt_rank: int | None, num_steps: int):
        super().__init__()
        inner = shape.num_heads * shape.head_dim
        self.conv = ShortConv(shape.width, conv)
        self.heads = HedgehogHeads(shape)
        self.time_step = TimeStep(shape.width, dt_rank or max(1, shape.width // 16), num_steps)
        self.skip = nn.Parameter(torch.zeros(inner))  # D
        self.gate = open_gate(shape.width, inner)

    def forward(self, x_BTD: Tensor, context: Context, conv_state: Tensor | None) -> tuple[Tensor, ...]:
        """C = phi(q), B = phi(k), v, Delta [B, T, num_steps], D [H K], the next state of the convolution. D comes along
        because a parameter is read by its own module's forward: what offloads weights puts them there for as long as
        that runs."""
        x, conv_state = self.conv(x_BTD, context.real, context.document_ids, conv_state)
        q, k, v = self.heads(x, context.cos, context.sin)
        dt = self.time_step(x)
        if context.real is not None:
            dt = dt * context.real[..., None]  # padding neither adds to the state nor lets it decay
        return q, k, v, dt, self.skip, conv_state
