"""`Reptile` on any two modules: a perceptron learns from a larger one until it agrees with it on 80 % of the inputs.

Needs the extra `train`: python examples/reptile_fit.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reptile_ext.training import Reptile, Until

torch.manual_seed(0)
inputs = torch.randn(4_000, 20)
labels = (inputs[:, :5] * inputs[:, 5:10]).argmax(-1)
data = TensorDataset(inputs, labels)
train = DataLoader(TensorDataset(*data[:3_000]), 64, shuffle=True)
held_out = DataLoader(TensorDataset(*data[3_000:]), 500)


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 5))


teacher = perceptron(512)
result = Reptile(teacher, None, metrics=["accuracy"]).fit(
    train, held_out, until=Until(metric="loss", patience=3, steps=2_000)
)
print("teacher:", result.reason, result.metrics)

student = perceptron(64)
reptile = Reptile(student, teacher, temperature=2.0, hard_weight=0.5, metrics=["accuracy", "f1", "agreement"])
result = reptile.fit(train, held_out, until=Until(metric="agreement", target=0.8, steps=5_000))
print("student:", result.reason, result.metrics)
