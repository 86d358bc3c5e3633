"""Knowledge distillation whose loss costs next to nothing.

    loss = reptile_ext.distillation_loss(student_logits, teacher_logits, labels, temperature=2.0, hard_weight=0.5)
    loss.backward()

`distillation_loss` and `DistillationLoss` are the fused losses of logits, `linear_distillation_loss` and
`LinearDistillationLoss` those of hidden states and heads, `binary_distillation_loss` and `BinaryDistillationLoss` those
of logits that each are a distribution of their own (one logit, many labels), `sparse_distillation_loss` and
`SparseDistillationLoss` those of teachers of which K classes a row are known; `reptile_ext.reference` is the same in
plain PyTorch. `TeacherCache` keeps a teacher's answers on disk. The training API is `reptile_ext.training` (extra
`train`). Importing this package needs torch and numpy alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .cache import TeacherCache

try:
    from . import ops as ops  # first: it loads the compiled files, or says why it cannot
    from . import reference
    from .binary import binary_distillation_loss
    from .functional import distillation_loss
    from .linear import linear_distillation_loss, release_scratch
    from .modules import (
        BinaryDistillationLoss,
        DistillationLoss,
        LinearDistillationLoss,
        SparseDistillationLoss,
    )
    from .sparse import captured_mass, sampled_targets, sparse_distillation_loss, top_k_targets
except ImportError as error:
    # The compiled operators do not load. Whoever wants one of the names above is told; `reptile doctor`, which wants
    # none, gets in and can say what to do.
    _message = str(error)

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ImportError(_message)
else:

    def __getattr__(name: str) -> Any:
        # Imported when first asked for: most programs read no cache.
        if name in ("TeacherCache", "cache"):
            module = importlib.import_module(".cache", __name__)
            return module if name == "cache" else module.TeacherCache
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BinaryDistillationLoss",
    "DistillationLoss",
    "LinearDistillationLoss",
    "SparseDistillationLoss",
    "TeacherCache",
    "__version__",
    "binary_distillation_loss",
    "captured_mass",
    "distillation_loss",
    "linear_distillation_loss",
    "reference",
    "release_scratch",
    "sampled_targets",
    "sparse_distillation_loss",
    "top_k_targets",
]
