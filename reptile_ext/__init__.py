"""Knowledge distillation whose loss costs next to nothing.

    loss = reptile_ext.distillation_loss(student_logits, teacher_logits, labels, temperature=2.0, hard_weight=0.5)
    loss.backward()

`distillation_loss` and `DistillationLoss` are the fused losses; `reptile_ext.reference` is the same in plain PyTorch.
The training API is `reptile_ext.training` (extra `train`). Importing this package needs torch and numpy alone.
"""

from . import reference
from ._version import __version__
from .functional import distillation_loss
from .modules import DistillationLoss

__all__ = ["DistillationLoss", "__version__", "distillation_loss", "reference"]
