"""Real models by one name: a base, a text-to-image pipeline and a chat model that [`load`] puts together. Light to import.

A recipe is data, and each of its parts can be replaced. Its repositories are taken at their branch `main`, whose commit is
looked up once in each [`load`]: all of a repository's files are then of that commit, and `diffusers_fvg.hub_revisions`
names it.
**No recipe was ever run by this project with its real weights**: only with tiny ones under the same names.
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
