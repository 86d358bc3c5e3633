"""Times the fused loss against plain PyTorch on this machine: `reptile benchmark`, and the cases of `benchmarks/`.

What is timed is forward and backward of a divergence as a user calls it, with gradients cleared before, at T = 2:

    ours in place   distillation_loss(s, t, divergence=d, temperature=2.0, inplace=True), s the output of another node
                    of the graph
    ours            distillation_loss(s, t, divergence=d, temperature=2.0): the gradient is a new tensor, in memory that
                    was an earlier one's from the second step on
    eager           d in plain PyTorch, as in eager.py
    eager fp32      the same of s.float() and t.float(); for float32 logits that is eager itself, and left out
    torch.compile   eager, compiled for exactly this shape
    limit           no loss: reads s and t and writes as much past the caches, on as many threads. Nothing that touches
                    memory as often as the fused loss must can be faster.

How: all contenders of all divergences of a shape run in one process, in turn, in an order that is shuffled for every
round. A turn begins with an untimed step, so that memory and threads are in the state that the contender's own last
step left, as in a training loop, and not in another's. Then large logits are timed once, with caches full of other
data, small ones several times in a row with warm caches. Every time is the median over the rounds and is given with the
quartiles. Losses and gradients are compared before anything is timed.

Read top-down: `program` is the whole of it, `data` the cases and their logits, `losses` the contenders, `measuring`
what is made of their times, `report` the table and the chart; `training` is a benchmark of its own, of whole steps.
Taking turns is `reptile_ext.timing`.
"""

from ..eager import TEMPERATURE
from ..timing import DTYPES, Contender
from .data import SHAPES, Case, Data, cases
from .losses import COMPILE_VOCAB, NAMES, contenders
from .program import check, environment, run

__all__ = [
    "COMPILE_VOCAB",
    "DTYPES",
    "NAMES",
    "SHAPES",
    "TEMPERATURE",
    "Case",
    "Contender",
    "Data",
    "cases",
    "check",
    "contenders",
    "environment",
    "run",
]
