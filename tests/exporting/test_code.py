"""The code of an export: the modules that this student runs, as flat files, and no others."""

import ast
import re
import sys

import pytest
from transformers.dynamic_module_utils import get_imports

from convert.exporting.code import flatten, model_code
from convert.mixers import MIXERS


def test_the_code_imports_only_itself_torch_transformers_and_the_standard_library():
    code = model_code(MIXERS)
    assert "convert_models_student.py" in code and not {"convert.py", "kernels.py"} & set(code)
    for name, source in code.items():
        assert source.startswith("# Generated from ")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in code, name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {module.split(".")[0] for module in modules} <= {
                    "torch",
                    "transformers",
                } | sys.stdlib_module_names | ({"triton"} if "fused" in name or "tune" in name else set()), name


OF_A_MIXER = {  # the modules that one mixer has and not all of them
    "linear": {"hedgehog", "linear"},
    "mamba": {"hedgehog", "mamba", "mamba_block"},
    "mamba2": {"hedgehog", "mamba2", "mamba_block"},
    "gate-swa": {"gate_swa"},
    "mla": {"mla"},
    "kda": {"kda"},
    "gdn": {"gdn"},
}


KERNEL = {
    "linear": {"chunk_scan"},
    "mamba": {"selective_scan"},
    "mamba2": {"chunk_scan"},
    "gate-swa": set(),
    "mla": set(),
    "kda": {"delta_rule"},
    "gdn": {"delta_rule"},
}


combinations = [*((name,) for name in MIXERS), ("mamba", "gate-swa"), ("linear", "mla"), (), tuple(MIXERS)]


@pytest.mark.parametrize("names", combinations, ids="+".join)
def test_an_export_carries_what_it_runs(names):
    """The student's mixers and no others, their kernels, and nothing of how they were started, calibrated or swapped
    in."""
    code = model_code(names)
    own = set().union(*(OF_A_MIXER[name] for name in names))
    of_mixers = {file.removeprefix("convert_mixers_").removesuffix(".py") for file in code if "convert_mixers_" in file}
    assert of_mixers - {"parts"} == own | {"base", "families"} and ("parts" in of_mixers) == bool(names)
    scans = set().union(*(KERNEL[name] for name in names))
    assert {scan for scan in ("chunk_scan", "delta_rule", "selective_scan") if f"kernels_{scan}.py" in code} == scans
    assert any(file.startswith("kernels_") for file in code) == bool(scans)
    rest = {file for file in code if not file.startswith(("convert_mixers_", "kernels_"))}
    models = ("cache", "config", "positions", "slot", "student")
    assert rest == {"convert_mixers.py", "convert_core_errors.py", "convert_core_fields.py"} | {
        f"convert_models_{name}.py" for name in models
    }
    for word in ("Projections", "from_projections", "CalibrationStats", "STARTS", "def swap"):
        assert not any(word in source for source in code.values()), word
    table = {}
    exec(re.sub(r"from \.\w+ import (\w+)", r"\1 = '\1'", code["convert_mixers.py"]), table)
    assert table["MIXERS"] == {name: MIXERS[name].__name__ for name in names}


def test_transformers_asks_for_no_triton(tmp_path):
    """It checks what the files of a hub repository import, one by one; a machine without Triton never runs the fused
    kernels."""
    for name, source in model_code(MIXERS).items():
        (tmp_path / name).write_text(source, encoding="utf-8")
        assert set(get_imports(tmp_path / name)) <= {"torch", "transformers"} | sys.stdlib_module_names, name


def test_flatten_rewrites_imports_wherever_they_stand():
    source = (
        '"""from convert.data.text import nothing"""\n'
        "from kernels.chunk_scan import chunk_scan as run\n"
        "from convert.mixers.parts import (\n    QKV,  # é\n    rotate as turn,\n)\n"
        "import torch\n\n\ndef f():\n    from convert.mixers.projections import Shape; return Shape\n\n\n"
        "AutoConfig.register(\n    'x', torch\n)\n"
    )
    flat, imported = flatten(source, "convert.x")
    assert (
        flat == '"""from convert.data.text import nothing"""\n'
        "from .kernels_chunk_scan import chunk_scan as run\n"
        "from .convert_mixers_parts import (\n    QKV,  # é\n    rotate as turn,\n)\n"
        "import torch\n\n\ndef f():\n    from .convert_mixers_projections import Shape; return Shape\n"
    )
    assert imported == {"kernels.chunk_scan", "convert.mixers.parts", "convert.mixers.projections"}


@pytest.mark.parametrize(
    "line",
    ["import convert.models.student", "import kernels.chunk_scan as k", "from convert import model",
     "from kernels import chunk_scan", "from convert.mixers import parts", "from . import model",
     "from .model import swap"],
)  # fmt: skip
def test_flatten_refuses_imports_of_modules(line):
    with pytest.raises(
        ValueError, match=r"`from package\.module import name`; convert\.x, line 2, has `" + line.replace(".", r"\.")
    ):
        flatten(f"\n{line}\n", "convert.x")
