"""The progress bar of whoever writes a cache: tokens, tokens/s, time left."""

from __future__ import annotations

import contextlib
import time
from typing import Any


@contextlib.contextmanager
def bar_of(total: int | None, initial: int = 0) -> Any:
    """A function of what is done (of `total`, which is what the time left is taken from) and the tokens so far, which
    draws them at most ten times a second. None: nobody knows how much there is; -1: draws nothing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        total = -1
    if total == -1:
        yield lambda done, tokens: None
        return
    share = "{percentage:3.0f} % |{bar}| " if total is not None else ""
    left = " < {remaining}" if total is not None else ""
    began = time.perf_counter()
    with tqdm(total=total, initial=initial, bar_format=f"{share}{{elapsed}}{left}{{postfix}}") as bar:

        def update(done: int, tokens: int) -> None:
            rate = tokens / max(1e-9, time.perf_counter() - began)
            bar.set_postfix_str(f"{tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            bar.update(done - bar.n if total is not None else 1)

        yield update
