"""What classifiers expect of their images."""

import pytest
import torch
from transformers import AutoConfig

from convert.core.errors import UserError
from convert.models.vision.features import features, logits
from convert.models.vision.inputs import Preprocessing, model_inputs, preprocessing_of
from tests.models.vision.small_models import small_model


def test_each_model_sees_the_same_image_in_its_own_normalisation_and_size():
    images = torch.rand(2, 3, 48, 48)
    for model in (small_model("vit", mean=0.5), small_model("resnet", mean=0.1, side=96)):
        wanted = preprocessing_of(model.config)
        seen = model_inputs(model, images)
        assert seen.shape == (2, 3, wanted.height, wanted.width)
        as_images = seen * torch.tensor(wanted.std).view(3, 1, 1) + torch.tensor(wanted.mean).view(3, 1, 1)
        torch.testing.assert_close(as_images.mean((2, 3)), images.mean((2, 3)), atol=0.02, rtol=0)
        torch.testing.assert_close(logits(model, images), model(pixel_values=seen).logits)


def test_an_image_of_the_models_size_is_not_resampled():
    images = torch.rand(1, 3, 64, 64)
    model = small_model("vit", mean=0.3)
    assert torch.equal(model_inputs(model, images), (images - torch.tensor(0.3)) / torch.tensor(0.25))


def test_gray_images_are_repeated_and_colours_are_not_dropped():
    gray = torch.rand(1, 1, 64, 64)
    colours = model_inputs(small_model("vit"), gray)
    assert colours.shape[1] == 3 and torch.equal(colours[:, 0], colours[:, 2])
    with pytest.raises(UserError, match="these have 3, and vit takes 1"):
        model_inputs(small_model("vit", channels=1), torch.rand(1, 3, 64, 64))


def test_preprocessing_goes_with_the_configuration(tmp_path):
    model = small_model("resnet", mean=0.125)
    model.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert preprocessing_of(read) == Preprocessing(64, 64, (0.125,) * 3, (0.25,) * 3)
    read.preprocessing = {"height": 3}
    with pytest.raises(UserError, match="must have height, width, mean and std"):
        preprocessing_of(read)
    del read.preprocessing
    with pytest.raises(UserError, match="must say how images are prepared"):
        preprocessing_of(read)
    with pytest.raises(UserError, match="a deviation above 0"):
        Preprocessing(8, 8, (0.5,), (0.0,))


@pytest.mark.parametrize("family, places", [("vit", 8 * 8), ("resnet", 16 * 16), ("mobilenet_v2", 16 * 16)])
def test_outputs_of_stages_are_those_of_a_plain_pass(family, places):
    model, images = small_model(family), torch.rand(2, 3, 64, 64)
    found = features(model, images)
    assert torch.equal(found.logits, logits(model, images)) and 1 <= len(found.stages) <= 4
    first = found.stages[0]
    assert (first.shape[1] - 1 if first.dim() == 3 else first.shape[2:].numel()) == places
