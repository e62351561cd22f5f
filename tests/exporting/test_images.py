"""An exported classifier works where our packages are not: the same logits, and images prepared in the same way."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from convert.core.errors import UserError
from convert.exporting import images as exporting
from convert.exporting.images import export, export_and_verify
from convert.models.vision.inputs import model_inputs
from tests.evaluation.classifiers import classifier, image_batches

NAMES = [f"class {n}" for n in range(12)]


def exported(model, folder, images, **changes):
    fields = dict(card="# with code", card_without_code="# without", class_names=NAMES, dtype=torch.float32)
    return export_and_verify(model, folder, images=images, **fields | changes)


@pytest.mark.parametrize(
    "family, channels, side", [("resnet", 3, 16), ("mlp_mixer", 1, 9), ("vmamba", 1, 16), ("vit_ss2d", 1, 16)]
)
def test_a_folder_works_in_a_clean_process(family, channels, side, tmp_path):
    """A family of transformers with images of its size; three of ours, one with images that are resized, one of low
    rank, one around a model of transformers."""
    model = classifier(family, channels)
    (batch,) = image_batches(3, channels=channels, side=side)
    found = exported(model, tmp_path / "model", batch.images)
    assert found["max_abs_logit"] <= found["allowed"] and found["dtype"] == "float32"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"]["3"] == "class 3" and config["label2id"]["class 3"] == 3
    ours = family != "resnet"
    assert ("auto_map" in config) == ours
    assert (tmp_path / "model" / "README.md").read_text() == ("# with code" if ours else "# without")
    assert bool(list((tmp_path / "model").glob("*.py"))) == ours
    exported_again = tmp_path / "model"
    export(model, exported_again, card="# again", class_names=NAMES)  # it replaces an earlier export
    assert (exported_again / "README.md").read_text() == "# again"


@pytest.mark.parametrize("channels, of_pictures, side", [(1, 1, 16), (1, 1, 40), (3, 3, 7), (3, 1, 16), (3, 1, 30)])
def test_the_image_processor_prepares_as_the_model_saw(channels, of_pictures, side, tmp_path):
    """Gray and coloured pictures, smaller, as large, and larger than the model's 16 x 16; transformers resizes in
    8 bits."""
    model = classifier("vit", channels)
    export(model, tmp_path / "model", card="", class_names=NAMES)
    (batch,) = image_batches(4, channels=of_pictures, side=side)
    bytes_ = (batch.images * 255).round().to(torch.uint8)
    pictures = [Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).numpy()) for picture in bytes_]
    found = AutoImageProcessor.from_pretrained(tmp_path / "model")(pictures, return_tensors="pt")["pixel_values"]
    levels = 255 * torch.tensor(model.config.preprocessing["std"]).view(-1, 1, 1)
    difference = ((found - model_inputs(model, bytes_ / 255)) * levels).abs().max()
    assert difference < (1e-3 if side == 16 else 1.01)


def test_statistics_of_batch_norms_stay_whole(tmp_path):
    model = classifier("resnet")
    export(model, tmp_path / "model", card="", class_names=NAMES, dtype=torch.bfloat16)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    kinds = {name.split(".")[-1]: tensor.dtype for name, tensor in weights.items()}
    assert kinds["weight"] == torch.bfloat16 and kinds["running_mean"] == torch.float32
    assert model.dtype == torch.float32


@pytest.mark.parametrize("what", ["logits", "pixel_values"])
def test_an_export_that_differs_is_set_aside(what, tmp_path, monkeypatch):
    model, (batch,) = classifier("vit"), image_batches(2)
    with torch.no_grad():
        inputs = model_inputs(model, (batch.images * 255).round() / 255)
        found = {"logits": model(pixel_values=inputs).logits, "pixel_values": inputs}
    found[what] = found[what] + 0.01
    monkeypatch.setattr(exporting, "_in_clean_process", lambda *_: found)
    with pytest.raises(RuntimeError, match="same logits" if what == "logits" else "prepare images as the student saw"):
        exported(model, tmp_path / "model", batch.images)
    assert not (tmp_path / "model").exists() and (tmp_path / "model.unchecked").exists()


def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an earlier export"):
        export(classifier("vit"), tmp_path, card="", class_names=NAMES)
