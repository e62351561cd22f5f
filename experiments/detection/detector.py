"""A detector for two bands: their fusion, a VMamba, and an anchor-free head that sees objects as points (arXiv
1904.07850).

B images · K classes · H height · W width of the grid of the first stage · n objects
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.models.vision.features import Features, features
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.models.vision.vmamba import VMambaConfig, VMambaForImageClassification

FUSED = 8  # channels of the fused image (ours)
WIDTH = 32  # of the neck and the head (ours)
STRIDE = 4  # pixels of a place of the grid: VMamba's patch
NARROW = 6  # standard deviations of the bump of an object in its side (arXiv 1909.00700: 0.54 / 6 of it is one; ours)
SIZE_WEIGHT, OFFSET_WEIGHT = 0.1, 1.0  # arXiv 1904.07850
MOST = 50  # objects of an image


@dataclass(frozen=True)
class Detections:
    """Objects of one image, the surest first: `boxes` [n, 4] in pixels, `scores` [n], `classes` [n]."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def backbone_config(side: int, sizes: Mapping[str, Any]) -> VMambaConfig:
    """A VMamba of the fused image of `side` pixels; `sizes` are fields of its configuration."""
    config = VMambaConfig(image_size=side, num_channels=FUSED, **sizes)
    set_preprocessing(config, Preprocessing(side, side, (0.0,) * FUSED, (1.0,) * FUSED))
    return config


class Detector(nn.Module):
    """Bands [B, 4, 4 H, 4 W] -> the grid of heads [B, K + 4, H, W]: logits of the classes, logarithms of width and
    height in places, and the offset of the centre within its place."""

    def __init__(self, config: VMambaConfig, classes: int, bands: str = "both") -> None:
        """`config`: of `backbone_config`. `bands`: "both", or the one that it sees alone."""
        super().__init__()
        self.config, self.classes, self.bands = config, classes, bands
        seen = {"visible": slice(0, 3), "infrared": slice(3, 4)}
        self.seen = [seen[name] for name in seen if bands in ("both", name)]
        self.stems = nn.ModuleList(nn.Conv2d(part.stop - part.start, FUSED, 3, padding=1) for part in self.seen)
        self.fuse = nn.Conv2d(FUSED * len(self.seen), FUSED, 1)
        self.backbone = VMambaForImageClassification(config)  # of which nothing is pooled: places are told apart
        self.backbone.norm, self.backbone.classifier = nn.Identity(), nn.Identity()
        self.laterals = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in config.hidden_sizes)
        self.head = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, classes + 4, 1))
        nn.init.constant_(self.head[-1].bias[:classes], -2.19)  # a class is at one place of ten (arXiv 1904.07850)

    def look(self, bands: Tensor, scans: bool = False) -> Features:
        """The outputs of the backbone's stages, and what its scans are made of if that is asked."""
        parts = [stem(bands[:, part]) for stem, part in zip(self.stems, self.seen, strict=True)]
        return features(self.backbone, self.fuse(F.silu(torch.cat(parts, 1))), scans)

    def heads(self, maps: Sequence[Tensor]) -> Tensor:
        """The grid of heads of the stages' maps: from the coarsest on, each is added to the next finer one."""
        merged = None
        for lateral, of_stage in reversed(list(zip(self.laterals, maps, strict=True))):
            found = lateral(of_stage)
            merged = found if merged is None else found + F.interpolate(merged, found.shape[2:], mode="nearest")
        return self.head(merged)

    def forward(self, bands: Tensor) -> Tensor:
        return self.heads(self.look(bands).stages)


def bumps(boxes: Sequence[Tensor], classes: Sequence[Tensor], height: int, width: int, of: int) -> Tensor:
    """What the classes' heat maps should be [B, K, H, W]: 1 at the place of an object's centre, and around it a
    Gaussian as wide as its box."""
    wanted = torch.zeros(len(boxes), of, height, width)
    rows, columns = torch.arange(height), torch.arange(width)
    for image, (some, kinds) in enumerate(zip(boxes, classes, strict=True)):
        for (left, top, right, bottom), kind in zip((some / STRIDE).tolist(), kinds.tolist(), strict=True):
            x, y = int((left + right) / 2), int((top + bottom) / 2)
            across = torch.exp(-(((columns - x) * NARROW / (right - left)) ** 2) / 2)
            down = torch.exp(-(((rows - y) * NARROW / (bottom - top)) ** 2) / 2)
            wanted[image, kind] = torch.maximum(wanted[image, kind], down[:, None] * across)
    return wanted


def detection_loss(grid: Tensor, boxes: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
    """The loss of the grid of heads [B, K + 4, H, W] for the objects of B images (arXiv 1904.07850): the focal loss of
    heat maps, and L1 of size (here of its logarithm) and offset at the centres, over the number of objects."""
    of, (height, width) = grid.shape[1] - 4, grid.shape[2:]
    logits, wanted = grid[:, :of], bumps(boxes, classes, height, width, of).to(grid.device)
    p, is_centre = logits.sigmoid(), wanted == 1
    at_centres = (1 - p) ** 2 * F.logsigmoid(logits) * is_centre
    elsewhere = (1 - wanted) ** 4 * p**2 * F.logsigmoid(-logits) * ~is_centre
    objects = max(1, sum(map(len, boxes)))
    total = -(at_centres + elsewhere).sum()
    for image, some in enumerate(boxes):
        if len(some):
            some = some.to(grid.device) / STRIDE
            centre, sides = (some[:, :2] + some[:, 2:]) / 2, some[:, 2:] - some[:, :2]
            x, y = centre.long().unbind(-1)
            found = grid[image, of:, y, x].T  # [n, 4]
            total = total + SIZE_WEIGHT * (found[:, :2] - sides.log()).abs().sum()
            total = total + OFFSET_WEIGHT * (found[:, 2:] - (centre - centre.floor())).abs().sum()
    return total / objects


@torch.no_grad()
def detected(grid: Tensor) -> list[Detections]:
    """The objects of B images: places whose heat is the highest of their neighbours', at most 50 of an image."""
    of = grid.shape[1] - 4
    heat = grid[:, :of].sigmoid()
    heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
    found = []
    for peaks, rest in zip(heat, grid[:, of:], strict=True):
        scores, places = peaks.flatten().topk(min(MOST, peaks.numel()))
        classes, y, x = torch.unravel_index(places, peaks.shape)
        width, height, dx, dy = rest[:, y, x]
        centre, half = torch.stack([x + dx, y + dy], -1), torch.stack([width.exp(), height.exp()], -1) / 2
        boxes = STRIDE * torch.cat([centre - half, centre + half], -1)
        found.append(Detections(boxes, scores, classes))
    return found
