"""The table of what classifiers cost in PyTorch, as ONNX and in 8 bits."""

from types import SimpleNamespace

import pytest

from convert.core.errors import UserError
from experiments import edge


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_three_rows_of_one_classifier(tmp_path, monkeypatch):
    report = SimpleNamespace(domain="vision", settings=SimpleNamespace(data="digits"))
    monkeypatch.setattr(edge.records, "report", lambda run: report)
    rows = edge.rows_of(edge.Path("vit-nano"), tmp_path)
    assert [row[1] for row in rows] == ["PyTorch", "ONNX", "ONNX, 8 bits"]
    accuracy = [float(row[4].rstrip("%")) for row in rows]
    assert accuracy[0] == accuracy[1] and abs(accuracy[2] - accuracy[0]) < 5 and accuracy[0] > 95
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * (tmp_path / "model.onnx").stat().st_size


def test_text_is_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match="This compares image classifiers"):
        edge.rows_of(finished_run, tmp_path)
