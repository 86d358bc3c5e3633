"""Self-distillation (Furlanello et al. 2018, arXiv 1805.04770): each student teaches the next, which is no smaller.

scikit-learn's digits, 100 of them with labels. Needs the extra `train`: python examples/self_distillation.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reptile_ext.training import Reptile

digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
few, rest = order[:100], order[100:]
train = DataLoader(TensorDataset(images[few], labels[few]), 20, shuffle=True)
held_out = DataLoader(TensorDataset(images[rest], labels[rest]), 2000)

teacher = None
for generation in range(3):
    torch.manual_seed(generation)
    student = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    loss = {} if teacher is None else {"temperature": 2.0, "hard_weight": 0.5}
    reptile = Reptile(student, teacher, metrics=["accuracy"], learning_rate=3e-3, **loss)
    reptile.fit(train, until=500, progress_bar=False)
    print(f"generation {generation}: accuracy {reptile.evaluate(held_out)['accuracy']:.4f}")
    teacher = student
