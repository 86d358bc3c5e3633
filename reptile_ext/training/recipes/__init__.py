"""Whole runs on real data that fit in minutes on two cores: what `reptile distill` and `cache-teacher` start."""

from . import code_lm, digits
from .comparison import Recipe, Settings, Task, cache_teacher, check, evaluate, run

RECIPES: dict[str, Recipe] = {"code-lm": code_lm.RECIPE, "digits": digits.RECIPE}

__all__ = ["RECIPES", "Recipe", "Settings", "Task", "cache_teacher", "check", "evaluate", "run"]
