"""VMambas of low rank: what they start from, what they keep, and that any folder of theirs is a teacher."""

import pytest
import torch
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.mixers.low_rank import LowRankMap, matrix_of
from convert.models.catalog import resolve
from convert.models.vision.features import features, staged
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.models.vision.loading import load_teacher
from convert.models.vision.operations import cost_of_pass
from convert.models.vision.vmamba import VMambaConfig, VMambaForImageClassification
from convert.models.vision.vmamba_lowrank import low_rank_config, start_from
from kernels.ss2d.reference import transition
from tests.conftest import assert_close

SIZES = dict(hidden_sizes=[16, 24], depths=[1, 2], state_size=6, ssm_ratio=2.0, mlp_ratio=2.0, num_labels=7)


def vmamba(**more) -> VMambaForImageClassification:
    torch.manual_seed(0)
    config = VMambaConfig(**SIZES | dict(num_channels=1, image_size=16) | more)
    set_preprocessing(config, Preprocessing(16, 16, (0.5,), (0.25,)))
    model = VMambaForImageClassification(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def student_of(teacher, ratio, rank=None) -> VMambaForImageClassification:
    torch.manual_seed(1)  # nothing that is drawn is left
    student = VMambaForImageClassification(low_rank_config(teacher.config, ratio, rank)).double()
    return start_from(student, teacher).eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_at_full_rank_a_student_is_its_teacher():
    teacher = vmamba(rank_ratio=1.0)
    x = images(20, 13)
    assert_close(student_of(teacher, 1.0)(x).logits, teacher(x).logits, 1e-12)
    half = vmamba(rank_ratio=0.5)
    assert_close(student_of(half, 0.5)(x).logits, half(x).logits, 1e-10)
    with pytest.raises(AssertionError):
        assert_close(student_of(teacher, 0.9)(x).logits, teacher(x).logits, 1e-3)


@torch.no_grad()
def test_decays_that_are_the_same_everywhere_have_an_exact_matrix():
    teacher = vmamba()
    for mixer in (block.mixer for stage in teacher.stages for block in stage.blocks):
        mixer.dt_proj.zero_()
        mixer.dt_bias.copy_(mixer.dt_bias[:, :1].expand_as(mixer.dt_bias))
        mixer.A_log.copy_(mixer.A_log[:, :1].expand_as(mixer.A_log))
    x = images(16, 24)
    assert_close(student_of(teacher, 1.0)(x).logits, teacher(x).logits, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("of_teacher", [None, 1.0, 0.8])
def test_a_student_has_the_nearest_matrices_of_its_rank(of_teacher):
    teacher = vmamba(rank_ratio=of_teacher)
    student = student_of(teacher, 0.5)
    theirs = features(teacher, torch.rand(1, 1, 16, 16).double(), scans=True).scans
    ours = features(student, torch.rand(1, 1, 16, 16).double(), scans=True).scans
    for s, t in zip(ours, theirs, strict=True):
        A = transition(t.U, t.sigma, t.V)
        U, S, Vh = torch.linalg.svd(A)
        r = s.sigma.shape[1]
        assert r == 1 and S[:, 0].min() > 1e-3
        assert_close(transition(s.U, s.sigma, s.V), U[..., :r] * S[:, None, :r] @ Vh[:, :r], 1e-5)
    seen = 0
    for name, layer in student.named_modules():
        if isinstance(layer, LowRankMap):
            if name.endswith("x_proj") and of_teacher is None:
                W = teacher.get_parameter(name).flatten(0, 1)
            else:
                W = matrix_of(teacher.get_submodule(name))
            r, (U, S, Vh) = layer.up.weight.shape[1], torch.linalg.svd(W, full_matrices=False)
            assert r * sum(W.shape) <= 0.5 * W.numel() < (r + 1) * sum(W.shape) or r == 1
            assert_close(matrix_of(layer), U[:, :r] * S[:r] @ Vh[:r], 1e-10)
            seen += 1
    assert seen == 3 * 5 + 1  # of each block four projections and x_proj, and one downsampling
    same = [name for name, p in student.state_dict().items() if torch.equal(p, teacher.state_dict().get(name, p * 0))]
    assert {"classifier.weight", "embed.0.conv.weight", "stages.1.blocks.1.mixer.dt_bias"} <= set(same)


def test_the_ratio_is_that_of_the_numbers_of_a_model():
    whole = sum(p.numel() for p in vmamba(rank_ratio=1.0).stages.parameters())
    kept = [sum(p.numel() for p in vmamba(rank_ratio=r).stages.parameters()) / whole for r in (0.65, 0.5, 0.35)]
    assert all(abs(k - r) < 0.1 for k, r in zip(kept, (0.65, 0.5, 0.35), strict=True)), kept


@pytest.mark.parametrize("ratio, rank, words", [
    (0.5, 7, "its transitions of 6 x 6 have rank 6, and the student's would have 7"),
    (0.9, None, "keeps 0.8 of its numbers; the ratio is 0.9"),
    (0.8, 3, "have rank 2, and the student's would have 3"),
])  # fmt: skip
def test_a_rank_that_the_teacher_does_not_have_is_refused(ratio, rank, words):
    with pytest.raises(UserError, match=words):
        low_rank_config(vmamba(rank_ratio=None if rank == 7 else 0.8).config, ratio, rank)


@pytest.mark.parametrize("fields", [dict(rank_ratio=1.5), dict(rank_ratio=0.5, transition_rank=7), dict(rank_ratio=0)])
def test_configurations_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match="transition_rank within 1 and its state_size, 6"):
        VMambaForImageClassification(VMambaConfig(**SIZES | fields))


def test_a_folder_of_it_is_a_teacher(tmp_path):
    model = vmamba(rank_ratio=0.6, transition_rank=3).float()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(resolve(str(tmp_path)))
    assert [scan.rank for scan in staged(teacher.model).scans] == [3] * 3
    x = images(16, 16).float()
    assert torch.equal(teacher.model(x).logits, model(x).logits)


def test_random_weights_start_with_the_deviation_of_whole_matrices():
    torch.manual_seed(0)
    sizes = SIZES | dict(hidden_sizes=[64, 96], state_size=16)
    whole, half = (VMambaForImageClassification(VMambaConfig(**sizes, rank_ratio=r)) for r in (1.0, 0.5))
    for name in ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj", "mlp.0", "mlp.2"):
        a, b = (matrix_of(m.stages[1].blocks[0].get_submodule(name)).std().item() for m in (whole, half))
        assert abs(a / b - 1) < 0.2, name
    mixer = half.stages[0].blocks[0].mixer
    U, sigma, V = mixer.transition()
    assert torch.allclose(-sigma[0].log(), torch.logspace(-3, -1, 4), rtol=1e-3)  # rank 4 of 16: rates of 0.001 to 0.1
    assert 0.99e-3 < F.softplus(mixer.dt_bias).min() < 3e-3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_of_scans_are_counted_once(device):
    """They are those of the formula alone, whatever the operators of an implementation count."""
    sizes = SIZES | dict(num_channels=1, image_size=16)
    counts = {}
    for ratio, N in ((1.0, 6), (1.0, 1), (None, 6), (None, 1)):
        model = vmamba(**sizes | dict(rank_ratio=ratio, state_size=N)).to(device)
        counts[ratio, N] = cost_of_pass(model)[0]
    blocks = [(16, 32), (4, 48), (4, 48)]  # places, channels
    projected = sum(2 * 4 * L * E * 2 * 5 for L, E in blocks)  # 2 x 5 more rows of x_proj
    diagonal = sum(4 * 9 * L * E * 5 for L, E in blocks)
    dense = sum(2 * 4 * L * (E * (49 - 4) + (6 * 13 - 3)) for L, E in blocks)
    orthonormal = counts[1.0, 6] - counts[1.0, 1] - projected - dense
    assert counts[None, 6] - counts[None, 1] == projected + diagonal
    assert 0 <= orthonormal < 0.05 * counts[1.0, 6]  # what makes U and V is counted, too
