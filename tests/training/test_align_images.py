"""The stage `align` on images: every layer's error falls, on the teacher's own inputs, and nothing else changes."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from convert.core.errors import Interrupted, UserError
from convert.data.image_batch import ImageBatch
from convert.models.access import replaced_attention
from convert.models.vision.features import logits
from convert.models.vision.vit_ss2d import ViTSS2DForImageClassification
from convert.models.vision.vit_ss2d_start import ss2d_config, without_attention
from convert.objectives import AttentionTerm, Objective
from convert.objectives.features import energy_mse
from convert.training.align_images import align_images
from convert.training.image_settings import ImageSettings
from convert.training.selectors import selected
from tests.evaluation.classifiers import classifier
from tests.training.stages import Kept, Logged

SETTINGS = ImageSettings(
    images=30 * 16, batch_images=16, micro_images=16, lr=1e-2, trains="mixers", precision="float32",
    objective=Objective.of("energy_mse"), save_every=0.0,
)  # fmt: skip
ONE = dataclasses.replace(SETTINGS, images=16)


def batch_of(step: int) -> ImageBatch:
    g = torch.Generator().manual_seed(step)
    return ImageBatch(torch.rand(16, 1, 16, 16, generator=g), torch.zeros(16, 12))  # no label is known


def pair():
    teacher = classifier("vit")
    torch.manual_seed(1)
    student = ViTSS2DForImageClassification(ss2d_config(teacher.config, 4, 1.0, None))
    return without_attention(student, teacher).requires_grad_(False), teacher


def noting(seen: list):
    class Noted(AttentionTerm):
        """The energy's share, noted layer by layer."""

        def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
            seen.append(energy_mse(student, teacher))
            return seen[-1]

    return Objective(((1.0, Noted()),))


def errors_of(student, teacher) -> list[float]:
    """The error of each layer on the teacher's inputs; the student is left as it was."""
    seen, before = [], {name: p.clone() for name, p in student.state_dict().items()}
    align_images(student, teacher, batch_of, dataclasses.replace(ONE, lr=0.0, objective=noting(seen)))
    student.load_state_dict(before)
    return [each.item() for each in seen]


def test_the_error_of_every_layer_falls_and_nothing_but_mixers_changes():
    student, teacher = pair()
    frozen = {n: p.clone() for n, p in student.named_parameters() if ".attention." not in n}
    original = {n: p.clone() for n, p in teacher.named_parameters()}
    before, log = errors_of(student, teacher), Logged()
    align_images(student, teacher, batch_of, SETTINGS, track=log)
    after = errors_of(student, teacher)
    assert len(before) == 3 and all(a < 0.5 * b and a < 0.5 for a, b in zip(after, before, strict=True)), (
        before,
        after,
    )
    assert log.losses[0] == pytest.approx(sum(before) / 3, rel=1e-5)
    assert all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)
    assert all(torch.equal(p, original[n]) for n, p in teacher.named_parameters())


def test_it_is_teacher_forced():
    """The error of layer 1 does not depend on what layer 0 of the student is."""
    (student, teacher), found = pair(), []
    for _ in range(2):
        found.append(errors_of(student, teacher))
        with torch.no_grad():
            for p in replaced_attention(student)[0].parameters():
                p.add_(0.5)
    assert found[0][1:] == found[1][1:] and found[0][0] != found[1][0]


@pytest.mark.parametrize("objective", ["energy_mse", "l2_distance + block_energy_mse"])
def test_micro_batches_change_nothing(objective):
    found = []
    for micro in (16, 6):
        (student, teacher), log = pair(), Logged()
        settings = dataclasses.replace(ONE, micro_images=micro, objective=Objective.of(objective))
        align_images(student, teacher, batch_of, settings, track=log)
        found.append((log.losses[0], log.norms[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][1] > 0


def test_a_stopped_stage_ends_the_same_bit_for_bit():
    student, teacher = pair()
    whole, kept = align_images(student, teacher, batch_of, SETTINGS), Kept(7)
    with pytest.raises(Interrupted):
        align_images(pair()[0], teacher, batch_of, SETTINGS, track=kept, keep=kept)
    kept.stop_after = None
    resumed = align_images(pair()[0], teacher, batch_of, SETTINGS, track=kept, keep=kept)
    assert torch.equal(logits(whole, batch_of(99).images), logits(resumed, batch_of(99).images))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_parts_of_the_student_are_chosen_as_those_of_text():
    student, _ = pair()
    of = {name: {id(p) for p in selected(student, name)} for name in ("mixers", "mlps", "kept_attention", "everything")}
    assert of["mixers"] == {id(p) for n, p in student.named_parameters() if ".attention." in n}
    assert of["mlps"] == {id(p) for n, p in student.named_parameters() if ".mlp." in n} and not of["kept_attention"]
    assert len({id(p) for p in selected(student, "everything - mixers")}) == len(of["everything"]) - len(of["mixers"])


def test_objectives_of_other_stages_are_refused():
    student, teacher = pair()
    settings = dataclasses.replace(ONE, objective=Objective.of("cross_entropy"))
    with pytest.raises(UserError, match="align compares attention outputs and block .*; its objective cannot be cross"):
        align_images(student, teacher, batch_of, settings)
