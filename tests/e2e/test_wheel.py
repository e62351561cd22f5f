"""The wheel, installed beside a package `kernels` of somebody else, as Hugging Face's is: neither overwrites the other,
and the commands work."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import transformers
from transformers.utils.import_utils import KERNELS_MIN_VERSION

from kernels import trust
from tests.kernels.test_package import STAND_IN, names_transformers_imports

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = Path(transformers.__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What the command prints, where nothing of this repository is on the path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without network from a link to the sources, so that nothing is left in the repository."""
    place = tmp_path_factory.mktemp("build")
    for name in ("convert", "kernels", "experiments", "setup.py", "pyproject.toml", "LICENSE"):
        (place / name).symlink_to(ROOT / name)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", place / "dist", place, cwd=place)
    (built,) = (place / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A stand-in for Hugging Face's `kernels`, in a version that transformers accepts."""
    file = tmp_path_factory.mktemp("theirs") / f"kernels-{KERNELS_MIN_VERSION}-py3-none-any.whl"
    others = "".join(f"\n{name} = globals().get({name!r}, object)" for name in sorted(names_transformers_imports()))
    info = f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    content = {
        "kernels/__init__.py": f"{STAND_IN}{others}\n",
        "kernels/layer.py": "class Mode:\n    pass\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return file


def environment(place: Path, *wheels: Path) -> Path:
    """A virtual environment with these wheels, installed in this order, that sees the libraries of this one, but no
    editable install in it. The folder of its commands."""
    venv.create(place, symlinks=True)
    bin_ = place / "bin"
    for file in wheels:
        install = ("install", "-q", "--no-deps", "--no-index", file)
        run(sys.executable, "-m", "pip", "--python", bin_ / "python", *install, cwd=place)
    packages = sysconfig.get_path("purelib", "venv", {"base": str(place)})
    Path(packages, "libraries.pth").write_text(f"{LIBRARIES}\n")  # a path line: .pth files in there are not read
    return bin_


def files(place: Path, package: str) -> dict[str, bytes]:
    """The Python files of a package in this environment, by their path."""
    (folder,) = place.glob(f"lib/python*/site-packages/{package}")
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.py"))}


FACTS = """
import kernels, convert, convert.kernels.selective_scan
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available() and kernels.get_kernel("x") == "their x" and not hasattr(kernels, "selective_scan")
assert convert.kernels.__path__ != kernels.__path__ and "site-packages" in convert.__file__
import convert.experiments.compare
from convert.models.catalog import NANO, resolve
from convert.core import manifest
assert (NANO.parent / "sha256.json").exists()
manifest.check_model(NANO)
images = resolve("vit-nano")
assert images.kind == "package" and "site-packages" in images.where
"""
# in the same process, which imports for seconds; without a context that takes long to read
CONVERT = """
import sys
from convert.evaluation import final_metrics
from convert.run import main
final_metrics.PREFILL_SECONDS = 0.2
sys.exit(main())
"""


def test_it_installs_beside_another_package_of_that_name_and_runs(wheel, theirs, tmp_path):
    first, second = tmp_path / "ours-first", tmp_path / "theirs-first"
    commands = environment(first, wheel, theirs)
    environment(second, theirs, wheel)
    for package in ("convert", "kernels"):
        assert files(first, package) == files(second, package)
    assert set(files(first, "kernels")) == {"__init__.py", "layer.py"}  # theirs, and all of it
    for place in (first, second):  # whose files are the same
        for command in ([place / "bin" / "python", "-m", "convert.run"], [place / "bin" / "convert-model"]):
            assert "--to TARGET" in run(*command, "--help", cwd=tmp_path)
    assert "python -m convert.kernels.bench" in run(
        commands / "python", "-m", "convert.kernels.bench", "--help", cwd=tmp_path
    )

    (tmp_path / "text.txt").write_text("some words to read, and some more. " * 3000)
    run(
        commands / "python", "-c", FACTS + CONVERT, "neox-nano", "--to", "mamba2", "--tiny", "--wandb", "disabled",
        "--data", "text.txt", cwd=tmp_path, CONVERT_CACHE=str(tmp_path / "cache"),
        CONVERT_KERNELS=str(trust.cache_folder()),
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",  # two threads wait for each other where other tests run
    )  # fmt: skip
    exported = tmp_path / "runs" / "neox-nano-mamba2-tiny" / "model"
    assert (exported / "model.safetensors").exists() and list(exported.glob("*chunk_scan*.py"))
