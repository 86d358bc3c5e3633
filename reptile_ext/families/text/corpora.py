"""Texts that need no file: what the Python that runs this has in its standard library (PSF licence), and phrases in two
languages from the Unicode locale data that the package Babel carries (Unicode licence)."""

from __future__ import annotations

import ast
import datetime
import hashlib
import re
import sysconfig
from pathlib import Path
from typing import Any

# Well filled packages and modules that every installation has, by what they are called; decimal's is in _pydecimal.
_PACKAGES = {
    **{name: name for name in ("asyncio", "email", "http", "importlib", "logging", "mailbox", "multiprocessing")},
    **{name: name for name in ("unittest", "xml")},
    "_pydecimal": "decimal",
}
_WORDS = 5  # that a docstring has at least
_HELD_OUT, _OF = 3, 10  # parts


def docstrings() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Docstrings of the standard library with the package they are from, {"text", "label"}: (to train on, held out).

    The package's own name is replaced by "_" in them. A definition at the top of a file is on one side with all that is
    inside it; a docstring that several have is there once."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    seen: set[str] = set()
    for name, label in sorted(_PACKAGES.items()):
        paths = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no {path}: this Python was installed without the source of its library")
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
            for top in [tree, *tree.body]:
                found = [_docstring(top)] if top is tree else [_docstring(node) for node in ast.walk(top)]
                # Names decide, so that a docstring stays on its side when others are added or removed.
                key = f"{path.relative_to(root).as_posix()} {getattr(top, 'name', '')}"
                is_held_out = hashlib.sha256(key.encode()).digest()[0] % _OF < _HELD_OUT
                for text in found:
                    if len(text.split()) < _WORDS or text in seen:
                        continue
                    seen.add(text)
                    masked = re.sub(rf"{re.escape(label)}", "_", text, flags=re.IGNORECASE)
                    parts[is_held_out].append({"text": masked, "label": label})
    return parts


def _docstring(node: Any) -> str:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return ast.get_docstring(node) or ""
    return ""


_YEARS = (1990, 2035)
_AMOUNTS = range(2, 60)


def phrases(source: str = "en", target: str = "de") -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Phrases in two languages, {"source", "target"}: (to train on, held out).

    What the languages call countries, languages and currencies, and how they write dates, amounts of money, quantities
    and times from now. A phrase's hash decides on which side it is; one that the two write alike is left out."""
    try:
        from babel import Locale
        from babel.dates import format_date, format_timedelta
        from babel.numbers import format_currency
        from babel.units import format_unit
    except ImportError:
        raise ImportError("phrases of locales need the extra 'text': pip install 'reptile_ext[text]'") from None
    one, other = (Locale(name) for name in (source, target))
    pairs: dict[str, str] = {}

    def add(make: Any) -> None:
        pairs[str(make(one))] = str(make(other))

    for name in ("territories", "languages", "currencies"):
        both = getattr(one, name), getattr(other, name)
        for code in sorted(both[0].keys() & both[1].keys()):
            pairs[both[0][code]] = both[1][code]
    for year in range(*_YEARS):
        for month in range(1, 13):
            for third in (1, 11, 20):
                day = datetime.date(year, month, third + (5 * year + 7 * month) % 9)
                for form in ("full", "long"):
                    add(lambda locale, day=day, form=form: format_date(day, form, locale=locale))
    units = ("length-kilometer", "mass-kilogram", "duration-hour", "volume-liter", "temperature-celsius", "area-acre")
    for amount in _AMOUNTS:
        for unit in units:
            add(lambda locale, amount=amount, unit=unit: format_unit(amount, unit, "long", locale=locale))
        for currency in ("EUR", "USD", "JPY", "GBP", "CHF"):
            add(
                lambda locale, amount=amount, currency=currency: format_currency(
                    amount, currency, format="0 ¤¤¤", format_type="name", locale=locale, currency_digits=False
                )
            )
        for sign in (1, -1):
            for unit_of_time in ("hours", "days", "weeks"):
                delta = sign * datetime.timedelta(**{unit_of_time: amount})
                add(lambda locale, delta=delta: format_timedelta(delta, add_direction=True, locale=locale))
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for text, translated in sorted(pairs.items()):
        if text != translated:
            is_held_out = hashlib.sha256(text.encode()).digest()[0] % _OF == 0
            parts[is_held_out].append({"source": text, "target": translated})
    return parts
