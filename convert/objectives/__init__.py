"""What a stage of training minimises. `Objective.of` knows the classes in TERMS by name; others need no entry."""

from convert.objectives.base import AttentionTerm, BlockTerm, LayerTerm, LiveObjective, LogitTerm, Objective, Term
from convert.objectives.divergences import BDKD, CrossEntropy, ForwardKL, ReverseKL
from convert.objectives.features import (
    BlockEnergyMSE,
    BlockL2Distance,
    CosineDistance,
    EnergyMSE,
    FeatureMatching,
    L2Distance,
)
from convert.objectives.mixtures import JensenShannon, SkewedForwardKL, SkewedReverseKL
from convert.objectives.projectors import HiddenProjection
from convert.objectives.taid import TAID

TERMS: tuple[type[Term], ...] = (
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    JensenShannon,
    SkewedForwardKL,
    SkewedReverseKL,
    BDKD,
    TAID,
    CosineDistance,
    EnergyMSE,
    L2Distance,
    BlockEnergyMSE,
    BlockL2Distance,
    FeatureMatching,
    HiddenProjection,
)

__all__ = [
    "TERMS",
    "AttentionTerm",
    "BlockTerm",
    "LayerTerm",
    "LiveObjective",
    "LogitTerm",
    "Objective",
    "Term",
    *(term.__name__ for term in TERMS),
]
