"""Gated DeltaNet (arXiv 2412.06464) in the place of an attention layer, exactly as transformers' `qwen3_5_text` has it:
a state that decays by head and is corrected, token by token, towards the values of its keys.

q, k, v = silu(conv(W x)) · S_t = (I - beta k k^T) exp(g_t) S_{t-1} + beta k v^T with q and k of length 1 ·
y = norm(S_t^T q / sqrt(K)) silu(z x), then the output projection. Neither positions nor biases, but that of the decay:
g = -exp(A_log) softplus(a x + dt_bias).

B batch · T time · H heads, those of the teacher's queries · K head size
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Checked, Range
from convert.mixers.base import AttentionShape, Context, Mixer, StateSize
from convert.mixers.parts import HeadNorm, ShortConv, wide
from kernels.delta_rule import gated_delta_rule, operations

NORM_EPS = 1e-6  # of the norm of heads where the teacher's attention has none, as Qwen3.5's


class GDN(Mixer):
    """A delta rule with one decay per head, behind a convolution, a norm and a gate."""

    @dataclass(frozen=True)
    class Options(Checked):
        """`decay_start`: the rates at the start, by head: Mamba's ("mamba", as flash-linear-attention starts this
        layer), half-lives of 8 to 512 tokens ("half-lives", ours), or the mean distance at which the teacher's head
        looks back, as its half-life ("calibrated": Taylor-Calibrate, arXiv 2606.16429). `gate_start`: "random", as any
        layer's, or "open": 1 as nearly as the layer's inputs allow, which a calibration tells (ours). `start`: whether
        the output projection is the teacher's ("copied"), or solved for the teacher's attention outputs ("refitted",
        ours), which wants an open gate."""

        conv: Annotated[int, Range(1, 64)] = 4  # tokens (Qwen3.5)
        decay_start: Literal["mamba", "half-lives", "calibrated"] = "half-lives"
        gate_start: Literal["random", "open"] = "random"
        start: Literal["copied", "refitted"] = "copied"

    class State(NamedTuple):
        conv: Tensor  # [B, conv - 1, 3 H K]: the last inputs of the convolution
        memory: Tensor  # [B, H, K, K]

    decays = True
    lowest_rate = 1e-6  # a half-life beyond any text (ours)
    can_be_replaced = False  # its memory answers to no softmax that another mixer starts from
    native_architecture = "qwen3_5_text"
    dials = {
        "decay_start": ("mamba", "half-lives", "calibrated"),
        "gate_start": ("random", "open"),
        "start": ("copied", "refitted"),
    }

    def __init__(self, shape: AttentionShape, options: Options) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        H, inner = shape.num_heads, shape.num_heads * shape.head_dim
        self.qkv = nn.Linear(shape.width, 3 * inner, bias=False)
        self.conv = ShortConv(3 * inner, options.conv, bias=False)
        self.time_step = nn.Linear(shape.width, H, bias=False)
        self.time_step_bias = nn.Parameter(torch.zeros(H))
        self.log_rate = nn.Parameter(torch.zeros(H))
        self.beta = nn.Linear(shape.width, H, bias=False)
        self.gate = nn.Linear(shape.width, inner, bias=False)
        self.norm = HeadNorm(shape.head_dim, eps=NORM_EPS if shape.norm_eps is None else shape.norm_eps)
        self.out = nn.Linear(inner, shape.width, bias=False)
        nn.init.zeros_(self.time_step.weight)
        nn.init.zeros_(self.beta.weight)  # half of each value is written

    def state_size(self) -> StateSize:
        H, K = self.shape.num_heads, self.shape.head_dim
        return StateSize(fixed_bytes=4 * ((self.options.conv - 1) * 3 * H * K + H * K * K))

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        before = None if state is None else state.conv
        mixed, conv = self.conv(self.qkv(x_BTD), context, before)
        q, k, v = F.silu(mixed).unflatten(-1, (3, self.shape.num_heads, -1)).unbind(2)
        g, beta = self._log_decay(x_BTD), torch.sigmoid(wide(self.beta(x_BTD)))
        if context.padding_mask is not None:  # padding neither writes to the memory nor lets it decay
            g, beta = g * context.padding_mask[..., None], beta * context.padding_mask[..., None]
        y, memory = gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=None if state is None else state.memory,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            document_ids=context.document_ids,
        )
        y = wide(self.norm(y)).flatten(2) * F.silu(wide(self.gate(x_BTD)))
        return self.out(y.to(x_BTD.dtype)), self.State(conv, memory)

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        """The logarithm of each head's decay, [B, T, H]."""
        return -wide(self.log_rate).exp() * F.softplus(wide(self.time_step(x_BTD)) + wide(self.time_step_bias))

    @torch.no_grad()
    def set_decay(self, rate: float) -> None:
        self.check_rate(rate)
        self.log_rate.fill_(rate).log_()

    def decay_per_token(self, x_BTD: Tensor, context: Context) -> Tensor:
        return -self._log_decay(x_BTD).mean((0, 1))

    def rule_operations(self) -> int:
        return self.shape.num_heads * operations(self.shape.head_dim, self.shape.head_dim)

    def query_and_key_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.qkv, self.conv, self.log_rate, self.time_step, self.time_step_bias, self.beta
