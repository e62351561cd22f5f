"""SS2D, the mixer of VMamba (arXiv 2401.10166): selective scans over the places of an image.

B images · H height · W width · D width of the block · E inner width · N state · R rank of delta · 4 directions
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.ss2d import DIRECTIONS, ss2d

SHORTEST, LONGEST = 1e-3, 0.1  # steps (delta) at the start: Mamba's


class DiagonalScan(nn.Module):
    """The four scans alone, with a decay of each channel and state. It has no parameters."""

    def forward(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
    ) -> Tensor:
        return ss2d(x, delta, A, B, C, D, delta_bias, delta_softplus=True)


class SS2D(nn.Module):
    """Four selective scans over the places of an image [B, H, W, D], between two projections, behind a depthwise
    convolution."""

    def __init__(self, width: int, inner: int, N: int, rank: int, conv_bias: bool = False) -> None:
        super().__init__()
        self.rank, self.state_size = rank, N
        self.in_proj = nn.Linear(width, inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.x_proj = nn.Parameter(torch.empty(DIRECTIONS, self.rank + 2 * N, inner))
        self.dt_proj = nn.Parameter(torch.empty(DIRECTIONS, inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_log = nn.Parameter(torch.empty(DIRECTIONS, inner, N))
        self.D = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.scan = DiagonalScan()
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def start(self) -> None:
        """Mamba's start: decays of 1 to N, steps spread evenly over their logarithms, delta from few channels."""
        nn.init.uniform_(self.x_proj, -(self.x_proj.shape[-1] ** -0.5), self.x_proj.shape[-1] ** -0.5)
        start_steps(self.dt_proj, self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.state_size + 1, device=self.A_log.device).log())
        nn.init.ones_(self.D)

    def decays(self) -> Tensor:
        """A [4, E, N], below 0, in float32 or better: a state decays by exp(delta A)."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        x = F.silu(self.conv(self.in_proj(x_BHWD).permute(0, 3, 1, 2)))  # [B, E, H, W], channels next to each other
        places = x.permute(0, 2, 3, 1)[:, None]  # [B, 1, H, W, E]
        seen = places @ self.x_proj.mT[:, None]  # [B, 4, H, W, R + 2 N]
        r, B, C = seen.split([self.rank, self.state_size, self.state_size], -1)
        delta = (r @ self.dt_proj.mT[:, None]).movedim(-1, 2)
        y = self.scan(x, delta, self.decays(), B.movedim(-1, 2), C.movedim(-1, 2), self.D, self.dt_bias)
        return self.out_proj(self.norm(y.permute(0, 2, 3, 1)))


def start_steps(dt_proj: nn.Parameter, dt_bias: nn.Parameter) -> None:
    """Mamba's start of what makes steps, [4, E, R] and [4, E]: spread evenly over their logarithms."""
    fan_in = dt_proj.shape[-1]
    nn.init.uniform_(dt_proj, -(fan_in**-0.5), fan_in**-0.5)
    spread = math.log(LONGEST) - math.log(SHORTEST)
    dt = torch.exp(torch.rand_like(dt_bias) * spread + math.log(SHORTEST))
    with torch.no_grad():
        dt_bias.copy_(torch.expm1(dt).log())  # the inverse of softplus
