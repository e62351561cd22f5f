"""Turn trained Transformers into cheaper architectures by staged distillation, and show that the result still generates.

report = run("neox-nano", "mamba2", out="runs/mine")        # the whole conversion
teacher = load_teacher("runs/mine")                         # a run folder is a teacher too: .model, .tokenizer
report = evaluate("runs/mine")                              # the final measurements again
recipes.to_mamba(recipes.Budget(...))                       # what `run` does, as data to edit
"""

import sys
import types
from pathlib import Path

import kernels
from convert.places import keep_libraries_inside

keep_libraries_inside()  # read by some of them when they are imported
_ours = str(Path(__file__).parent.parent / "kernels")
if _ours not in kernels.__path__:  # Hugging Face's package of that name came first on the path
    kernels.__path__.append(_ours)

__all__ = ["evaluate", "load_teacher", "recipes", "run"]


class _Package(types.ModuleType):
    """`convert.run` and `convert.evaluate` are functions, although commands of these names are submodules."""

    def __setattr__(self, name: str, value) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):  # what importing a submodule would set
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

_HOMES = {"evaluate": "evaluation", "run": "conversion", "load_teacher": "teachers"}


def __getattr__(name: str):
    """Imported when first used, so that `import convert` is quick."""
    import importlib

    if name == "recipes":
        return importlib.import_module("convert.recipes")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"convert.{_HOMES[name]}"), name)
    return globals()[name]
