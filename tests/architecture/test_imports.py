"""Folders import one way: each imports folders of a lower floor, and none is part of a circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("kernels", "convert", "experiments")
FLOORS = 10  # at most, from kernels to experiments

# a folder -> the folders that it may import; what these may import is not implied
MAY_IMPORT = {
    "kernels": "",
    "convert/core": "",
    "convert/objectives": "core",
    "convert/data": "core",
    "convert/mixers": "core kernels",
    "convert/models": "core mixers objectives",
    "convert/runs": "core",
    "convert/reports": "core runs",
    "convert/exporting": "core mixers models",
    "convert/training": "core mixers models objectives data",
    "convert/evaluation": "core mixers models objectives data runs reports",
    "convert/domains": "core mixers models data evaluation exporting reports runs training",
    "convert/steps": "core mixers models objectives data training runs domains",
    "convert/recipes": "core mixers models objectives training steps",
    "convert/planning": "core kernels mixers models training domains steps recipes",
    "convert": "core models data evaluation domains steps recipes planning runs reports exporting",
    "experiments": (
        "convert kernels core mixers models objectives data training evaluation domains steps recipes planning"
        " runs reports exporting"
    ),
}
# what only a language model is, or has; the rooms that serve every domain reach it through the domain alone
LANGUAGE = (
    "convert.domains.language", "convert.recipes.language", "convert.reports.language", "convert.evaluation",
    "convert.exporting", "convert.data.text", "convert.data.corpus", "convert.data.prompts", "convert.models.loading",
    "convert.models.catalog", "convert.models.tokenizer",
)  # fmt: skip
SERVE_EVERY_DOMAIN = (
    "convert.pipeline",
    "convert.preparation",
    "convert.steps",
    "convert.training",
    "convert.planning",
    "convert.runs",
    "convert.reports",
)
NEVER = {  # beyond the folders: what a module must not import, directly
    "kernels": ("transformers", "wandb", "convert", "experiments"),
    **dict.fromkeys(SERVE_EVERY_DOMAIN, LANGUAGE),
}
ALONE = {"convert.objectives": {"torch", "convert.objectives", "convert.core"}}  # beside the standard library


class WrongImport(Exception):
    """An import that the architecture does not allow: it says which module, which file and line."""


def modules(root: Path) -> dict[str, Path]:
    """Name -> file of every module of ours; a package's own file is named package.__init__."""
    files = [file for package in OURS for file in sorted((root / package).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}


def folder_of(name: str) -> str:
    """The folder of a module, as MAY_IMPORT names it: of kernels the whole, of convert each folder in it."""
    parts = name.removesuffix(".__init__").split(".") if name.count(".") > 1 else name.split(".")
    top = parts[0]
    return top if top != "convert" or len(name.split(".")) < 3 else f"convert/{parts[1]}"


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


def starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def allowed(folder: str) -> set[str]:
    if folder not in MAY_IMPORT:
        raise WrongImport(f"{folder} has no place among the folders; give it one in tests/architecture/test_imports.py")
    names = MAY_IMPORT[folder].split()
    return {folder} | {name if name in ("convert", "kernels") else f"convert/{name}" for name in names}


def check(root: Path) -> dict[str, set[str]]:
    """Which folders each folder imports; raises at the first wrong import."""
    known, seen = modules(root), {}
    for name, file in known.items():
        own = folder_of(name)
        may, imported = allowed(own), seen.setdefault(own, set())
        for target, line in imports(name, file, known):
            where = f"{file.relative_to(root)}:{line}: {name} imports {target}"
            for module, forbidden in NEVER.items():
                if starts(name, module) and any(starts(target, f) for f in forbidden) and not starts(name, target):
                    raise WrongImport(f"{where}, which {module} never does")
            top = target.split(".")[0]
            for module, others in ALONE.items():
                prefixes = others | set(sys.stdlib_module_names)
                if starts(name, module) and not any(starts(target, prefix) for prefix in prefixes):
                    raise WrongImport(f"{where}, but only {', '.join(sorted(others))} and the standard library may be")
            if top not in OURS:
                continue
            full = f"{target}.__init__" if f"{target}.__init__" in known else target
            if full not in known:
                raise WrongImport(f"{where}, which does not exist")
            other = "convert" if full == "convert.__init__" else folder_of(full)
            if other not in may:
                raise WrongImport(f"{where}, and {own} may not import {other}: imports point one way")
            imported.add(other)
    return {folder: others - {folder} for folder, others in seen.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Folder -> the length of the longest chain of imports below it; raises where there is a circle."""
    found: dict[str, int] = {}

    def floor(folder: str, above: tuple[str, ...]) -> int:
        if folder in above:
            raise WrongImport(f"a circle: {' -> '.join((*above[above.index(folder) :], folder))}")
        if folder not in found:
            found[folder] = 1 + max((floor(other, (*above, folder)) for other in graph[folder]), default=0)
        return found[folder]

    for folder in graph:
        floor(folder, ())
    return found


def test_folders_import_one_way_on_few_floors():
    graph = check(ROOT)
    assert set(graph) == set(MAY_IMPORT)
    heights = floors(graph)
    assert heights["kernels"] == heights["convert/core"] == 1
    assert max(heights.values()) == heights["experiments"] <= FLOORS


def test_every_permission_is_used():
    graph = check(ROOT)
    unused = {folder: sorted(allowed(folder) - {folder} - graph[folder]) for folder in graph}
    assert not {folder: names for folder, names in unused.items() if names and folder != "experiments"}


PLANTED = {
    "upwards": (
        "convert/data/text.py",
        "from convert.run import main",
        r"convert/data/text.py:1: .* may not import convert:",
    ),
    "upwards-module": (
        "convert/mixers/mamba.py",
        "from convert.models import student",
        r"convert/mixers may not import convert/models",
    ),
    "upwards-relative": (
        "convert/mixers/mamba.py",
        "from ..models.student import swap",
        r"convert/mixers may not import convert/models",
    ),
    "upwards-plain": (
        "convert/core/errors.py",
        "import convert.models.student",
        r"convert/core may not import convert/models",
    ),
    "upwards-in-a-function": (
        "convert/models/student.py",
        "def f():\n    import convert.training.loop",
        r"convert/models/student.py:2: ",
    ),
    "upwards-to-the-package": ("convert/data/text.py", "import convert", r"convert/data may not import convert:"),
    "to-experiments": ("convert/run.py", "import experiments.study", r"convert may not import experiments"),
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
        "convert/objectives/base.py",
        "import math\nimport torch\nimport numpy as np",
        r"base.py:3: .*numpy, but only",
    ),
    "steps-language": (
        "convert/steps/swap.py",
        "from convert.data.text import tokenize",
        r"which convert.steps never does",
    ),
    "pipeline-language": (
        "convert/pipeline.py",
        "def f():\n    from convert.domains.language import Language",
        r"which convert.pipeline never does",
    ),
    "a-new-folder": ("convert/helpers/a.py", "", r"convert/helpers has no place among the folders"),
    "gone": ("convert/run.py", "from convert.vanished import f", r"imports convert.vanished, which does not exist"),
}


@pytest.mark.parametrize("file, source, message", PLANTED.values(), ids=PLANTED)
def test_a_planted_wrong_import_is_caught(file, source, message, tmp_path):
    names = (
        "__init__", "run", "pipeline", "core/errors", "mixers/mamba", "models/student", "data/text", "objectives/base",
        "training/loop", "steps/swap", "domains/language",
    )  # fmt: skip
    for name in names:
        module = tmp_path / "convert" / f"{name}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("from convert.core.errors import UserError\n" if name == "run" else "")
    for place in ("kernels/scan/__init__.py", "experiments/study.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("")
    assert check(tmp_path)["convert"] == {"convert/core"}
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source)
    with pytest.raises(WrongImport, match=message):
        check(tmp_path)


def test_a_circle_is_caught():
    with pytest.raises(WrongImport, match="a circle: a -> b -> a"):
        floors({"a": {"b"}, "b": {"a"}})
