"""Mutual learning (Zhang et al. 2018, arXiv 1706.00384): two students, each the other's teacher, and one alone.

scikit-learn's digits, 100 of them with labels. Needs the extra `train`: python examples/mutual_learning.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reptile_ext.training import Objective, Reptile

digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
few, rest = order[:100], order[100:]
train = TensorDataset(images[few], labels[few])


def student(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(images[rest]).argmax(-1) == labels[rest]).float().mean())


one, other, alone = student(1), student(2), student(1)
# Each objective's teacher is run without a graph: what a student is asked for is no reason for it to change.
objectives = [Objective(one, other, hard_weight=1.0), Objective(other, one, hard_weight=1.0)]
optimizer = torch.optim.AdamW([*one.parameters(), *other.parameters()], lr=3e-3)
torch.manual_seed(0)
for _ in range(100):
    for batch in DataLoader(train, 20, shuffle=True):
        loss = sum(objective(objective.student, batch) for objective in objectives)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

Reptile(alone, None, learning_rate=3e-3).fit(DataLoader(train, 20, shuffle=True), until=500, progress_bar=False)
print(f"together {accuracy(one):.4f} and {accuracy(other):.4f}, alone {accuracy(alone):.4f}")
