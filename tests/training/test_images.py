"""The stage on images: what it learns from, and that it goes on where it stopped."""

import copy
import dataclasses

import pytest
import torch

from convert.core.errors import UserError
from convert.data.image_batch import ImageBatch
from convert.models.vision.features import logits
from convert.objectives import Objective
from convert.training.image_settings import ImageSettings
from convert.training.images import classify, moving_average
from tests.evaluation.classifiers import classifier
from tests.models.vision.small_models import small_model
from tests.training.stages import Kept

SETTINGS = ImageSettings(
    images=6 * 16, batch_images=16, micro_images=16, lr=1e-2, trains="everything", precision="float32",
    objective=Objective.of("cross_entropy + one_for_all"), save_every=0.0,
)  # fmt: skip


def batch_of(step: int, known: float = 1.0) -> ImageBatch:
    """16 gray images of noise, each with a bright corner that says its class."""
    g = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (16,), generator=g)
    images = 0.3 * torch.rand(16, 1, 16, 16, generator=g)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 8 * (label // 2) :, 8 * (label % 2) :][:, :8, :8] += 0.7
    is_known = torch.rand(16, generator=g) < known
    return ImageBatch(images, torch.eye(12)[labels] * is_known[:, None])


def changed(**fields) -> ImageSettings:
    return dataclasses.replace(SETTINGS, **fields)


def weights(model):
    """All but the counts of batches."""
    return torch.cat([v.flatten().double() for v in model.state_dict().values() if v.is_floating_point()])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_student_learns_the_classes(optimizer):
    rate = {"adamw": 1e-2, "sgd": 0.1}[optimizer]
    settings = changed(images=40 * 16, objective=Objective.of("cross_entropy"), optimizer=optimizer, lr=rate)
    student = classify(classifier("resnet"), None, batch_of, settings)
    batch = batch_of(1000)
    right = (logits(student, batch.images).argmax(-1) == batch.targets.argmax(-1)).double().mean()
    assert right > 0.9 and not any(p.requires_grad for p in student.parameters()) and not student.training


@pytest.mark.parametrize("family, ema", [("resnet", 0.9), ("resnet", 0.0), ("vit", 0.0), ("mlp_mixer", 0.0)])
def test_it_goes_on_bit_by_bit_where_it_stopped(family, ema):
    """The running statistics of batch norms, the projectors, the optimizer and the moving average included."""
    teacher, settings = classifier("vit", seed=3), changed(ema=ema)
    whole = classify(classifier(family), teacher, batch_of, settings)
    kept = Kept()
    for stop_after in (2, 5, None):
        kept.stop_after = stop_after
        student = classifier(family)
        try:
            classify(student, teacher, batch_of, settings, track=kept, keep=kept)
        except Exception as error:
            assert "Stopped at step" in str(error) and stop_after
    assert torch.equal(weights(student), weights(whole))


def test_the_moving_average_is_what_is_measured_and_what_the_student_has_in_the_end():
    latest, seen, decay = [], [], 0.35

    def run(**fields):
        settings = changed(schedule="wsd", decay=0.0, evaluate_every=16, **fields)
        measured = latest if not fields else seen
        return classify(
            classifier("resnet"), classifier("vit", seed=3), batch_of, settings,
            measure=lambda model: measured.append(weights(model)) or {},
        )  # fmt: skip

    run()
    student = run(ema=decay)
    expected = latest[0]
    for n, (after, found) in enumerate(zip(latest, seen, strict=True)):
        share = min(decay, (1 + n) / (10 + n)) if n else 0.0
        expected = share * expected + (1 - share) * after
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(seen) == 6 and torch.equal(weights(student), seen[-1])


def test_indices_and_counts_are_no_averages():
    """Swin's table of relative positions is a buffer of indices, which an average would round."""
    model = small_model("swin")
    average = moving_average(model, 0.99996)
    for _ in range(20):
        average.update_parameters(model)
    whole = {name: value for name, value in model.named_buffers() if not value.is_floating_point()}
    assert whole and all(
        torch.equal(value, dict(average.module.named_buffers())[name]) for name, value in whole.items()
    )


def test_micro_batches_add_up_where_no_batch_norm_sees_them():
    objective = Objective.of("cross_entropy + forward_kl + 0.1*attention_transfer")
    start, teacher = classifier("vit"), classifier("mlp_mixer")
    settings = changed(images=16, objective=objective, optimizer="sgd", lr=0.1)
    parts = (dataclasses.replace(settings, micro_images=size) for size in (16, 4))
    found = [weights(classify(copy.deepcopy(start), teacher, batch_of, part)) for part in parts]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_images_without_a_label_teach_by_the_teacher_alone():
    def unknown(step):
        return batch_of(step, known=0.0)

    start, teacher = classifier("vit"), classifier("resnet", seed=3)
    by_labels = classify(
        copy.deepcopy(start), None, unknown, changed(objective=Objective.of("cross_entropy"), weight_decay=0.0)
    )
    assert torch.equal(weights(by_labels), weights(start))
    by_teacher = classify(copy.deepcopy(start), teacher, unknown, SETTINGS)
    assert not torch.equal(weights(by_teacher), weights(start))


def test_the_teacher_stays_as_it_is():
    teacher = classifier("resnet", seed=3)
    before = weights(teacher)
    classify(classifier("vit"), teacher, batch_of, SETTINGS)
    assert torch.equal(weights(teacher), before)


def test_what_needs_a_teacher_is_refused_without_one():
    with pytest.raises(UserError, match="classify has no teacher to compare with"):
        classify(classifier("vit"), None, batch_of, SETTINGS)
    with pytest.raises(UserError, match="its objective cannot be energy_mse"):
        classify(classifier("vit"), classifier("vit"), batch_of, changed(objective=Objective.of("energy_mse")))
