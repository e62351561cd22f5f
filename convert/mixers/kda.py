"""Kimi Delta Attention (arXiv 2510.26692) in the place of an attention layer, as When Perplexity Lies has it (arXiv
2603.26556): a state that decays by channel and is corrected, token by token, towards the values of its keys.

q, k, v = conv(W x), where the convolution starts as the identity · S_t = (I - beta k k^T) Diag(exp(g_t)) S_{t-1}
+ beta k v^T with q and k of length 1 · y = gate(x) * S_t^T q / sqrt(K), then the output projection. No positions.

B batch · T time · D width · H query heads · G key/value heads · K head size
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Checked, Range
from convert.mixers.base import AttentionShape, Context, Mixer, StateSize
from convert.mixers.parts import QKV, HeadNorm, ShortConv, TimeStep, open_gate, wide
from kernels.delta_rule import kda, operations

NORM_EPS = 1e-6  # of `head_norm`, as Qwen3's


class KDA(Mixer):
    """A delta rule with a decay per channel, behind a low-rank gate."""

    @dataclass(frozen=True)
    class Options(Checked):
        """`rank`: of the projections to decays and gates; None: the head's size (the paper's 128).

        `gate`: "silu" starts at 1, "sigmoid" at one half, for which the output projection makes up. `decay_start`: the
        rates at the start, by head: Mamba's ("mamba", the paper's code), those of an independent replication ("g6",
        arXiv 2608.02689), half-lives of 8 to 512 tokens ("half-lives", ours), or the mean distance at which the
        teacher's head looks back, as its half-life ("calibrated": Taylor-Calibrate, arXiv 2606.16429). `start`:
        whether the output projection is the teacher's ("copied", the paper's) or solved for the teacher's attention
        outputs ("refitted", ours). Of the starts that experiments/LOG.md compares, the defaults did best."""

        conv: Annotated[int, Range(1, 64)] = 4  # tokens (the paper's code)
        rank: Annotated[int, Range(1, 65_536)] | None = None
        gate: Literal["silu", "sigmoid"] = "silu"
        head_norm: bool = False  # an RMSNorm of what each head reads
        decay_start: Literal["mamba", "g6", "half-lives", "calibrated"] = "mamba"
        start: Literal["copied", "refitted"] = "copied"

    class State(NamedTuple):
        conv: Tensor  # [B, conv - 1, (H + 2 G) K]: the last inputs of the convolution
        memory: Tensor  # [B, H, K, K]

    decays = True
    lowest_rate = 1e-6  # a half-life beyond any text (ours)
    can_be_replaced = False  # its memory answers to no softmax that another mixer starts from
    dials = {
        "gate": ("silu", "sigmoid"),
        "decay_start": ("mamba", "g6", "half-lives", "calibrated"),
        "start": ("copied", "refitted"),
    }

    def __init__(self, shape: AttentionShape, options: Options) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        H, K, rank = shape.num_heads, shape.head_dim, options.rank or shape.head_dim
        self.qkv = QKV(replace(shape, norm_eps=None))  # q and k have length 1
        self.conv = ShortConv((H + 2 * shape.num_kv_heads) * K, options.conv)
        self.time_step = TimeStep(shape.width, rank, H * K)
        self.log_rate = nn.Parameter(torch.zeros(H))
        self.beta = nn.Linear(shape.width, H, bias=False)
        self.gate_down = nn.Linear(shape.width, rank, bias=False)
        self.gate = open_gate(rank, H * K)
        self.head_norm = HeadNorm(K, eps=NORM_EPS) if options.head_norm else nn.Identity()
        self.out = nn.Linear(H * K, shape.width, bias=shape.out_bias)
        nn.init.zeros_(self.beta.weight)  # half of each value is written
        if options.gate == "sigmoid":
            nn.init.zeros_(self.gate.bias)

    def state_size(self) -> StateSize:
        H, G, K = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        return StateSize(fixed_bytes=4 * ((self.options.conv - 1) * (H + 2 * G) * K + H * K * K))

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        H, G, K = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        before = None if state is None else state.conv
        projected = torch.cat([p(x_BTD) for p in (self.qkv.q, self.qkv.k, self.qkv.v)], -1)
        mixed, conv = self.conv(projected, context, before)
        q, k, v = mixed.unflatten(-1, (-1, K)).split([H, G, G], 2)
        g, beta = self._log_decay(x_BTD), torch.sigmoid(wide(self.beta(x_BTD)))
        if context.padding_mask is not None:  # padding neither writes to the memory nor lets it decay
            g, beta = g * context.padding_mask[..., None, None], beta * context.padding_mask[..., None]
        y, memory = kda(
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
        gate = wide(self.gate(self.gate_down(x_BTD)))
        gate = F.silu(gate) if self.options.gate == "silu" else torch.sigmoid(gate)
        y = wide(self.head_norm(y)).flatten(2) * gate
        return self.out(y.to(x_BTD.dtype)), self.State(conv, memory)

    def _log_decay(self, x_BTD: Tensor) -> Tensor:
        """The logarithm of each channel's decay, [B, T, H, K]."""
        rate = wide(self.log_rate).exp()[:, None]
        return -rate * self.time_step(x_BTD).unflatten(-1, (self.shape.num_heads, -1))

    def query_and_key_parts(self) -> tuple[nn.Module | nn.Parameter, ...]:
        return self.qkv.q, self.qkv.k, self.conv, self.time_step, self.log_rate, self.beta

    @torch.no_grad()
    def set_decay(self, rate: float) -> None:
        self.check_rate(rate)
        self.log_rate.fill_(rate).log_()

    def decay_per_token(self, x_BTD: Tensor, context: Context) -> Tensor:
        return -self._log_decay(x_BTD).mean((0, 1)).flatten()

    def rule_operations(self) -> int:
        return self.shape.num_heads * operations(self.shape.head_dim, self.shape.head_dim)
