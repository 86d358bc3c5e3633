"""The fused linear loss: from hidden states and head to the loss, with the logits of a few rows at a time.

Logits of N rows and V classes, their gradient and what plain PyTorch keeps between are what distillation needs its
memory for. Here rows go through in chunks: both products, the fused loss in place on the student's logits, and the
products back to the gradients of hidden states, head and bias, all in the forward pass. Nothing of size N·V exists.

    logits.py      where logits come from: hidden states and a head, or logits that are given
    plan.py        how many rows are computed at a time
    rows.py        which rows are computed: ignored ones are left out
    scratch.py     the memory of their logits, kept from call to call
    gradients.py   gradients of hidden states, head and bias, added up over the chunks
    loop.py        the loop over the chunks
    loss.py        how autograd and traced programs see it
    head.py        a module as head: the linear map that its forward is
    dtensor.py     heads that are sharded over processes
    function.py    `linear_distillation_loss`
"""

from .function import linear_distillation_loss
from .scratch import release_scratch

__all__ = ["linear_distillation_loss", "release_scratch"]
