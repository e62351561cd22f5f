"""Recipes as data: what a target does to a teacher, and how a variant edits it."""

import importlib
from typing import Any

_HOMES = {  # module -> the names that are public here; each is imported when a name of it is first used
    "recipes.targets": ("TARGETS", "default_recipe", "target_named"),
    "recipes.base": ("Recipe", "tiny"),
    "recipes.language": (
        "Budget",
        "budget",
        "to_gate_swa",
        "to_hybrid_gdn",
        "to_hybrid_kda",
        "to_linear",
        "to_mamba",
        "to_mamba2",
        "to_mla",
        "to_scratch",
    ),
    "recipes.overrides": ("with_setting",),
    "objectives.base": ("Objective",),
    "steps.build": ("Build",),
    "steps.factorise": ("Factorise",),
    "steps.layers": ("EveryNth", "MostSensitive"),
    "steps.select": ("Select",),
    "steps.set_decay": ("SetDecay",),
    "steps.swap": ("Swap",),
    "steps.swap_ss2d": ("SwapSS2D",),
    "steps.train": ("Train",),
}
_HOME = {name: f"convert.{module}" for module, names in _HOMES.items() for name in names}
__all__ = list(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the names of the targets are there at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
