"""SS2D whose transition is a full matrix of low rank (DLRMamba, arXiv 2603.06920, eq. 5), and whose projections have
two factors.

B images · H height · W width · D width of the block · E inner width · N state · R rank of delta · r rank of the
transition · 4 directions
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.mixers.low_rank import factor_std, linear, orthonormal
from convert.mixers.ss2d import LONGEST, SHORTEST, start_steps
from kernels.ss2d import DIRECTIONS, ss2d_lowrank

HIGHEST = 1 - 1e-6  # singular value at the start (ours)


class LowRankScan(nn.Module):
    """The four scans alone, with one transition for all channels and places of a direction. It has no parameters."""

    def forward(
        self, x: Tensor, delta: Tensor, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor, D: Tensor,
        delta_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        return ss2d_lowrank(x, U, sigma, V, B, C, D, delta, delta_bias, delta_softplus=True)


class LowRankSS2D(nn.Module):
    """SS2D over the places of an image [B, H, W, D], with the transition U diag(sigma) V^T of each direction in the
    place of decays. U and V have orthonormal columns and sigma is within 0 and 1, so that no state grows, whatever the
    parameters are. `ratio` is the share of the numbers of the projections that their factors have."""

    def __init__(
        self, width: int, inner: int, N: int, rank: int, conv_bias: bool, ratio: float, transition_rank: int
    ) -> None:
        super().__init__()
        self.rank, self.state_size = rank, N
        self.in_proj = linear(width, inner, ratio, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.x_proj = linear(inner, DIRECTIONS * (rank + 2 * N), ratio, bias=False)
        self.dt_proj = nn.Parameter(torch.empty(DIRECTIONS, inner, rank))
        self.dt_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        # what U and V are made of: of their columns, one after the other, only what the ones before lack counts
        self.U_columns = nn.Parameter(torch.empty(DIRECTIONS, N, transition_rank))
        self.V_columns = nn.Parameter(torch.empty(DIRECTIONS, N, transition_rank))
        self.sigma_logit = nn.Parameter(torch.empty(DIRECTIONS, transition_rank))
        self.D = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.scan = LowRankScan()
        self.norm = nn.LayerNorm(inner)
        self.out_proj = linear(inner, width, ratio, bias=False)

    def start(self) -> None:
        """Mamba's steps, and a transition that forgets each state at one rate: the rates, between those of Mamba's
        shortest and longest steps, are spread evenly over their logarithms (ours)."""
        std = (3 * self.dt_bias.shape[1]) ** -0.5  # that of SS2D's uniform numbers
        for layer in self.x_proj.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=factor_std(layer, std))
        start_steps(self.dt_proj, self.dt_bias)
        r = self.sigma_logit.shape[1]
        rates = torch.linspace(math.log(SHORTEST), math.log(LONGEST), r, device=self.sigma_logit.device).exp()
        eye = torch.eye(self.state_size, r, device=self.sigma_logit.device).expand(DIRECTIONS, -1, -1)
        self.set_transition(eye, torch.exp(-rates).expand(DIRECTIONS, -1), eye)
        nn.init.ones_(self.D)

    @torch.no_grad()
    def set_transition(self, U: Tensor, sigma: Tensor, V: Tensor) -> None:
        """Take U and V [4, N, r], with orthonormal columns, and sigma [4, r] within 0 and 1."""
        sigma = sigma.double().clamp(1 - HIGHEST, HIGHEST)
        self.U_columns.copy_(U)
        self.V_columns.copy_(V)
        self.sigma_logit.copy_(torch.logit(sigma))

    def transition(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [4, N, r], sigma [4, r] and V [4, N, r], in float32 or better."""
        U, V = orthonormal(torch.cat([self.U_columns, self.V_columns])).chunk(2)
        return U, torch.sigmoid(self.sigma_logit.to(U.dtype)), V

    def forward(self, x_BHWD: Tensor) -> Tensor:
        x = F.silu(self.conv(self.in_proj(x_BHWD).permute(0, 3, 1, 2)))  # [B, E, H, W], channels next to each other
        seen = self.x_proj(x.permute(0, 2, 3, 1)).unflatten(-1, (DIRECTIONS, -1))  # [B, H, W, 4, R + 2 N]
        r, B, C = seen.movedim(-2, 1).split([self.rank, self.state_size, self.state_size], -1)
        delta = (r @ self.dt_proj.mT[:, None]).movedim(-1, 2)
        U, sigma, V = self.transition()
        y = self.scan(x, delta, U, sigma, V, B.movedim(-1, 2), C.movedim(-1, 2), self.D, self.dt_bias)
        return self.out_proj(self.norm(y.permute(0, 2, 3, 1)))
