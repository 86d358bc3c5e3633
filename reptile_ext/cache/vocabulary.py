"""What `cache.import_rows` asks of a tokenizer: the ids of a text, and which id a server means by a string."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

_NAMED_ID = re.compile(r"token_id:(\d+)")  # what vLLM writes where it is asked for ids (return_tokens_as_token_ids)
_STAND_IN = "\ufffd"  # for bytes that are no UTF-8 by themselves: which ones, the text does not say
_TO_IDS = "ask the server for ids (vLLM: return_tokens_as_token_ids)"


class Vocabulary:
    """The tokenizer of a folder, from its tokenizer.json."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ImportError("tokenizer needs the extra 'cache': pip install 'reptile_ext[cache]'") from None
        path = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise ValueError(
                f"tokenizer must be a folder with a tokenizer.json, or that file; got {folder} (transformers writes "
                "one by AutoTokenizer.from_pretrained(…).save_pretrained(folder))"
            )
        content = path.read_bytes()
        self.name = f"sha256:{hashlib.sha256(content).hexdigest()}"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises this very class
            raise ValueError(f"tokenizer: {path} is no tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._strings: dict[bytes, list[int]] | None = None
        self._texts: dict[int, str] = {}

    def encodings(self, text: str) -> list[list[int]]:
        """With the tokenizer's special tokens and without: servers do either."""
        both = [self._tokenizer.encode(text, add_special_tokens=special).ids for special in (True, False)]
        return both[:1] if both[0] == both[1] else both

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._texts[token]

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def disagrees(self, token: int, text: Any) -> bool:
        """Whether a server that shows this token as `text` has another tokenizer. Spaces in front are dropped by some
        decoders, and what is no UTF-8 by itself is shown in many ways."""
        if not isinstance(text, str) or _NAMED_ID.fullmatch(text):
            return False
        ours = self.text(token)
        return bool(ours) and _STAND_IN not in ours and text.lstrip(" ") != ours.lstrip(" ")

    def id_of(self, text: str, raw: bytes | None) -> int:
        """The one token with these bytes. Raises ValueError if there is none, or more than one."""
        if self._strings is None:
            self._strings = self._bytes_of_all()
        key = text.encode("utf-8", "surrogatepass") if raw is None else raw
        if _STAND_IN in text and key == text.encode():
            raise ValueError(f"{text!r} is the text of many tokens, pieces of characters: {_TO_IDS}")
        found = self._strings.get(key, [])
        if len(found) == 1:
            return found[0]
        if not found:
            raise ValueError(f"{text!r} is no token of the tokenizer ({self.name[:19]}…)")
        raise ValueError(f"{text!r} is the text of tokens {min(found)} and {max(found)}: {_TO_IDS}")

    def _bytes_of_all(self) -> dict[bytes, list[int]]:
        written = json.loads(self._tokenizer.to_str())
        decoder = written.get("decoder") or {}
        if not any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ()))):
            raise ValueError(
                "the file has strings for tokens, and the tokenizer is not of bytes (ByteLevel): its tokens differ by "
                f"spaces that a text does not show: {_TO_IDS}"
            )
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as themselves
        alphabet = dict(zip(map(chr, plain), plain, strict=True))
        others = [byte for byte in range(256) if byte not in plain]
        alphabet.update({chr(256 + n): byte for n, byte in enumerate(others)})
        added = {entry["id"] for entry in written.get("added_tokens", ())}
        strings: dict[bytes, list[int]] = {}
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number in added or not all(letter in alphabet for letter in token):
                key = token.encode("utf-8", "surrogatepass")
            else:
                key = bytes(alphabet[letter] for letter in token)
            strings.setdefault(key, []).append(number)
        return strings


def named_id(text: str, raw: Any, vocabulary: Vocabulary | None) -> int:
    """The id that a server means by a string and, where it gives them, its bytes."""
    if match := _NAMED_ID.fullmatch(text):
        return int(match[1])
    if vocabulary is None:
        raise ValueError(f"the file has strings for tokens ({text!r}): give the tokenizer, or {_TO_IDS}")
    return vocabulary.id_of(text, bytes(raw) if isinstance(raw, list) else None)
