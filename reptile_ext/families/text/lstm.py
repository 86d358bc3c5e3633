"""The smallest students: Embedding + LSTM + Linear, as models of `transformers`, which saves, loads and samples them.

`AutoModelForCausalLM` and `AutoModelForSequenceClassification` load them once this module has been imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput


class LstmConfig(PreTrainedConfig):
    """Sizes of an LSTM. `width` is that of the embedding, `state` that of the LSTM's state."""

    model_type = "reptile_lstm"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "layers"}  # noqa: RUF012 (as transformers has it)

    vocab_size: int = 8192
    width: int = 64
    state: int = 128
    layers: int = 1
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class _Lstm(PreTrainedModel):
    config_class = LstmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.lstm = nn.LSTM(
            config.width,
            config.state,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5 / module.embedding_dim**0.5)  # logits of about 1, as a Linear's
        elif isinstance(module, (nn.LSTM, nn.Linear)):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def _states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, T] to [B, T, state]; what stands at padding is of no use, and has no influence, wherever it is."""
        embedded = self.dropout(self.embedding(input_ids))
        if attention_mask is None:
            states: Tensor = self.dropout(self.lstm(embedded)[0])
            return states
        # The LSTM reads the tokens one after the other: padding goes behind all of them, and its states back.
        is_token = (attention_mask != 0).long()
        place = torch.where(
            is_token == 1,
            is_token.cumsum(-1) - 1,
            is_token.sum(-1, keepdim=True) + (1 - is_token).cumsum(-1) - 1,
        )[..., None]
        states = self.lstm(torch.zeros_like(embedded).scatter(1, place.expand_as(embedded), embedded))[0]
        found: Tensor = self.dropout(states.gather(1, place.expand_as(states)))
        return found


class LstmForCausalLM(_Lstm, GenerationMixin):
    """Token ids [B, T] to logits [B, T, vocab_size]. The output weight is the embedding's: two of them would be nearly
    all of a small model."""

    _tied_weights_keys = {"output.weight": "embedding.weight"}  # noqa: RUF012 (likewise)

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.narrow = nn.Linear(config.state, config.width)
        self.output = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.output

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.output = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.output(self.narrow(self._states(input_ids, attention_mask))))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """All tokens at every step: no state is kept between steps, which beams would have to reorder."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


class LstmForSequenceClassification(_Lstm):
    """Token ids [B, T] to logits [B, num_labels], from the mean of the states of a text's tokens."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.output = nn.Linear(config.state, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        states = self._states(input_ids, attention_mask)
        if attention_mask is None:
            return SequenceClassifierOutput(logits=self.output(states.mean(1)))
        mask = attention_mask.to(states.dtype)[..., None]
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.output(mean))


AutoConfig.register(LstmConfig.model_type, LstmConfig)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM)
AutoModelForSequenceClassification.register(LstmConfig, LstmForSequenceClassification)
