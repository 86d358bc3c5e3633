"""Token ids of texts, of prompts with what follows them, and of conversations, and which of them are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...pretrained import first_line
from .samples import IGNORED, UNANSWERED, Left

Made = tuple[list[int], list[int]]  # ids and labels of one record, not cut yet


class Encoder:
    """Token ids of texts, with a beginning, if the tokenizer gives them one, not two, and an end-of-text token where it
    belongs."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def texts(self, texts: list[str]) -> list[Made]:
        return [(ids, list(ids)) for ids in map(self._ended, self.begun(texts))]

    def pairs(self, pairs: list[tuple[str, str]]) -> list[Made]:
        starts = self.begun([prompt for prompt, _ in pairs])
        wholes = self.begun([prompt + completion for prompt, completion in pairs])
        found = []
        for (_, completion), start, whole in zip(pairs, starts, wholes, strict=True):
            ids = self._ended(whole if whole[: len(start)] == start else start + self._going_on(completion))
            found.append((ids, [IGNORED] * len(start) + ids[len(start) :]))
        return found

    def conversation(self, turns: list[dict[str, Any]], begin: int = 0) -> Any:
        """Ids and labels: the assistant's turns are learned, from `begin` on, each from all that stands before it. Of a
        template that writes earlier turns otherwise when others follow, only the last is."""
        answers = [i for i in range(begin, len(turns)) if turns[i].get("role") == "assistant"]
        if not answers:
            return Left(UNANSWERED)
        found = self._answers(turns, answers) or self._answers(turns, answers[-1:])
        if found is None:
            raise ValueError(
                "the chat template writes the conversation otherwise when the answer follows, so that the assistant's "
                "part cannot be told: give prompt_column and completion_column"
            )
        ids, labels = found
        last = labels[max((i for i, label in enumerate(labels) if label == IGNORED), default=-1) + 1 :]
        if self._eos is not None and not set(last) & set(self.tokenizer.all_special_ids):  # nothing would say "stop"
            ids, labels = [*ids, self._eos], [*labels, self._eos]
        return ids, labels

    def _answers(self, turns: list[dict[str, Any]], answers: Sequence[int]) -> Made | None:
        ids: list[int] = []
        labels: list[int] = []
        text = ""
        for i in answers:
            for end, asks in ((i, True), (i + 1, False)):
                after = self._written(turns[:end], asks)
                if not after.startswith(text):
                    return None
                whole = self._bare(after)
                longer = whole if whole[: len(ids)] == ids else ids + self._going_on(after[len(text) :])
                new = longer[len(ids) :]
                labels += [IGNORED] * len(new) if asks else new
                ids, text = longer, after
        return ids, labels

    def _written(self, turns: list[dict[str, Any]], asks: bool) -> str:
        if not turns:
            return ""
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks))
        except Exception as error:  # of any kind: templates are programs
            raise ValueError(f"the chat template does not take the conversation: {first_line(error)}") from error

    def _bare(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _going_on(self, text: str) -> list[int]:
        """Of a text that follows another: some tokenizers put a space before a text that begins."""
        for other in ("\n", ".", "a"):
            before, both = self._bare(other), self._bare(other + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._bare(text)

    def begun(self, texts: list[str]) -> list[list[int]]:
        """With what the tokenizer puts before a text, and without what it puts after it."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        return [self._once(ids, text) for ids, text in zip(found, texts, strict=True)]

    def _once(self, ids: list[int], text: str) -> list[int]:
        if self._bos is not None and ids[:2] == [self._bos] * 2 and text.startswith(self.tokenizer.bos_token):
            ids = ids[1:]
        if self._eos is not None and ids[-1:] == [self._eos] and len(ids) > 1:
            ends_so = text.endswith(self.tokenizer.eos_token)
            if not ends_so or ids[-2] == self._eos:
                ids = ids[:-1]
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._eos is None or ids[-1:] == [self._eos] else [*ids, self._eos]


_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")}


def check_template(tokenizer: Any, flag: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{flag}: the tokenizer has no chat template: write the conversations out as text, or take the tokenizer "
            "of a chat model"
        )


def turns_of(messages: Any, column: str) -> list[dict[str, Any]]:
    """Messages as templates want them, without what is None, which is how Arrow says that a message lacks it."""
    if messages is None:
        return []
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"wanted a list of messages with role and content in {column!r}; got {messages!r:.80}")
    return [_turn(_without_none(message)) for message in messages]


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and "tool_calls" in message)):
        raise ValueError(f"wanted messages with role and content, which are text; got {message!r:.80}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return rest | {"role": _ROLES.get(role, role), "content": content or ""}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(x) for key, x in value.items() if x is not None}
    return [_without_none(x) for x in value] if isinstance(value, list) else value
