"""A VMamba of low rank that starts from another VMamba's weights: the singular value decomposition of all of them."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.mixers.low_rank import LowRankMap, kept_rank, largest, matrix_of, set_matrix
from convert.mixers.ss2d import SS2D
from convert.mixers.ss2d_lowrank import LowRankSS2D
from convert.mixers.ss2d_states import mean_transition
from convert.models.vision.vmamba import VMambaConfig


def low_rank_config(teacher: PreTrainedConfig, ratio: float, rank: int | None) -> VMambaConfig:
    """Configuration of the student that keeps `ratio` of the numbers of a VMamba's matrices, with transitions of this
    rank, None for the one of that ratio.

    Raises UserError for a teacher of another family, and for a rank above what the teacher's matrices have."""
    if not isinstance(teacher, VMambaConfig):
        raise UserError(
            f"A VMamba of low rank starts from the weights of a VMamba; this teacher is a {teacher.model_type}. Convert"
            " it --to vmamba first, and give the folder of that run."
        )
    N = teacher.state_size
    wanted = kept_rank(N, N, ratio) if rank is None else rank
    highest = N if teacher.rank_ratio is None else teacher.rank_of_transition
    if wanted > highest:
        raise UserError(
            f"The rank of a transition must be at most that of the teacher's; its transitions of {N} x {N} have rank"
            f" {highest}, and the student's would have {wanted}. Take a smaller rank or ratio."
        )
    if teacher.rank_ratio is not None and ratio > teacher.rank_ratio:
        raise UserError(
            f"The rank of a matrix must be at most that of the teacher's, which keeps {teacher.rank_ratio:g} of its"
            f" numbers; the ratio is {ratio:g}. Take a smaller ratio, or a teacher of full rank."
        )
    config = copy.deepcopy(teacher)
    config.rank_ratio, config.transition_rank = ratio, rank
    return config


@torch.no_grad()
def start_from(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """The student, of a configuration by `low_rank_config`, with the teacher's weights: matrices of two factors and
    transitions take the largest singular values, all others are the same.

    Decays that differ by channel and place have no transition in common: `mean_transition` takes their place."""
    own, given = student.state_dict(), teacher.state_dict()
    same = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    student.load_state_dict(same, strict=False)
    started = set(same)
    for name, layer in student.named_modules():
        if isinstance(layer, LowRankMap) or name.endswith("mixer.x_proj"):
            set_matrix(layer, *_dense(teacher, name))
            started |= {f"{name}.{each}" for each in layer.state_dict()}
        if isinstance(layer, LowRankSS2D):
            U, sigma, V = _transition(teacher.get_submodule(name))
            layer.set_transition(*largest(U, sigma, V, layer.sigma_logit.shape[1]))
            started |= {f"{name}.{each}" for each in ("U_columns", "V_columns", "sigma_logit")}
    if left := sorted(own.keys() - started):
        raise ValueError(f"every weight must come from the teacher; {len(left)} do not, first {left[0]}")
    return student


def _transition(mixer: SS2D | LowRankSS2D) -> tuple[Tensor, Tensor, Tensor]:
    return mean_transition(mixer.decays(), mixer.dt_bias) if isinstance(mixer, SS2D) else mixer.transition()


def _dense(teacher: PreTrainedModel, name: str) -> tuple[Tensor, Tensor | None]:
    """The matrix and bias of a teacher's layer, which may have two factors, or stack directions."""
    parent, _, last = name.rpartition(".")
    layer = getattr(teacher.get_submodule(parent), last)
    if isinstance(layer, nn.Parameter):
        return layer.flatten(0, 1), None
    return matrix_of(layer), (layer.up if isinstance(layer, LowRankMap) else layer).bias
