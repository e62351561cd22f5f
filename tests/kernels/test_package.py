"""Our package `kernels` beside Hugging Face's of the same name, in both orders on the path."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """
import builtins
from kernels.layer import Mode

builtins.theirs_ran = True  # how a test sees that this file was run

class CUDAProperties:
    pass

def get_kernel(name):
    return f"their {name}"

def use_kernel_forward_from_hub(*names):
    return lambda target: target

use_kernelized_func = use_kernel_forward_from_hub
"""

LLAMA = "from transformers import LlamaForCausalLM"
OURS = """
from kernels.selective_scan import selective_scan
import torch
one = torch.ones(1, 1, 1)
assert selective_scan(one, one, -one[0], one, one).item() == 1
"""
THEIRS = """
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available()  # or nothing was tested
from kernels import get_kernel
assert get_kernel("x") == "their x"
from kernels.layer import Mode
import kernels, pickle
assert pickle.loads(pickle.dumps(kernels.CUDAProperties)) is kernels.CUDAProperties
"""


def names_transformers_imports() -> set[str]:
    """Return the names that transformers imports from `kernels` while a model class is imported."""
    source = Path(transformers.__file__).parent / "integrations" / "hub_kernels.py"
    imports = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports if node.level == 0 and node.module == "kernels" for alias in node.names}


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A site folder with a stand-in for their package, in a version that transformers accepts."""
    package = tmp_path / "theirs" / "kernels"
    package.mkdir(parents=True)
    others = "".join(f"\n{name} = globals().get({name!r}, object)" for name in sorted(names_transformers_imports()))
    (package / "__init__.py").write_text(STAND_IN + others + "\n")
    (package / "layer.py").write_text("class Mode:\n    pass\n")
    info = package.parent / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    return package.parent


def python(code: str, *path: Path) -> str:
    """Return what a clean process prints, with these folders on its path, away from the repository, in 30 seconds."""
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_CPU, (30, 30))\n{code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"
    return done.stdout


def test_ours_alone():
    python(
        f"{LLAMA}\n{OURS}\nimport kernels\nassert not hasattr(kernels, 'get_kernel')"
        "\nassert not hasattr(kernels, '__version__')",
        ROOT,
    )


def test_ours_first(theirs):
    python(f"{LLAMA}\n{OURS}\n{THEIRS}", ROOT, theirs)


def test_theirs_first(theirs):
    """An editable install that is used from another folder has this order."""
    python(
        f"import kernels\nassert {str(theirs)!r} in kernels.__file__\nimport convert\n{OURS}\n{LLAMA}\n{THEIRS}",
        theirs,
        ROOT,
    )


def test_our_imports_never_run_theirs(theirs):
    """A broken package of theirs does not break ours."""
    (theirs / "kernels" / "__init__.py").write_text("raise RuntimeError('theirs was run')")
    ours = sorted(
        p.stem for p in (ROOT / "kernels").iterdir() if p.stem[0] not in "._" and (p.is_dir() or p.suffix == ".py")
    )
    assert {"chunk_scan", "selective_scan"} <= set(ours)
    code = "\n".join(
        f"try:\n    from kernels import {name}\nexcept ModuleNotFoundError as e:\n    assert e.name == 'triton', e"
        for name in ours
    )
    python(code, ROOT, theirs)


@pytest.mark.parametrize("same", [True, False], ids=["by-a-link", "another-checkout"])
def test_ours_twice_on_the_path(tmp_path, same):
    """A name that neither has is an AttributeError, not a search without end."""
    second = tmp_path / "second"
    if same:
        second.symlink_to(ROOT)
    else:
        (second / "kernels" / "selective_scan").mkdir(parents=True)
        (second / "kernels" / "__init__.py").write_text((ROOT / "kernels" / "__init__.py").read_text())
    assert python("import kernels\nprint(hasattr(kernels, 'nobody_has_this'))", second, ROOT) == "False\n"


def test_ours_twice_and_theirs(tmp_path, theirs):
    (tmp_path / "second").symlink_to(ROOT)
    code = "from kernels import get_kernel, CUDAProperties\nimport kernels\nprint(hasattr(kernels, 'nobody_has_this'))"
    assert python(code, tmp_path / "second", ROOT, theirs) == "False\n"
