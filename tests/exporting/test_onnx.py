"""The command convert.export: an ONNX file that runs where only onnxruntime and numpy can be imported."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.core import manifest
from convert.core.errors import UserError
from convert.export import main
from convert.exporting import onnx as exporting
from convert.exporting.images import export
from convert.exporting.onnx import NEEDED, export_onnx
from convert.exporting.onnx_int8 import latency_ms, quantise, session_of
from convert.models.vision.features import logits
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.models.vision.vmamba import VMambaConfig, VMambaForImageClassification
from tests.evaluation.classifiers import classifier, image_batches

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs the extra [onnx]"
)
NAMES = [f"class {n}" for n in range(12)]


@pytest.fixture
def run(tmp_path):
    """The folder of a run whose student is a ViT."""
    folder = tmp_path / "digits"
    folder.mkdir()
    model = classifier("vit")
    export(model, folder / "model", card="", class_names=NAMES)
    return folder, model


@installed
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_a_run_becomes_a_file_that_runs_alone(run, capsys):
    import onnxruntime

    folder, model = run
    (folder / "model.onnx").write_bytes(b"an earlier export")
    assert main([str(folder), "--format", "onnx"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "model.onnx" in said and "opset 18" in said and "torchvision" not in said
    assert sorted(place.name for place in folder.iterdir()) == ["lock", "model", "model.onnx", "sha256.json"]
    manifest.check(folder, "model.onnx")
    content = (folder / "model.onnx").read_bytes()
    assert b"stack_trace" not in content and b".py" not in content  # paths of this machine
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == NAMES
    (batch,) = image_batches(5)
    (found,) = session.run(["logits"], {"images": batch.images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, logits(model, batch.images).numpy(), atol=1e-5, rtol=1e-4)


@installed
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("rank_ratio", [None, 0.5])
def test_scans_over_images_are_exported(rank_ratio, tmp_path, caplog):
    torch.manual_seed(0)
    sizes = (
        {"hidden_sizes": [16, 32], "depths": [1, 1]} if rank_ratio is None else {"hidden_sizes": [16], "depths": [1]}
    )
    config = VMambaConfig(image_size=20, num_channels=1, num_labels=3, rank_ratio=rank_ratio, **sizes)
    set_preprocessing(config, Preprocessing(20, 20, (0.5,), (0.5,)))
    model = VMambaForImageClassification(config).eval()
    assert export_onnx(model, tmp_path / "model.onnx") < 1e-5
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    pixels = [np.random.default_rng(i).random((1, 1, 20, 20), np.float32) for i in range(4)]
    quantise(tmp_path / "model.onnx", tmp_path / "int8.onnx", pixels)
    assert not list(tmp_path.glob("*.prepared"))
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "int8.onnx")]
    float32, int8 = (session_of(tmp_path / name) for name in ("model.onnx", "int8.onnx"))
    one, other = (session.run(None, {"images": pixels[0]})[0] for session in (float32, int8))
    if rank_ratio is None:  # of low rank most of so small a file is its program
        assert sizes[1] < 0.75 * sizes[0]
    assert 0 < np.abs(one - other).max() < 0.2 * np.abs(one).max()
    assert latency_ms(float32, pixels[0]) > 0


def test_a_file_that_differs_never_takes_the_place_of_another(run, tmp_path, monkeypatch):
    _, model = run
    file = tmp_path / "model.onnx"
    file.write_bytes(b"an earlier export")
    monkeypatch.setattr(exporting, "_write", lambda _, side: side.write_bytes(b"another"))
    monkeypatch.setattr(exporting, "check_installed", lambda: None)

    def other_logits(script, name, inputs, outputs):
        assert Path(name).read_bytes() == b"another"
        with torch.no_grad():
            found = {n: exporting._WithPreprocessing(model)(torch.from_numpy(x)) for n, x in np.load(inputs).items()}
        np.savez(outputs, **{n: 1.001 * x.numpy() for n, x in found.items()})

    monkeypatch.setattr(exporting, "run_without_us", other_logits)
    with pytest.raises(RuntimeError, match=r"those of 1 images differ by 0\.001 of the largest"):
        export_onnx(model, file)
    assert file.read_bytes() == b"an earlier export" and not list(tmp_path.glob("*.writing"))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["neox-nano", "--format", "onnx"], "ONNX files are made of image classifiers; neox-nano is a language model"),
        (["RUN", "--format", "gguf"], "--format invalid choice"),
        (["RUN"], "required: --format"),
        (["RUN", "--format", "onnx", "--out", "RUN/model/config.json"], "must end in .onnx"),
        (["RUN", "--format", "onnx", "--out", "RUN/mine.onnx"], "replaces no file but a run's own"),
        (["RUN", "--format", "onnx", "--out", "RUN/nowhere/a.onnx"], "a folder that exists"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(run, argv, words, capsys):
    folder, _ = run
    (folder / "mine.onnx").write_text("mine")
    assert main([part.replace("RUN", str(folder)) for part in argv]) == 2
    said = capsys.readouterr().err
    assert words in " ".join(said.split()) and said.count("\n") == 1
    assert (folder / "mine.onnx").read_text() == "mine" and not (folder / "model.onnx").exists()


def test_missing_packages_are_a_sentence(monkeypatch, run, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(UserError, match=r"missing: .*onnxruntime\. pip install -e '\.\[onnx\]'"):
        export_onnx(run[1], tmp_path / "model.onnx")
