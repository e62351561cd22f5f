"""Imports point one way: from a module to modules of its own rank or below."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("kernels", "convert", "experiments")

RANKS = (  # lowest first; a name stands for itself and what is inside it
    ("kernels",),
    ("convert.core.errors", "convert.core.console", "convert.core.network", "convert.core.fields", "convert.cli"),
    ("convert.core.files", "convert.core.places"),
    ("convert.core.json_lines", "convert.core.manifest", "convert.core.provenance"),
    ("convert.mixers.projections",),
    ("convert.mixers",),
    ("convert.models.cache",),
    ("convert.models.positions",),
    ("convert.models.student",),
    ("convert.models.weights",),
    ("convert.models.gguf_file",),
    (
        "convert.objectives.divergences",
        "convert.data.prompts",
        "convert.data.text",
        "convert.models.loading",
        "convert.models.teacher_files",
    ),
    ("convert.data.batches",),
    ("convert.evaluation.tasks",),
    ("convert.runs.schemas",),
    ("convert.runs.records",),
    ("convert.evaluation.scoring", "convert.training.loop"),
    ("convert.recipes.language", "convert.steps.calibration", "convert.evaluation.perplexity"),
    (
        "convert.runs.wandb_sink",
        "convert.runs.ledger",
        "convert.reports.report",
        "convert.planning.validate",
        "convert.steps.selection",
        "convert.exporting.native",
        "convert.exporting.portability",
    ),
    (
        "convert.planning.plan",
        "convert.runs.tracking",
        "convert.exporting.hub",
        "convert.evaluation.final_metrics",
        "convert.evaluation.lm_eval",
        "convert.evaluation.statistics",
    ),
    ("convert.steps.swap", "convert.exporting.verify", "convert.evaluation.runner", "convert.evaluation.monitor"),
    ("convert.reports.charts", "convert.reports.page"),
    ("convert.pipeline",),
    ("convert.run",),
    ("convert.evaluate", "convert.generate", "convert.__init__"),
    ("experiments",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}

NEVER = {  # beyond the order: what a module must not import, directly
    "kernels": ("transformers", "wandb", "convert", "experiments"),
    "convert.training.loop": ("convert.run", "convert.pipeline", "convert.recipes.language", "convert.evaluate"),
}
ALONE = {"convert.objectives.divergences": {"torch", "convert.core.fields"}}  # beside the standard library


class WrongImport(Exception):
    """Says which module, which file and line."""


def modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of ours; a package's own file is named package.__init__."""
    files = [file for package in OURS for file in sorted((root / package).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}


def imports(name: str, file: Path, known) -> list[tuple[str, int]]:
    """(module, line) of each import, wherever in the file; `from package import module` imports the module."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            source = ".".join(base + ([node.module] if node.module else []))
            inside = [f"{source}.{alias.name}" for alias in node.names]
            found += [
                (target if {target, f"{target}.__init__"} & set(known) else source, node.lineno) for target in inside
            ]
    return found


def rank(name: str, file: Path) -> int:
    """Of the longest prefix that has one. A package of modules with ranks of their own counts by its __init__."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in RANK:
            return RANK[prefix]
    if f"{name}.__init__" in RANK:
        return RANK[f"{name}.__init__"]
    raise WrongImport(
        f"{file}: {name} has no place in the order of imports; give it a rank in tests/architecture/test_imports.py"
    )


def starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def check(root: Path) -> int:
    """How many imports of ours were looked at; raises at the first wrong one."""
    known, seen = modules(root), 0
    for name, file in known.items():
        own = rank(name, file)
        for target, line in imports(name, file, known):
            where = f"{file.relative_to(root)}:{line}: {name} imports {target}"
            for module, forbidden in NEVER.items():
                if starts(name, module) and any(starts(target, f) for f in forbidden):
                    raise WrongImport(f"{where}, which {module} never does")
            top = target.split(".")[0]
            if name in ALONE and not {top, target} & (ALONE[name] | set(sys.stdlib_module_names)):
                raise WrongImport(
                    f"{where}, but only {', '.join(sorted(ALONE[name]))} and the standard library are allowed there"
                )
            if top in OURS:
                seen += 1
                other = known.get(target) or known.get(f"{target}.__init__")
                if other is None:
                    raise WrongImport(f"{where}, which does not exist")
                if rank(target, other) > own:
                    raise WrongImport(f"{where} ({other.relative_to(root)}), which comes later: imports point one way")
    return seen


def test_imports_point_one_way():
    assert check(ROOT) > 40


def test_every_rank_is_of_something():
    known = modules(ROOT)
    assert not [name for name in RANK if not any(starts(module, name) for module in known)]


PLANTED = {
    "upwards": (
        "convert/data/text.py",
        "from convert.run import main",
        r"convert/data/text.py:1: convert.data.text imports convert.run \(convert/run.py\), which comes later",
    ),
    "upwards-module": (
        "convert/mixers/mamba.py",
        "from convert import model",
        r"imports convert.models.student \(convert/models/student.py\), which comes later",
    ),
    "upwards-relative": (
        "convert/mixers/mamba.py",
        "from ..model import swap",
        r"convert.mixers.mamba imports convert.models.student \(convert/models/student.py\)",
    ),
    "upwards-plain": (
        "convert/core/errors.py",
        "import convert.models.student",
        r"convert.core.errors imports convert.models.student",
    ),
    "upwards-in-a-function": (
        "convert/models/student.py",
        "def f():\n    import convert.training.loop",
        r"convert/models/student.py:2: convert.models.student imports convert.training.loop",
    ),
    "upwards-to-the-package": (
        "convert/data/text.py",
        "import convert",
        r"convert.data.text imports convert \(convert/__init__.py\), which comes later",
    ),
    "to-experiments": ("convert/run.py", "import experiments.study", r"imports experiments.study"),
    "kernels-transformers": (
        "kernels/scan/__init__.py",
        "from transformers.utils import logging",
        r"which kernels never does",
    ),
    "kernels-wandb": (
        "kernels/scan/__init__.py",
        "try:\n    import wandb\nexcept ImportError:\n    pass",
        r"which kernels never does",
    ),
    "kernels-ours": (
        "kernels/scan/__init__.py",
        "from convert.core.errors import UserError",
        r"which kernels never does",
    ),
    "objectives": (
        "convert/objectives/divergences.py",
        "import math\nimport torch\nimport numpy as np",
        r"objectives.py:3: .*numpy, but only convert.core.fields, torch and",
    ),
    "objectives-ours": (
        "convert/objectives/divergences.py",
        "from convert.core.errors import UserError",
        r"but only convert.core.fields, torch and",
    ),
    "stages": (
        "convert/training/loop.py",
        "from convert import recipes",
        r"convert.training.loop imports convert.recipes.language, which convert.training.loop never does",
    ),
    "unknown": ("convert/helpers.py", "", r"helpers.py: convert.helpers has no place .* give it a rank"),
    "gone": ("convert/run.py", "from convert.vanished import f", r"imports convert.vanished, which does not exist"),
}


@pytest.mark.parametrize("file, source, message", PLANTED.values(), ids=PLANTED)
def test_a_planted_wrong_import_is_caught(file, source, message, tmp_path):
    for name in (
        "errors",
        "mixers/__init__",
        "mixers/mamba",
        "model",
        "data",
        "objectives",
        "stages",
        "recipes",
        "run",
        "__init__",
    ):
        module = tmp_path / "convert" / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("from convert.core.errors import UserError\n" if name == "run" else "")
    for place in ("kernels/scan/__init__.py", "experiments/study.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("")
    assert check(tmp_path) == 1
    (tmp_path / file).write_text(source)
    with pytest.raises(WrongImport, match=message):
        check(tmp_path)
