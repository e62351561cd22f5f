"""Vision transformers with SS2D in place of attention: what they start from, what special tokens see, and that any
folder of theirs is a teacher."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from convert.core.errors import UserError
from convert.models.access import layers_of, replaced_attention
from convert.models.catalog import resolve
from convert.models.vision.features import features, logits, staged
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.models.vision.loading import load_teacher
from convert.models.vision.vit_ss2d import HOSTS, TokenSS2D, ViTSS2DConfig, ViTSS2DForImageClassification
from convert.models.vision.vit_ss2d_start import ss2d_config, without_attention
from tests.evaluation.classifiers import classifier
from tests.models.vision.small_models import small_model

SPECIAL = {"vit": 1, "deit": 2, "vit_msn": 1, "ijepa": 0}


def teacher_of(family, sides=(16, 16)):
    config = HOSTS[family].config_class(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=7,
        num_channels=1, image_size=list(sides), patch_size=4, layer_norm_eps=1e-5, hidden_act="relu",
    )  # fmt: skip
    set_preprocessing(config, Preprocessing(*sides, (0.4,), (0.25,)))
    torch.manual_seed(0)
    model = HOSTS[family](config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def student_of(teacher, *sizes):
    torch.manual_seed(1)
    return without_attention(
        ViTSS2DForImageClassification(ss2d_config(teacher.config, *sizes or (4, 1.0, None))), teacher
    )


@pytest.mark.parametrize("family", HOSTS)
def test_all_but_attention_is_the_teachers_bit_for_bit(family):
    teacher = teacher_of(family)
    student = student_of(teacher).eval()
    theirs, ours = teacher.state_dict(), student.host.state_dict()
    kept = {name for name in theirs if ".attention." not in name}
    assert kept == {name for name in ours if ".attention." not in name} and len(kept) > 20
    assert all(torch.equal(theirs[name], ours[name]) for name in kept)
    images = torch.rand(2, 1, 16, 16)
    before, after = features(teacher, images), features(student, images)
    assert [stage.shape for stage in before.stages] == [stage.shape for stage in after.stages]
    assert staged(student).stages[0].special_tokens == SPECIAL[family]
    # with the teacher's attention put back, it is the teacher: blocks, norms and head are called as they were
    for block, original in zip(layers_of(student), layers_of(teacher), strict=True):
        block.attention = original.attention
    student.host.config._attn_implementation = teacher.config._attn_implementation
    assert torch.equal(logits(student, images), before.logits) and not torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("family", ["deit", "ijepa"])
def test_every_parameter_learns_and_every_patch_is_seen_by_all(family):
    student = student_of(teacher_of(family, (16, 24)), 4, 2.0, 3).double().train()
    with torch.no_grad():
        for mixer in replaced_attention(student).values():
            for p in mixer.parameters():
                p.add_(0.05 * torch.randn_like(p))
    x = torch.randn(2, SPECIAL[family] + 24, 16, dtype=torch.float64, requires_grad=True)
    mixer = replaced_attention(student)[1]
    assert isinstance(mixer, TokenSS2D) and mixer.grid == (4, 6) and mixer.mixer.rank == 3
    y, weights = mixer(x, None, output_attentions=False)
    assert y.shape == x.shape and weights is None
    for token in range(x.shape[1]):  # each sees all the others: the distillation token by way of the places
        (seen,) = torch.autograd.grad(y[0, token].square().sum(), x, retain_graph=True)
        assert (seen[0].abs().sum(-1) > 0).all() and not seen[1].any()
    images = torch.randn(2, 1, 16, 24, dtype=torch.float64)
    found = student(images, labels=torch.tensor([1, 2]))
    assert found.loss == torch.nn.functional.cross_entropy(found.logits, torch.tensor([1, 2]))
    found.loss.backward()
    for name, p in student.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_places_lie_on_the_grid_as_patches_do():
    """The mixer of a transposed image with its directions exchanged is the transposed one: rows and columns are not
    confused."""
    torch.manual_seed(0)
    config = ViTSS2DConfig(hidden_size=8, state_size=3)
    mixer, turned = (TokenSS2D(config, grid, 0) for grid in ((3, 5), (5, 3)))
    mixer.start()
    turned.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        turned.mixer.conv.weight.copy_(mixer.mixer.conv.weight.mT)
        for name in ("x_proj", "dt_proj", "dt_bias", "A_log", "D"):
            p = getattr(turned.mixer, name)
            p.copy_(p[[1, 0, 3, 2]])  # rows, columns, and both backwards
    x = torch.randn(1, 15, 8)
    transposed = x.unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)
    expected = mixer(x)[0].unflatten(1, (3, 5)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(turned(transposed)[0], expected, rtol=1e-5, atol=1e-6)
    assert (mixer(transposed)[0] - expected).abs().max() > 1e-3


def test_a_start_is_vmambas_and_of_the_seed():
    """transformers draws all linear maps and convolutions by its own rule, the mixers' too."""
    teacher = teacher_of("vit")
    one, same = student_of(teacher), student_of(teacher)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    mixer = replaced_attention(one)[0]
    assert not mixer.to_places.weight.any() and mixer.from_places.weight.std() < 0.04
    assert 0.15 < mixer.mixer.conv.weight.std() < 0.25  # uniform within a third
    assert torch.equal(mixer.mixer.A_log[2, 5], torch.arange(1.0, 5.0).log())


@pytest.mark.parametrize("family", ["deit", "ijepa"])
def test_a_folder_of_theirs_is_a_teacher_again(family, tmp_path):
    student = student_of(teacher_of(family)).eval()
    student.save_pretrained(tmp_path)
    images = torch.rand(2, 1, 16, 16)
    found = load_teacher(resolve(str(tmp_path)))
    assert torch.equal(logits(found.model, images), logits(student, images))
    assert torch.equal(
        logits(AutoModelForImageClassification.from_pretrained(tmp_path).eval(), images), logits(student, images)
    )
    with pytest.raises(UserError, match="this teacher is a vit_ss2d. Take --to vmamba"):
        ss2d_config(found.model.config, 4, 1.0, None)


def test_other_teachers_are_refused():
    for model in (classifier("resnet"), classifier("vmamba"), small_model("swin")):
        with pytest.raises(UserError, match=f"this teacher is a {model.config.model_type}. Take --to vmamba"):
            ss2d_config(model.config, 4, 1.0, None)
    config = teacher_of("deit").config
    config.architectures = ["DeiTForImageClassificationWithTeacher"]
    with pytest.raises(UserError, match="is a DeiTForImageClassification; this teacher is a .*WithTeacher. Take"):
        ss2d_config(config, 4, 1.0, None)
    with pytest.raises(ValueError, match="one of vit, deit, vit_msn, ijepa; got 'swin'"):
        ViTSS2DForImageClassification(ViTSS2DConfig(family="swin"))
