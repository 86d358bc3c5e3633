"""Reptile: knowledge distillation as one readable loop.

    from reptile_ext.training import Reptile, Until

    reptile = Reptile(student, teacher, temperature=2.0, hard_weight=0.5)
    result = reptile.fit(train_loader, eval_loader, until=Until(metric="accuracy", target=0.9, steps=10_000))

Read top-down: `reptile` is the loop, `objective` what a step of it computes, `batches` what it is given, `data` where
it stands in the data, `..heads` how it does without logits, `until` when it stops, `schedules` what changes on the way,
`guards` what keeps student, teacher and processes apart, `metrics` what it measures, `checkpoint` how it survives a
kill, `weights` what its files hold, `costs` what a step takes, `report` the table and the curves, `recipes` the runs
that `reptile distill` starts.

`Objective` is the step without the loop, for a trainer of another library or a loop of your own.
Needs the extra `train`.
"""

try:
    import accelerate as _accelerate  # noqa: F401
    import filelock as _filelock  # noqa: F401
    import safetensors as _safetensors  # noqa: F401
    import torchmetrics as _torchmetrics  # noqa: F401
    import tqdm as _tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"reptile_ext.training needs the extra 'train': pip install 'reptile_ext[train]' (no module {error.name!r})",
        name=error.name,
    ) from error

from .metrics import METRICS
from .objective import Objective
from .reptile import Reptile
from .until import Result, Until

__all__ = ["METRICS", "Objective", "Reptile", "Result", "Until"]
