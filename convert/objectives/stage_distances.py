"""Terms that compare the stages of two image classifiers directly: hints, attention maps, relations between images.

B images · C channels · H height · W width · D width of features
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.core.fields import Range
from convert.objectives.stages import Features, StagedModel, StageShape, map_of, pooled
from convert.objectives.terms import StageTerm

Weight = Annotated[float, Range(0, 1e6)]


class Pairs(nn.Module):
    """The stages that a term compares: of each pair the shape in the student and that in the teacher. The last stage of
    one is paired with the last of the other, and so on."""

    def __init__(self, student: Sequence[StageShape], teacher: Sequence[StageShape]) -> None:
        super().__init__()
        number = min(len(student), len(teacher))
        self.shapes = list(zip(student[-number:], teacher[-number:], strict=True))

    def of(self, student: Features, teacher: Features) -> list[tuple[Tensor, StageShape, Tensor, StageShape]]:
        """Output and shape of the student's stage, and of the teacher's, for each pair."""
        number = len(self.shapes)
        stages = zip(student.stages[-number:], teacher.stages[-number:], strict=True)
        return [(s, shape, t, of_teacher) for (s, t), (shape, of_teacher) in zip(stages, self.shapes, strict=True)]


class Regressor(nn.Module):
    """A 1 x 1 convolution from a stage of the student to the channels of one of the teacher, and the shapes of both."""

    def __init__(self, student: StageShape, teacher: StageShape, device: torch.device) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.convolution = nn.Conv2d(student.width_of_features, teacher.width_of_features, 1, bias=False, device=device)
        nn.init.kaiming_normal_(self.convolution.weight, mode="fan_out", nonlinearity="relu")


def attention_map(features_BCHW: Tensor) -> Tensor:
    """The mean over channels of squares, as a unit vector [B, H W] of each image."""
    return F.normalize(features_BCHW.square().mean(1).flatten(1), dim=-1)


def relative_distances(features_BD: Tensor) -> Tensor:
    """Euclidean distances [B, B] of all pairs of images over the mean of those of two different ones."""
    distances = torch.cdist(features_BD, features_BD, compute_mode="donot_use_mm_for_euclid_dist")
    number = len(features_BD)
    return distances / (distances.sum() / (number * (number - 1))).clamp(min=1e-12)


def angles(features_BD: Tensor) -> Tensor:
    """The cosine [B, B, B] of the angle at the first image between the second and the third."""
    towards = F.normalize(features_BD - features_BD[:, None], dim=-1)
    return towards @ towards.transpose(1, 2)


@dataclass(frozen=True)
class Hints(StageTerm):
    """The mean squared error of a stage of the student, projected to the teacher's channels by a 1 x 1 convolution,
    from that stage of the teacher (FitNets, arXiv 1412.6550). Maps are interpolated to the teacher's grid; tokens are
    taken as a map, without special ones.

    The convolution, without a bias and by Kaiming's rule, is that of OFA-KD's baseline (Hao840/OFAKD), which has all
    four stages at a weight of 1; the stage is that of RepDistiller (HobbitLong/RepDistiller), whose weight is 100."""

    stage: Annotated[int, Range(1, 4)] = 2

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> nn.Module:
        number = min(len(student.stages), len(teacher.stages))
        if self.stage > number:
            raise UserError(
                f"{self.name}: stage must be one that student and teacher have; they have"
                f" {len(student.stages)} and {len(teacher.stages)}, and stage is {self.stage}."
            )
        ours, theirs = student.stages[self.stage - 1], teacher.stages[self.stage - 1]
        return Regressor(ours, theirs, next(student.model.parameters()).device)

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: Any) -> Tensor:
        wanted = map_of(teacher.stages[self.stage - 1], owned.teacher)
        found = map_of(student.stages[self.stage - 1], owned.student)
        if found.shape[2:] != wanted.shape[2:]:
            found = F.interpolate(found, wanted.shape[2:], mode="bilinear", antialias=True)
        return F.mse_loss(owned.convolution(found).to(wanted.dtype), wanted)


@dataclass(frozen=True)
class AttentionTransfer(StageTerm):
    """The squared difference of attention maps, a mean over places and a sum over stages (AT, arXiv 1612.03928). The
    map of a stage is the mean of its channels' squares, of unit length. Of two grids the larger one is averaged to the
    smaller (as RepDistiller does); tokens are taken as a map, without special ones.

    `beta` is the official code's weight on CIFAR-10 and ImageNet (szagoruyko/attention-transfer)."""

    beta: Weight = 1000.0

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> nn.Module:
        return Pairs(student.stages, teacher.stages)

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: Any) -> Tensor:
        distances = []
        for s, shape, t, of_teacher in owned.of(student, teacher):
            grid = min(shape.height, of_teacher.height), min(shape.width, of_teacher.width)
            maps = map_of(s, shape), map_of(t, of_teacher)
            ours, theirs = (attention_map(F.adaptive_avg_pool2d(one, grid)) for one in maps)
            distances.append((ours - theirs).square().mean())
        return self.beta * torch.stack(distances).sum()


@dataclass(frozen=True)
class Relational(StageTerm):
    """Huber's loss of the distances between images, over their mean, and of the angles between three images, in the
    last stage's features, which are the means over places (RKD, arXiv 1904.05068). The weights are those of the
    official code's classification (lenscloth/RKD).

    The images are those of one micro-batch, and the angles of B of them need B^3 numbers. One image alone has no
    relations: its loss is 0."""

    distance_weight: Weight = 25.0
    angle_weight: Weight = 50.0

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> nn.Module:
        return Pairs(student.stages[-1:], teacher.stages[-1:])

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: Any) -> Tensor:
        ((s, shape, t, of_teacher),) = owned.of(student, teacher)
        ours, theirs = pooled(s, shape), pooled(t, of_teacher)
        if len(ours) == 1:
            return 0.0 * ours.sum()
        with torch.autocast(ours.device.type, enabled=False):  # its products would be in bfloat16
            of_distances = F.smooth_l1_loss(relative_distances(ours), relative_distances(theirs))
            of_angles = F.smooth_l1_loss(angles(ours), angles(theirs))
        return self.distance_weight * of_distances + self.angle_weight * of_angles
