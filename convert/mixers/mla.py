"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), as Attention Editing's target (arXiv 2604.05688).

A token leaves behind one latent c = W x, from which keys and values of all heads are made, and a rotary key. Two
shapes:

* exact: a rotary key per key/value head, latents as they are; equals the teacher at full rank, its q/k norm and biases
included.
* native: one rotary key for all heads, RMSNorm on the latents, no biases: transformers' `deepseek_v3`.

B batch · T tokens of this call · S tokens so far · H query heads · G key/value heads · K head size · P rotary
dimensions of a key J rotary keys: G, or 1 · N = K - P (exact) or K (native) dimensions that are not rotated · C latent
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Checked, Range
from convert.mixers.base import AttentionShape, Context, Mixer, StateSize
from convert.mixers.parts import HeadNorm, rotate, wide

ABSORBED_QUERIES = 16  # at most, in one call (ours)
NATIVE_EPS = 1e-6  # of the RMSNorms in deepseek_v3, whatever its configuration says


class SplitNorm(HeadNorm):
    """The RMSNorm of a head, also of a part of it: `inverse_rms` [...] is of the whole, or None where only the weight
    is wanted."""

    def forward(self, x: Tensor, part: slice | None = None, inverse_rms: Tensor | None = None) -> Tensor:
        if part is None:
            return super().forward(x)
        weight = self.weight[part]
        return x * weight.to(x.dtype) if inverse_rms is None else x * inverse_rms[..., None] * weight


class MLA(Mixer):
    """Multi-head latent attention. Each token adds one row to the state.

    A few queries are taken to the latents (absorbed: keys and values are never made),
    many to the keys and values made of them (expanded)."""

    @dataclass(frozen=True)
    class Options(Checked):
        """`None`: as much as there is. `cache_budget`: the share of the teacher's keys and values to keep, from which
        the ranks that are not given follow. `start`: "calibrated" (by the layer's inputs; ours, after TransMLA, arXiv
        2502.07864), "svd" (joint, of the weights; X-EcoMLA, arXiv 2503.11132) or "random" but for the output projection
        (Attention Editing)."""

        shape: Literal["exact", "native"] = "exact"
        kv_rank: Annotated[int, Range(1, 1e6)] | None = None  # C
        rope_dim: Annotated[int, Range(2, 1e4)] | None = None  # P
        q_rank: Annotated[int, Range(1, 1e6)] | None = None  # of the queries; None: full
        cache_budget: Annotated[float, Range(0.001, 1)] | None = None
        start: Literal["calibrated", "svd", "random"] = "svd"

    class State(NamedTuple):
        latent: Tensor  # [B, S, C]
        rotary_key: Tensor  # [B, S, J, P]
        padding_mask: Tensor  # bool [B, S]: True at real tokens
        inverse_rms: Tensor  # of the keys, float32 [B, S, G]; [B, S, 0] without q/k norm

    model_dtype_fields = ("latent", "rotary_key")
    dials = {"cache_budget": (0.125, 0.25, 0.5)}
    can_be_replaced = False
    native_architecture = "deepseek_v3"

    def __init__(self, shape: AttentionShape, options: Options) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        heads, groups, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        native = options.shape == "native"
        self.rope_dim = options.rope_dim
        self.nope_dim = head_dim if native else head_dim - options.rope_dim
        self.rope_heads = 1 if native else groups
        self.scale = (self.rope_dim + self.nope_dim) ** -0.5
        norm = nn.RMSNorm if native else nn.Identity
        inner = heads * (self.rope_dim + self.nope_dim)
        if options.q_rank is None:
            self.q = nn.Linear(shape.width, inner, bias=shape.qkv_bias)
        else:
            self.q_down = nn.Linear(shape.width, options.q_rank, bias=False)
            self.q_latent_norm = norm(options.q_rank, eps=NATIVE_EPS)
            self.q = nn.Linear(options.q_rank, inner, bias=shape.qkv_bias)
        self.latent = nn.Linear(shape.width, options.kv_rank, bias=False)
        self.latent_norm = norm(options.kv_rank, eps=NATIVE_EPS)
        self.k_rope = nn.Linear(shape.width, self.rope_heads * self.rope_dim, bias=shape.qkv_bias)
        self.k_up = nn.Linear(options.kv_rank, groups * self.nope_dim, bias=shape.qkv_bias) if self.nope_dim else None
        self.v_up = nn.Linear(options.kv_rank, groups * head_dim, bias=shape.qkv_bias)
        self.q_norm = HeadNorm(head_dim, eps=shape.norm_eps) if shape.norm_eps is not None else None
        self.k_norm = SplitNorm(head_dim, eps=shape.norm_eps) if shape.norm_eps is not None else None
        self.out = nn.Linear(heads * head_dim, shape.width, bias=shape.out_bias)
        self.register_buffer("frequencies", torch.arange(self.rope_dim // 2))  # of the teacher's rotary table

    def state_size(self) -> StateSize:
        norms = 4 * self.shape.num_kv_heads if self.k_norm is not None else 0
        return StateSize(
            elements_per_token=self.options.kv_rank + self.rope_heads * self.rope_dim, bytes_per_token=1 + norms
        )

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        rotary = torch.cat([self.frequencies, self.frequencies])
        cos, sin = context.cos[..., rotary], context.sin[..., rotary]
        q = self.q(x_BTD if self.options.q_rank is None else _normed(self.q_latent_norm, self.q_down(x_BTD)))
        q = _by_heads(q, self.shape.num_heads)
        rope, latent = _by_heads(self.k_rope(x_BTD), self.rope_heads), _normed(self.latent_norm, self.latent(x_BTD))
        shape = x_BTD.shape[:2]
        mask = context.padding_mask
        real = torch.ones(shape, dtype=torch.bool, device=x_BTD.device) if mask is None else mask
        if mask is not None:
            latent, rope = latent * real[..., None], rope * real[..., None, None]  # padding leaves nothing behind
        inverse_rms = wide(latent.new_zeros(*shape, 0))
        if self.k_norm is not None:
            q = self.q_norm(q)
            keys = (
                rope
                if self.k_up is None
                else torch.cat([rope, _by_heads(self.k_up(latent), self.shape.num_kv_heads)], -1)
            )
            scale = torch.rsqrt(wide(keys).square().mean(-1) + self.shape.norm_eps)  # [B, T, G]
            rope = self.k_norm(wide(rope), slice(self.rope_dim), scale)
            inverse_rms = scale * real[..., None]
        q = torch.cat([rotate(q[..., : self.rope_dim], cos, sin), q[..., self.rope_dim :]], -1).to(latent.dtype)
        tokens = self.State(latent, rotate(rope, cos, sin).to(latent.dtype), real, inverse_rms)
        if state is not None:
            tokens = self.State(*(torch.cat([old.to(t.dtype), t], 1) for old, t in zip(state, tokens, strict=True)))
        unmasked = state is None and mask is None and context.document_ids is None
        visible = None if unmasked else _visible(tokens.padding_mask, context)
        is_absorbed = self._is_absorbed_cheaper(x_BTD.shape[1], tokens.latent.shape[1])
        attend = self._absorbed if is_absorbed else self._expanded
        scales = None if self.k_norm is None else tokens.inverse_rms
        y = attend(q, tokens.latent, tokens.rotary_key, scales, visible)
        return self.out(y.flatten(2)), _last_document(tokens, context)

    def _is_absorbed_cheaper(self, queries: int, tokens: int) -> bool:
        """Whether the absorbed form takes fewer multiplications, in all heads together. It is never taken for many
        queries, whose scores would be held, T x S for each head; nor where only a module's own forward knows its
        weights: an adapter, packed weights, weights that are elsewhere."""
        if queries > ABSORBED_QUERIES or not all(
            linear is None or _is_plain(linear) for linear in (self.k_up, self.v_up)
        ):
            return False
        s, rank = self.shape, self.options.kv_rank
        absorbed = queries * s.num_heads * (rank * (self.nope_dim + s.head_dim) + tokens * (2 * rank + self.rope_dim))
        made = tokens * rank * s.num_kv_heads * (self.nope_dim + s.head_dim)
        return absorbed < made + queries * s.num_heads * tokens * (self.nope_dim + self.rope_dim + s.head_dim)

    def _expanded(
        self, q: Tensor, latent: Tensor, rope: Tensor, scale: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        """[B, T, H, K]; q [B, T, H, P + N]. `visible` None: every token sees those before it."""
        groups, head_dim = self.shape.num_kv_heads, self.shape.head_dim
        keys, values = rope.expand(-1, -1, groups, -1), _by_heads(self.v_up(latent), groups)
        if self.k_up is not None:
            nope = _by_heads(self.k_up(latent), groups)
            if scale is not None:
                nope = self.k_norm(nope, slice(self.rope_dim, None), scale).to(keys.dtype)
            keys = torch.cat([keys, nope], -1)
        values = F.pad(values, (0, keys.shape[-1] - head_dim))  # torch's fast attention wants one head size
        q, k, v = (t.transpose(1, 2) for t in (q, keys, values))
        mask = None if visible is None else visible[:, None]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True)
        return y.transpose(1, 2)[..., :head_dim]

    def _absorbed(
        self, q: Tensor, latent: Tensor, rope: Tensor, scale: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        """The same, with the latents as keys and values of all heads: W_k goes into the queries, W_v behind the sum."""
        groups = self.shape.num_kv_heads
        rotated = q[..., : self.rope_dim].unflatten(2, (self.rope_heads, -1))
        scores = torch.einsum("btghp,bsgp->bghts", rotated, rope).flatten(1, 2)  # [B, H, T, S]
        if self.k_up is not None:
            nope = q[..., self.rope_dim :].unflatten(2, (groups, -1))
            if scale is not None:
                nope = self.k_norm(nope, slice(self.rope_dim, None))
            taken = torch.einsum("btghn,gnc->bghtc", nope, self.k_up.weight.to(q.dtype).unflatten(0, (groups, -1)))
            more = torch.einsum("bghtc,bsc->bghts", taken, latent)
            if self.k_up.bias is not None:
                bias = self.k_up.bias.to(q.dtype).unflatten(0, (groups, -1))
                more = more + torch.einsum("btghn,gn->bght", nope, bias)[..., None]
            if scale is not None:
                more = more * scale.transpose(1, 2)[:, :, None, None].to(more.dtype)
            scores = scores + more.flatten(1, 2)
        if visible is None:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()[None]
        weights = torch.softmax((wide(scores) * self.scale).masked_fill(~visible[:, None], -torch.inf), -1).to(
            latent.dtype
        )
        seen = torch.einsum("bhts,bsc->bthc", weights, latent).unflatten(2, (groups, -1))
        y = torch.einsum("btghc,gkc->btghk", seen, self.v_up.weight.to(seen.dtype).unflatten(0, (groups, -1)))
        if self.v_up.bias is not None:
            y = y + self.v_up.bias.to(y.dtype).unflatten(0, (groups, 1, -1))
        return y.flatten(2, 3)


def _is_plain(linear: nn.Module) -> bool:
    """Whether its forward is the product with its weight and no more, so that the weight may be read instead."""
    is_own = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and type(linear.weight.data) is Tensor
    is_hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return is_own and linear.weight.is_floating_point() and not linear.weight.is_meta and not is_hooked


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm computed in float32, as deepseek_v3 does."""
    return norm(wide(x)).to(x.dtype)


def _by_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _visible(padding_mask: Tensor, context: Context) -> Tensor:
    """[B, T, S]: which of the tokens so far, whose mask is [B, S], each of this call's T sees."""
    S, T, device = padding_mask.shape[1], context.cos.shape[1], padding_mask.device
    at, of = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)
    visible = (of <= at) & padding_mask[:, None]
    if context.document_ids is not None:
        documents = torch.cat([context.document_ids[:, :1].expand(-1, S - T), context.document_ids], 1)
        visible = visible & (documents[:, S - T :, None] == documents[:, None])
    return visible | (of == at)  # padding sees itself, or its softmax would be of nothing


def _last_document(tokens: MLA.State, context: Context) -> MLA.State:
    """The same tokens, but for those that later ones cannot see."""
    if context.document_ids is None:
        return tokens
    ids = context.document_ids
    earlier = tokens.padding_mask.shape[1] - ids.shape[1]
    last = F.pad(ids == ids[:, -1:], (earlier, 0), value=False)
    last[:, :earlier] = (ids == ids[:, -1:]).all(1, keepdim=True)
    return MLA.State(
        *(torch.where(last.view(*last.shape, *[1] * (t.ndim - 2)), t, torch.zeros_like(t)) for t in tokens)
    )
