"""Handwritten digits, few images: a convolutional network teaches a small one.

scikit-learn's 1,797 images of 8 × 8 pixels. The teacher learns from all training images with their labels; the students
get a handful, each shown with random shifts. The distilled student and the one without a teacher see the same images,
labels and shifts, for the same number of steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .comparison import Count, NonNegative, Rate, Recipe, Settings, Task, Threads, Weight

_CLASSES, _TRAIN = 10, 1257  # of the 1,797 images, 540 are held out


class Digits(Settings):
    """Distil a convolutional network into a small perceptron, on few labelled images of digits."""

    transfer_images: Annotated[Count, Field(ge=_CLASSES, le=_TRAIN - _CLASSES)] = 50
    """Labelled images that the students get: of each digit at least one, and at least one is left over."""
    teacher_channels: Count = 32
    student_width: Count = 32
    """Hidden units of the student."""
    shift: Annotated[NonNegative, Field(le=7)] = 1
    """Largest random shift of an image, in pixels either way."""

    threads: Threads = 1  # an operation here is shorter than waking a second thread
    batch: Count = 50
    teacher_batch: Count = 50
    temperature: Rate = 4.0
    hard_weight: Weight = 0.5
    teacher_steps: Count = 400
    teacher_learning_rate: Rate = 3e-3
    steps: Count = 800
    learning_rate: Rate = 1e-2
    eval_every: Count = 100
    checkpoint_every: Count = 500


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images [N, 1, H, W] with labels [N], each image moved by up to `shift` pixels whenever it is read."""

    def __init__(self, images: Tensor, labels: Tensor, shift: int) -> None:
        self._images = F.pad(images, (shift,) * 4)
        self._labels = labels
        self._size = images.shape[-1]
        self._shift = shift

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 2 * self._shift + 1, (2,)).tolist()
        image = self._images[index, :, top : top + self._size, left : left + self._size]
        return image, self._labels[index]


def build(settings: Digits, folder: Path) -> Task:
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # 0 … 16 shades to 0 … 1
    labels = torch.tensor(bunch.target)
    # Which images are held out does not depend on the seed: results of several seeds are about the same images.
    train, held_out = train_test_split(range(len(labels)), test_size=540, stratify=labels, random_state=0)
    few, _ = train_test_split(
        train, train_size=settings.transfer_images, stratify=labels[train], random_state=settings.seed
    )

    torch.manual_seed(settings.seed)
    channels, width = settings.teacher_channels, settings.student_width
    teacher = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * channels, 64),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(64, 10),
    )
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def loader(indices: list[int], shift: int, batch: int, shuffle: bool) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Shifted(images[indices], labels[indices], shift), batch, shuffle=shuffle)

    return Task(
        teacher=teacher,
        student=student,
        teacher_train=loader(train, 1, settings.teacher_batch, shuffle=True),
        student_train=loader(few, settings.shift, settings.batch, shuffle=True),
        held_out=loader(held_out, 0, len(held_out), shuffle=False),
        metrics=("cross_entropy", "accuracy", "f1"),
        notes=(
            f"Images: scikit-learn's digits; the teacher learns from {len(train):,} with their labels.",
            f"Both students start from the same weights and see the same {len(few)} images with their labels, shifted "
            f"alike, in the same order: {settings.steps} steps of up to {settings.batch * settings.accumulate} images. "
            "One is also given the teacher's logits.",
            f"Held out: {len(held_out)} other images. Loss in nats an image.",
        ),
    )


RECIPE = Recipe(settings=Digits, build=build)
