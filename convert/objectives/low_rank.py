"""Structure-aware distillation (DLRMamba, arXiv 2603.06920): a VMamba of low rank learns its teacher's transitions,
states and features. The paper's objective is "cross_entropy + 0.5*transition_svd + 0.1*scan_states
+ 1.5*stage_features".

B images · L places · E channels · S state · r rank · 4 directions
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.objectives.stage_distances import Pairs
from convert.objectives.stages import Features, Scan, StagedModel, map_of
from convert.objectives.terms import ScanTerm, StageTerm


def singular_factors(scan: Scan, rank: int) -> tuple[Tensor, Tensor]:
    """U sqrt(sigma) and V sqrt(sigma) [4, S, r] of the largest singular values of each transition."""
    sigma, kept = scan.sigma.topk(rank, -1)
    U, V = (side.gather(2, kept[:, None].expand(-1, side.shape[1], -1)) for side in (scan.U, scan.V))
    return U * sigma[:, None].sqrt(), V * sigma[:, None].sqrt()


def factor_distance(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """The least ||U_s R - U_t||^2 + ||V_s R - V_t||^2 [4] over orthogonal R, of factors U and V [4, S, r].

    A product U V^T has as many such factors as there are R: singular vectors may change their signs together, and turn
    where singular values are equal. The best R is the orthogonal factor of U_s^T U_t + V_s^T V_t (Procrustes); where it
    is best, its own change adds nothing to the gradient, so it has none here."""
    ours, theirs = torch.cat(student, 1), torch.cat(teacher, 1)  # [4, 2 S, r]
    with torch.no_grad():
        left, _, right = torch.linalg.svd(ours.mT @ theirs)
    return (ours @ (left @ right) - theirs).square().sum((1, 2))


@dataclass(frozen=True)
class TransitionSVD(ScanTerm):
    """The squared distance of the factors of the student's transitions, U sqrt(sigma) and V sqrt(sigma), from those of
    the teacher's largest singular values (DLRMamba's L_SVD, eq. 6), a mean over directions and blocks.

    The paper compares singular vectors as they come, whose signs are arbitrary; here the student's are turned to the
    teacher's first, which leaves its transition the same (`factor_distance`, ours). A teacher whose decays differ by
    channel and place is compared by their mean."""

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> None:
        super().build_on_stages(student, teacher)
        worse = [(s.rank, t.rank) for s, t in zip(student.scans, teacher.scans, strict=True) if s.rank > t.rank]
        if worse:
            raise UserError(
                f"{self.name} compares transitions of the student with larger ones of its teacher; their ranks are"
                f" {worse[0][0]} and {worse[0][1]}. Take a smaller rank."
            )

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: Any) -> Tensor:
        distances = []
        with torch.autocast(student.logits.device.type, enabled=False):  # its products would be in bfloat16
            for ours, theirs in zip(student.scans, teacher.scans, strict=True):
                rank = ours.sigma.shape[-1]
                distances.append(factor_distance(singular_factors(ours, rank), singular_factors(theirs, rank)).mean())
        return torch.stack(distances).mean()


@dataclass(frozen=True)
class ScanStates(ScanTerm):
    """The mean squared error of the student's states after each place from the teacher's (DLRMamba's L_state, eq. 7), a
    mean over blocks. States have as many numbers in both, so the paper's projection between them is the identity. They
    do not depend on the signs of singular vectors."""

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: Any) -> Tensor:
        pairs = zip(student.scans, teacher.scans, strict=True)
        return torch.stack([F.mse_loss(ours.states(), theirs.states()) for ours, theirs in pairs]).mean()


@dataclass(frozen=True)
class StageFeatures(StageTerm):
    """The mean squared error of the outputs of the student's stages from the teacher's (DLRMamba's L_feat, eq. 8), a
    mean over stages. Both models have stages of one shape, special tokens aside."""

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> Pairs:
        ours, theirs = ([(s.width_of_features, s.height, s.width) for s in each.stages] for each in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"{self.name} compares stages of one shape; the student's have {ours} as width of features, height and"
                f" width, the teacher's {theirs}. Take hints."
            )
        return Pairs(student.stages, teacher.stages)

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: Any) -> Tensor:
        pairs = [(map_of(s, shape), map_of(t, of_teacher)) for s, shape, t, of_teacher in owned.of(student, teacher)]
        return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in pairs]).mean()
