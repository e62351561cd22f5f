"""The targets by name, and the default recipe of each.

This module is light: the functions that make recipes are imported when one is asked for, so that `--help` and an
unknown name answer at once.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from convert.core.errors import UserError
from convert.models.vision.catalog import CLASSIFIERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from convert.recipes.base import Recipe
    from convert.recipes.language import Budget as LanguageBudget
    from convert.recipes.vision import Budget as ImageBudget


@dataclass(frozen=True)
class Target:
    """What a teacher becomes, in a line, and where its recipe is made: the function `maker` of
    `convert.recipes.DOMAIN`, which also has the `budget` of that domain's teachers. `student`: the known model that an
    image classifier teaches."""

    about: str
    domain: str
    maker: str
    student: str | None = None

    def recipe(self, budget: LanguageBudget | ImageBudget) -> Recipe:
        """The recipe of this target within a budget."""
        maker = getattr(self.module, self.maker)
        return maker(budget) if self.student is None else maker(budget, self.student)

    @property
    def module(self) -> ModuleType:
        """The module of the domain's recipes, imported when it is first asked for."""
        return importlib.import_module(f"convert.recipes.{self.domain}")


TARGETS = {
    "linear": Target("Hedgehog linear attention", "language", "to_linear"),
    "mamba": Target("a Mamba scan, by way of linear attention", "language", "to_mamba"),
    "mamba2": Target("a Mamba-2 scan, by way of linear attention", "language", "to_mamba2"),
    "gate-swa": Target("gated sliding-window attention with sinks, in four of five layers", "language", "to_gate_swa"),
    "mla": Target("multi-head latent attention, with half of the cache", "language", "to_mla"),
    "hybrid-kda": Target("Kimi Delta Attention in three layers of four", "language", "to_hybrid_kda"),
    "hybrid-gdn": Target("Gated DeltaNet in three layers of four", "language", "to_hybrid_gdn"),
    "scratch": Target("nothing: a smaller Llama learns from random weights, to compare with", "language", "to_scratch"),
    "vit-ss2d": Target("a vision transformer with VMamba's SS2D in place of attention", "vision", "to_vit_ss2d"),
    "vmamba-lowrank": Target("a VMamba of low rank, from the weights of a VMamba", "vision", "low_rank"),
} | {name: Target(known.about, "vision", "one_for_all", name) for name, known in CLASSIFIERS.items()}


def target_named(name: str) -> Target:
    """The target of that name; raises UserError, with the nearest names, where there is none."""
    if name not in TARGETS:
        nearest = difflib.get_close_matches(name, TARGETS, 3, 0.3) or list(TARGETS)
        raise UserError(f"Unknown target {name!r}. Nearest: {', '.join(nearest)}. All: {', '.join(TARGETS)}.")
    return TARGETS[name]


def default_recipe(
    teacher: str,
    config: PreTrainedConfig,
    target: str,
    *,
    seed: int = 0,
    **sizes: Any,
) -> Recipe:
    """The recipe of a target with the defaults for this teacher (its name and configuration), but for what is given:
    `sizes` are tokens, seq_len and batch_tokens for language, images and labels for images.
    Raises UserError where a size is out of bounds or the target is unknown."""
    maker = target_named(target)
    return maker.recipe(maker.module.budget(teacher, config, **sizes, seed=seed))
