"""Recipes as data: what a target does to a teacher, and how a variant edits it."""

from convert.recipes.base import *  # noqa: F403
from convert.recipes.language import *  # noqa: F403
from convert.recipes.overrides import *  # noqa: F403
