"""Words that several messages need. Only the standard library: `cli` imports this."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the nearest of the known words, or nothing if none is near."""
    import difflib  # on the way to an error only

    nearest = difflib.get_close_matches(given, list(known), 1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
