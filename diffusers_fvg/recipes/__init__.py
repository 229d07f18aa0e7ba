"""Recipes: a base, a text-to-image pipeline and a chat model under one name, which [`load`] loads as one pipeline.

A recipe is data, and each of its parts can be replaced. Its repositories are used at their branch `main`. Each [`load`] looks up
the commit of each branch once, so that all files of a repository come from this commit; `diffusers_fvg.hub_revisions` returns it.
Importing this module imports neither torch nor diffusers.
**This project has never run a recipe with its real weights**, only with tiny weights under the same names.
"""

from .loading import load, load_part
from .table import ANIMATOR_RECIPES, RECIPES, STORED, AnimatorFacts, AnimatorRecipe, PartFacts, Recipe, find_recipe


__all__ = [
    "ANIMATOR_RECIPES",
    "RECIPES",
    "STORED",
    "AnimatorFacts",
    "AnimatorRecipe",
    "PartFacts",
    "Recipe",
    "find_recipe",
    "load",
    "load_part",
]
