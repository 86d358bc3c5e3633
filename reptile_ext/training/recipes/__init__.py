"""Whole runs: what `reptile distill` and `cache-teacher` start. Two on data that need no file, which fit in minutes on
two cores; those on texts of the user's own are in `reptile_ext.families.text`."""

from importlib import import_module

from .comparison import Recipe, Settings, Task, cache_teacher, check, evaluate, run
from .fractions import RECORD, run_fractions

_MODULES = {
    "code-lm": "reptile_ext.training.recipes.code_lm",
    "digits": "reptile_ext.training.recipes.digits",
    "language-model": "reptile_ext.families.text.language_model",
    "text-classification": "reptile_ext.families.text.classification",
    "translation": "reptile_ext.families.text.translation",
}
NAMES = tuple(_MODULES)


def recipe(name: str) -> Recipe:
    """One of `NAMES`. Those of texts need the extra `text`, and say so."""
    found: Recipe = import_module(_MODULES[name]).RECIPE
    return found


__all__ = [
    "NAMES",
    "RECORD",
    "Recipe",
    "Settings",
    "Task",
    "cache_teacher",
    "check",
    "evaluate",
    "recipe",
    "run",
    "run_fractions",
]
