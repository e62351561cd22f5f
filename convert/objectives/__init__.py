"""What a stage of training minimises. `Objective.of` knows the classes in TERMS by name; others need no entry."""

from convert.objectives.base import LiveObjective, Objective
from convert.objectives.correlation import DIST
from convert.objectives.divergences import BDKD, CrossEntropy, ForwardKL, ReverseKL
from convert.objectives.features import (
    BlockEnergyMSE,
    BlockL2Distance,
    CosineDistance,
    EnergyMSE,
    FeatureMatching,
    L2Distance,
)
from convert.objectives.low_rank import ScanStates, StageFeatures, TransitionSVD
from convert.objectives.mixtures import JensenShannon, SkewedForwardKL, SkewedReverseKL
from convert.objectives.one_for_all import OneForAll
from convert.objectives.projectors import HiddenProjection
from convert.objectives.stage_distances import AttentionTransfer, Hints, Relational
from convert.objectives.taid import TAID
from convert.objectives.terms import AttentionTerm, BlockTerm, LayerTerm, LogitTerm, ScanTerm, StageTerm, Term

TERMS: tuple[type[Term], ...] = (
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    JensenShannon,
    SkewedForwardKL,
    SkewedReverseKL,
    BDKD,
    TAID,
    DIST,
    CosineDistance,
    EnergyMSE,
    L2Distance,
    BlockEnergyMSE,
    BlockL2Distance,
    FeatureMatching,
    HiddenProjection,
    OneForAll,
    Hints,
    AttentionTransfer,
    Relational,
    TransitionSVD,
    ScanStates,
    StageFeatures,
)

__all__ = [
    "TERMS",
    "AttentionTerm",
    "BlockTerm",
    "LayerTerm",
    "LiveObjective",
    "LogitTerm",
    "Objective",
    "ScanTerm",
    "StageTerm",
    "Term",
    *(term.__name__ for term in TERMS),
]
