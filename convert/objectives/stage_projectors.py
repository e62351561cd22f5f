"""Projectors from the output of a stage to logits, for One-for-All distillation (official code, Hao840/OFAKD). They are
trained with the student, and dropped at the end.

B images · C channels · H height · W width · N tokens · D width of a token · K classes
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.objectives.stages import StageShape

GRID = 7  # places of a side that tokens are merged to
HEADS = 4


def separable(channels: int, out: int, stride: int) -> list[nn.Module]:
    """A depthwise 3 x 3 convolution, one of 1 x 1, normalisation and ReLU."""
    return [
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.Conv2d(channels, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    ]


class MapProjector(nn.Sequential):
    """A map [B, C, H, W] becomes logits [B, K], with `after` stages between this one and the last.

    Each of these halves the map and doubles the channels, but the last one gives `width`; after the last stage itself
    there is a 1 x 1 convolution. The mean over places is projected."""

    def __init__(self, shape: StageShape, after: int, width: int, classes: int) -> None:
        channels, blocks = shape.width_of_features, []
        for i in range(after):
            out = width if i == after - 1 else 2 * channels
            blocks.append(nn.Sequential(*separable(channels, channels, 2), *separable(channels, out, 1)))
            channels *= 2
        if not after:
            blocks.append(nn.Conv2d(channels, width, 1))
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, stage: Tensor) -> Tensor:
        if self.training and len(stage) == 1:
            raise UserError("one_for_all normalises over images, so a micro-batch must have two or more; it has one.")
        return super().forward(stage)


class PatchMerging(nn.Module):
    """Tokens [B, H W, D] of a grid of places, four neighbours made one, of another width. A grid of odd sides is padded
    with zeros (Swin's way; the official code refuses it)."""

    def __init__(self, height: int, width: int, features: int, out: int, activation: nn.Module) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.norm = nn.LayerNorm(4 * features)
        self.reduction = nn.Linear(4 * features, out, bias=False)
        self.activation = activation

    def forward(self, tokens: Tensor) -> Tensor:
        grid = tokens.unflatten(1, (self.height, self.width))
        grid = F.pad(grid, (0, 0, 0, self.width % 2, 0, self.height % 2))
        grid = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B, H/2, 2, W/2, 2, D
        merged = grid.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        return self.activation(self.reduction(self.norm(merged)))


class Block(nn.Module):
    """A ViT block: attention without biases of queries, keys and values, and an MLP of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x_BND)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BND = x_BND + self.project(attended)
        return x_BND + self.mlp(self.norm2(x_BND))


class TokenProjector(nn.Module):
    """Tokens [B, N, D] become logits [B, K], with `after` stages between this one and the last, whose tokens have
    `width`.

    Tokens of a grid of 14 places a side or more are merged until it has fewer; as many ViT blocks follow as stages do,
    one at least. What is projected is the class token, or the mean over places where there is none. Where the width
    changes, class tokens are left out, and a smaller grid is projected to `width` (both ours: the official code has no
    such student)."""

    def __init__(self, shape: StageShape, after: int, width: int, classes: int) -> None:
        super().__init__()
        if width % HEADS:
            raise UserError(
                f"one_for_all's blocks have {HEADS} heads, so the width of a student's tokens must be a multiple of"
                f" {HEADS}; it is {width}. Choose another size of the student, or another term."
            )
        self.special, features = shape.special_tokens, shape.width_of_features
        self.keeps_special = self.special > 0 and features == width
        height, across = shape.height, shape.width
        merges, self.merge = max(int(math.log2(max(height, across) / GRID)), 0), nn.Sequential()
        for i in range(merges):
            linear_end = i == merges - 1 and i > 0
            self.merge.append(PatchMerging(height, across, features, width, nn.Identity() if linear_end else nn.GELU()))
            height, across, features = -(-height // 2), -(-across // 2), width
        if features != width:
            self.merge.append(nn.Linear(features, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(max(after, 1))))
        self.head = nn.Linear(width, classes)

    def forward(self, stage: Tensor) -> Tensor:
        tokens = self.merge(stage[:, self.special :])
        if self.keeps_special:
            tokens = torch.cat([stage[:, : self.special], tokens], 1)
        tokens = self.blocks(tokens)
        return self.head(tokens[:, 0] if self.keeps_special else tokens.mean(1))


def initialise(module: nn.Module) -> None:
    """Draw the parameters of one module as the official code does: convolutions by Kaiming's rule for ReLU, by what
    goes out; linear layers from a normal distribution of 0.02, cut at 2."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
