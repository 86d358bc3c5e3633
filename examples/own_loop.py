"""The fused loss in a training loop of one's own. Needs nothing but reptile_ext: python examples/own_loop.py"""

import torch
from torch import nn

from reptile_ext import DistillationLoss

torch.manual_seed(0)
vocab_size, tokens = 32_000, torch.randint(0, 32_000, (8, 33))
inputs, labels = tokens[:, :-1], tokens[:, 1:]  # the label of a token is the one after it


def language_model(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size))


teacher = language_model(128).eval().requires_grad_(False)
student = language_model(32)
criterion = DistillationLoss(temperature=2.0, hard_weight=0.5)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)

for step in range(20):
    # The five lines:
    with torch.no_grad():
        teacher_logits = teacher(inputs)
    loss = criterion(student(inputs), teacher_logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss.item():.4f}")
