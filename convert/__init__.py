"""Turn trained Transformers into cheaper architectures by staged distillation, and show that the result still
generates.

report = run_recipe("neox-nano", "mamba2", out="runs/mine")    # the whole conversion
teacher = load_teacher("runs/mine")                            # a run folder is a teacher too: .model, .tokenizer
report = evaluate_run("runs/mine")                             # the final measurements again
recipes.to_mamba(recipes.Budget(...))                          # what `run_recipe` does, as data to edit
"""

import importlib
from pathlib import Path
from typing import Any

from convert.core.places import keep_libraries_inside

keep_libraries_inside()  # read by some of them when they are imported
_kernels = Path(__file__).parent.parent / "kernels"
# in the repository our operators are a top-level package, whose name Hugging Face's may have taken; in a wheel they are
# convert.kernels
if not (Path(__file__).parent / "kernels").exists():
    _theirs_or_ours = importlib.import_module("kernels")
    if str(_kernels) not in _theirs_or_ours.__path__:
        _theirs_or_ours.__path__.append(str(_kernels))

__all__ = ["evaluate_run", "load_teacher", "recipes", "run_recipe"]

_HOMES = {
    "evaluate_run": "convert.evaluation.runner",
    "load_teacher": "convert.models.loading",
    "run_recipe": "convert.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import convert` is quick."""
    if name == "recipes":
        return importlib.import_module("convert.recipes")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
