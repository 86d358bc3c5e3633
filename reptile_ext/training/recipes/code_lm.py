"""A language model of Python source: a small transformer teaches an LSTM.

The text is the standard library of the Python that runs this, a tenth of its files held out. The vocabulary is trained
on the spot. The teacher draws on all of the training text; the students get a small sample of it, as is usual when a
large model that has read much is distilled on the little data at hand. The distilled student and the one without a
teacher see the very same blocks of that sample in the same order, for the same number of steps.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliImplicitFlag
from tokenizers import ByteLevelBPETokenizer, Tokenizer, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ...files import write_atomically
from .comparison import Cacheable, Count, Rate, Recipe, Settings, Task, Weight

# Tests and other people's packages, and what is no code: tables of characters and of help texts.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}


class CodeLM(Settings):
    """Distil a transformer language model of Python source into an Embedding + LSTM + Linear."""

    vocabulary: Annotated[Count, Field(ge=256)] = 8192
    """Size of the byte-level byte-pair vocabulary, in which every byte is one."""
    length: Count = 64
    """Tokens in a sample."""
    transfer_tokens: Count = 20_000
    """Tokens of training text that the students get."""
    held_out_tokens: Count = 24_000
    """Tokens of the held-out files that are evaluated."""
    teacher_width: Count = 128
    teacher_layers: Count = 2
    teacher_heads: Count = 2
    student_width: Count = 32
    """Size of the student's embedding, which is its output weight, too."""
    student_state: Count = 64
    """Size of its LSTM's state."""
    fused_linear: CliImplicitFlag[bool] = False
    """Train from hidden states and heads, without the logits in full, and measure what that saves."""
    cache: str | None = None
    """Folder of `reptile cache-teacher`: distil one more student from it, without the teacher."""

    batch: Count = 4
    teacher_batch: Count = 8
    hard_weight: Weight = 0.0
    teacher_steps: Count = 1400
    teacher_learning_rate: Rate = 2e-3
    steps: Count = 700
    learning_rate: Rate = 2e-2
    eval_every: Count = 100
    checkpoint_every: Count = 350

    @field_validator("cache")
    @classmethod
    def _found_from_anywhere(cls, folder: str | None) -> str | None:
        if folder == "":
            raise ValueError("wanted a folder")
        return None if folder is None else str(Path(folder).absolute())

    @model_validator(mode="after")
    def _one_way_to_save_memory(self) -> CodeLM:
        if self.inplace and self.fused_linear:
            raise ValueError("inplace has no meaning with fused_linear: there are no logits to write over")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> CodeLM:
        if self.teacher_width % self.teacher_heads:
            raise ValueError(
                f"teacher_width must be a multiple of teacher_heads; got {self.teacher_width} and {self.teacher_heads}"
            )
        for name in ("transfer_tokens", "held_out_tokens"):
            if getattr(self, name) < self.length:
                raise ValueError(f"{name} must be at least length, {self.length}; got {getattr(self, name)}")
        return self


class Transformer(nn.Module):
    """A decoder: token ids [B, T] to logits [B, T, V]; the output weight is the embedding's."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.output = nn.Linear(width, vocabulary, bias=False, device="meta")  # no weight of its own
        self.output.weight = self.tokens.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.output(self.norm(hidden))
        return logits


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each on a normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.query_key_value(self.norm_attention(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.movedim(-3, 0).transpose(-3, -2)  # three of [B, heads, T, width / heads]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.mix(attended.transpose(-3, -2).flatten(-2))
        out: Tensor = hidden + self.feed_forward(self.norm_feed_forward(hidden))
        return out


class LSTM(nn.Module):
    """Embedding, LSTM, Linear: token ids [B, T] to logits [B, T, V]. The last weight is the embedding's: two of them
    would be nearly all of a small model."""

    def __init__(self, vocabulary: int, width: int, state: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.5 / width**0.5)  # logits of about 1, as a Linear's
        self.lstm = nn.LSTM(width, state, batch_first=True)
        self.narrow = nn.Linear(state, width)
        self.output = nn.Linear(width, vocabulary, device="meta")
        self.output.weight = self.embedding.weight
        self.output.bias = nn.Parameter(torch.zeros(vocabulary))

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(ids))
        logits: Tensor = self.output(self.narrow(hidden))
        return logits


def build(settings: CodeLM, folder: Path) -> Task:
    train_text, held_out_text = standard_library()
    tokenizer = trained_tokenizer(settings.vocabulary, train_text, folder / "tokenizer.json")
    train = _blocks(tokenizer, train_text, settings.length)
    held_out = _blocks(tokenizer, held_out_text, settings.length)

    # Samples from all over the text: every n-th block.
    transfer = _thin(train, "transfer_tokens", settings)
    held_out = _thin(held_out, "held_out_tokens", settings)

    torch.manual_seed(settings.seed)
    vocabulary = tokenizer.get_vocab_size()
    teacher = Transformer(
        vocabulary, settings.length, settings.teacher_width, settings.teacher_layers, settings.teacher_heads
    )
    student = LSTM(vocabulary, settings.student_width, settings.student_state)

    def loader(blocks: Tensor, batch: int, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        # The label of each token is the one after it, so a sample is cut from length + 1 tokens.
        return DataLoader(TensorDataset(blocks[:, :-1], blocks[:, 1:]), batch, shuffle=shuffle)

    seen = min(settings.teacher_steps * settings.accumulate * settings.teacher_batch, len(train)) * settings.length
    return Task(
        teacher=teacher,
        student=student,
        teacher_train=loader(train, settings.teacher_batch, shuffle=True),
        student_train=loader(transfer, settings.batch, shuffle=True),
        held_out=loader(held_out, 8, shuffle=False),
        metrics=("cross_entropy", "perplexity", "accuracy"),
        fused_linear=settings.fused_linear,
        cacheable=Cacheable(
            vocab_size=vocabulary,
            tokenizer="sha256:" + hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
            data=_digest_of_data(train_text, held_out_text, settings),
            inputs={"train": transfer[:, :-1], "held-out": held_out[:, :-1]},
            student_train=DataLoader(Identified(transfer, "train"), settings.batch, shuffle=True),
            held_out=DataLoader(Identified(held_out, "held-out"), 8),
        ),
        notes=(
            f"Text: Python's standard library, {train[:, 1:].numel():,} tokens to train on, of which the teacher reads "
            f"{seen:,}; vocabulary {vocabulary:,}.",
            f"Both students start from the same weights and see the same {transfer[:, 1:].numel():,} of these tokens, "
            f"in the same order: {settings.steps} steps of {settings.batch * settings.accumulate * settings.length} "
            "tokens. One is also given the teacher's logits.",
            f"Held out: {held_out[:, 1:].numel():,} tokens of other files. Loss in nats a token.",
        ),
    )


class Identified(Dataset[dict[str, Any]]):
    """Blocks [N, T + 1] as mappings of ids, labels and what the teacher cache knows the sample by."""

    def __init__(self, blocks: Tensor, part: str) -> None:
        self._blocks, self._part = blocks, part

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, i: int) -> dict[str, Any]:
        block = self._blocks[i]
        return {"ids": block[:-1], "labels": block[1:], "sample_id": Cacheable.sample_id(self._part, i)}


def standard_library() -> tuple[list[str], list[str]]:
    """The source files of this Python's standard library: (to train on, held out)."""
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(relative.parts):
            # A file's name decides, so that it stays on its side when files are added or removed.
            is_held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 10 == 0
            text = path.read_text(encoding="utf-8", errors="replace")
            (held_out if is_held_out else train).append(text)
    if not train or not held_out:
        raise FileNotFoundError(f"no standard library sources in {root}: this Python was installed without them")
    return train, held_out


def trained_tokenizer(size: int, texts: list[str], path: Path, single_digits: bool = False) -> Tokenizer:
    """Train a byte-level byte-pair vocabulary and keep it in the run folder, or take the one that is there."""
    if not path.exists():
        trained = ByteLevelBPETokenizer()
        if single_digits:  # of which any number is made, and copied
            of_bytes = trained._tokenizer.pre_tokenizer
            digits = pre_tokenizers.Digits(individual_digits=True)
            trained._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, of_bytes])
        trained.train_from_iterator(texts, vocab_size=size, min_frequency=2, show_progress=False)
        write_atomically(path, lambda temporary: trained.save(str(temporary)))
    return Tokenizer.from_file(str(path))


def _blocks(tokenizer: Tokenizer, texts: list[str], length: int) -> Tensor:
    """All texts after one another in blocks of length + 1 tokens, each sharing one token with the next."""
    ids = torch.tensor([token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids])
    if length >= len(ids):
        raise ValueError(f"length must be below the number of tokens of the shorter text, {len(ids)}; got {length}")
    return ids.unfold(0, length + 1, length)


def _digest_of_data(train: Sequence[str], held_out: Sequence[str], settings: CodeLM) -> str:
    """Of the texts, and of which parts of them the students see: of what a tokenizer then makes samples."""
    digest = hashlib.sha256(f"{settings.length} {settings.transfer_tokens} {settings.held_out_tokens}".encode())
    for text in (*train, "", *held_out):
        digest.update(hashlib.sha256(text.encode()).digest())
    return f"sha256:{digest.hexdigest()}"


def _thin(blocks: Tensor, name: str, settings: CodeLM) -> Tensor:
    """As many of the blocks as the setting of this name says, evenly spaced."""
    tokens: int = getattr(settings, name)
    count = tokens // settings.length
    if count > len(blocks):
        raise ValueError(f"{name} must be at most the text's, {len(blocks) * settings.length}; got {tokens}")
    return blocks[torch.linspace(0, len(blocks) - 1, count).long()]


RECIPE = Recipe(settings=CodeLM, build=build)
