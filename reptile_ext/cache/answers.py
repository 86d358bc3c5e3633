"""What servers and data sets say of a sequence, in one form: for each token the distribution of the next.

A server's list has entry i for token i, given those before it: that is row i - 1 here. Each function raises ValueError
without the file and the line, which `importing` adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .vocabulary import Vocabulary, named_id

ALIGNMENTS = ("next", "own", "last")


class Row(NamedTuple):
    ids: Sequence[Any]
    log_probs: Sequence[Any]
    ranks: Sequence[int | None] | None = None  # 1 for the most probable
    own: float | None = None  # log-probability of the token that follows, where it is given apart from the list


class Answer(NamedTuple):
    tokens: list[int]  # -1 where only their number is known
    rows: list[Row | None]  # as many


class Keys(NamedTuple):
    """Where a record keeps what; dotted for records within records. None: where the format has it."""

    tokens: str | None = None
    text: str | None = None
    ids: str = "target_token_ids"
    log_probs: str = "target_logprobs"


def value_of(record: dict[str, Any], key: str) -> Any:
    value: Any = record
    for name in [key] if key in record else key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"wanted a key {key!r}; got {', '.join(map(str, record)) or 'none'}")
        value = value[name]
    return value


# -------------------------------------------------------------------------------------------------------------- servers


def of_server(record: dict[str, Any], keys: Keys, vocabulary: Vocabulary | None) -> Answer:
    """A response of vLLM or another server with OpenAI's interface, a line of OpenAI's batch files, a dump of vLLM's
    `RequestOutput`, or a response of SGLang."""
    body = _body(record)
    prompt = _prompt_ids(record, body, keys)
    texts = _encodings(record, keys, vocabulary)
    if prompt is not None and texts and prompt not in texts:
        raise ValueError(_other_text(prompt, texts, keys))
    if isinstance(body.get("meta_info"), dict):
        return _of_sglang(body, prompt, texts)

    choice = _only(body)
    listed = body.get("prompt_logprobs") or choice.get("prompt_logprobs")
    generated = _generated(choice, vocabulary)
    if listed is None and not generated:
        raise ValueError(
            "wanted log-probabilities: prompt_logprobs, or logprobs of what was generated; "
            f"got {', '.join(map(str, body)) or 'an empty object'}"
        )
    if generated and generated[0][1] is None:  # echo: the list begins with the prompt
        begin = len(_checked_list(listed, "prompt_logprobs")) if listed is not None else 0
        tokens = [token for token, _ in generated]
        if prompt is not None and tokens[: len(prompt)] != prompt:
            raise ValueError(_first_difference(tokens, prompt))
        prompt, generated = tokens[:begin] if begin else [], generated[begin:]
        if not begin:
            fitting = [ids for ids in texts if tokens[: len(ids)] == ids]
            if texts and not fitting:
                raise ValueError(_first_difference(tokens, texts[0]))
            return _joined([], [None], generated, echoed=True)
    if listed is not None:
        listed = _checked_list(listed, "prompt_logprobs")
        if prompt is None:
            prompt = _by_text(listed, texts)
        rows = _of_prompt(listed, prompt, vocabulary)
    else:
        if prompt is None:
            prompt = _prompt_of(body, texts)
        rows = [None] * (len(prompt) - 1)
    return _joined(prompt, rows, generated)


def _body(record: dict[str, Any]) -> dict[str, Any]:
    """What the server has answered, also where a batch file wraps it."""
    if record.get("error"):
        raise ValueError(f"the server answered with an error: {record['error']}")
    body = record.get("response", record)
    if isinstance(body, dict) and "body" in body:
        if body.get("status_code", 200) != 200:
            raise ValueError(f"the server answered with status {body['status_code']}")
        body = body["body"]
    if not isinstance(body, dict):
        raise ValueError(f"wanted a response; got {type(body).__name__}")
    return body


def _only(body: dict[str, Any]) -> dict[str, Any]:
    choices = body.get("choices", body.get("outputs", [{}]))
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        got = len(choices) if isinstance(choices, list) else type(choices).__name__
        raise ValueError(f"wanted one sequence a line: one choice; got {got} (write each to a line of its own)")
    return choices[0]


def _prompt_ids(record: dict[str, Any], body: dict[str, Any], keys: Keys) -> list[int] | None:
    if keys.tokens is not None:
        return _checked_ids(value_of(record, keys.tokens), keys.tokens)
    choices = body.get("choices", ())
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    found = body.get("prompt_token_ids") or choice.get("prompt_token_ids")
    return None if found is None else _checked_ids(found, "prompt_token_ids")


def _encodings(record: dict[str, Any], keys: Keys, vocabulary: Vocabulary | None) -> list[list[int]]:
    if keys.text is None:
        return []
    text = value_of(record, keys.text)
    if not isinstance(text, str):
        raise ValueError(f"{keys.text} must be a text; got {type(text).__name__}")
    if vocabulary is None:
        raise ValueError("text needs the tokenizer")
    return vocabulary.encodings(text)


def _by_text(listed: list[Any], texts: list[list[int]]) -> list[int]:
    """The prompt's ids from its text: with or without the special tokens, as the server has had them."""
    if not texts:
        raise ValueError(
            "wanted the prompt's ids beside prompt_logprobs: ask for them (vLLM: return_token_ids), or name the key "
            "that has them (tokens), or that has the text (text, with the tokenizer)"
        )
    fitting = [ids for ids in texts if len(ids) == len(listed)]
    if not fitting:
        lengths = " or ".join(str(len(ids)) for ids in texts)
        raise ValueError(f"wanted prompt_logprobs for the text's {lengths} tokens; got {len(listed)}")
    return fitting[0]  # `_of_prompt` checks each


def _prompt_of(body: dict[str, Any], texts: list[list[int]]) -> list[int]:
    """The prompt, or as many unknown tokens as it has: where the answer begins has to be known."""
    usage = body.get("usage")
    number = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if not texts:
        if not isinstance(number, int) or number < 1:
            raise ValueError(
                "wanted the prompt, at whose end the answer begins: its ids (prompt_token_ids, or tokens), its text "
                "(text, with the tokenizer) or its length (usage.prompt_tokens); got none of them"
            )
        return [-1] * number
    fitting = [ids for ids in texts if number is None or len(ids) == number]
    if len(fitting) == 1:
        return fitting[0]
    lengths = " or ".join(str(len(ids)) for ids in texts)
    raise ValueError(f"wanted usage.prompt_tokens to be the text's {lengths} tokens; got {number}")


def _of_prompt(listed: list[Any], prompt: list[int], vocabulary: Vocabulary | None) -> list[Row | None]:
    if len(listed) != len(prompt):
        raise ValueError(f"wanted prompt_logprobs for the prompt's {len(prompt)} tokens; got {len(listed)}")
    if listed[0]:
        raise ValueError("wanted null for the first token, which nothing comes before; got log-probabilities")
    rows: list[Row | None] = []
    for place in range(1, len(listed)):
        row = _of_dict(listed[place], f"prompt_logprobs[{place}]")
        # vLLM lists the prompt's own token beside the most probable ones.
        if prompt[place] not in row.ids:
            raise ValueError(
                f"position {place}: the tokens are not those of the log-probabilities: wanted prompt_logprobs[{place}] "
                f"to list the token there, {prompt[place]}; got {', '.join(map(str, row.ids[:5]))}"
            )
        if vocabulary is not None:
            entry = listed[place][str(prompt[place])]
            text = entry.get("decoded_token") if isinstance(entry, dict) else None
            if vocabulary.disagrees(prompt[place], text):
                raise ValueError(
                    f"position {place}: the tokenizer is not the server's: token {prompt[place]} is "
                    f"{vocabulary.text(prompt[place])!r} to it; got {text!r}"
                )
        rows.append(row)
    return rows


def _of_dict(entries: Any, name: str) -> Row:
    """{"id": {"logprob": …, "rank": …, "decoded_token": …}}, or {"id": log-probability} as before vLLM 0.4."""
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"wanted {name} to be ids with log-probabilities; got {entries!r:.60}")
    try:
        ids, values = [int(key) for key in entries], list(entries.values())
        if isinstance(values[0], dict):
            return Row(ids, [value["logprob"] for value in values], [value.get("rank") for value in values])
        return Row(ids, values)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"wanted {name} to be ids with log-probabilities; got {entries!r:.60}") from None


def _generated(choice: dict[str, Any], vocabulary: Vocabulary | None) -> list[tuple[int, Row | None]]:
    """Each token of `logprobs` and its row; the row is None where there is none, as for an echoed prompt's first."""
    found = choice.get("logprobs")
    if not found:
        return []
    result: list[tuple[int, Row | None]] = []
    if isinstance(found, list):  # vLLM's own
        tokens = _checked_ids(choice.get("token_ids"), "token_ids")
        if len(tokens) != len(found):
            raise ValueError(f"wanted logprobs for {len(tokens)} token_ids; got {len(found)}")
        for n, token in enumerate(tokens):
            row = _of_dict(found[n], f"logprobs[{n}]")
            if token not in row.ids:
                raise ValueError(f"wanted logprobs[{n}] to list the token generated there, {token}; got {row.ids[:5]}")
            result.append((token, row))
        return result
    if not isinstance(found, dict):
        raise ValueError(f"wanted logprobs to be an object or a list; got {type(found).__name__}")
    if found.get("content") is not None:  # of /v1/chat/completions
        for n, entry in enumerate(found["content"]):
            name = f"logprobs.content[{n}]"
            top = _of_list(entry.get("top_logprobs"), f"{name}.top_logprobs", vocabulary)
            token = _named(entry["token"], entry.get("bytes"), vocabulary, name)
            result.append((token, top._replace(own=entry["logprob"])))
    elif found.get("top_logprobs") is not None:  # of /v1/completions
        for n, (text, own, top) in enumerate(
            zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
        ):
            name = f"logprobs.tokens[{n}]"
            token = _named(text, None, vocabulary, name)
            if top is None:
                result.append((token, None))
                continue
            ids = [_named(key, None, vocabulary, f"logprobs.top_logprobs[{n}]") for key in top]
            result.append((token, Row(ids, list(top.values()), own=own)))
    else:
        raise ValueError("wanted logprobs.content or logprobs.top_logprobs; got neither (ask for top_logprobs)")
    stated = choice.get("token_ids") or []  # of what was generated: an echoed prompt stands before it
    last = [token for token, _ in result[max(0, len(result) - len(stated)) :]]
    if stated and last != stated:
        raise ValueError(_first_difference(last, stated))
    return result


def _of_list(entries: Any, name: str, vocabulary: Vocabulary | None) -> Row:
    """[{"token": …, "logprob": …, "bytes": …}], with the ids in the strings or to be found by them."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"wanted {name} to be a list of tokens with log-probabilities; got {entries!r:.60}")
    try:
        ids = [_named(entry["token"], entry.get("bytes"), vocabulary, name) for entry in entries]
        return Row(ids, [entry["logprob"] for entry in entries])
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"wanted {name} to be tokens with log-probabilities; got {entries!r:.60}") from None


def _named(text: Any, raw: Any, vocabulary: Vocabulary | None, name: str) -> int:
    if not isinstance(text, str):
        raise ValueError(f"wanted {name} to name a token; got {text!r:.60}")
    try:
        return named_id(text, raw, vocabulary)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _joined(
    prompt: list[int], rows: list[Row | None], generated: list[tuple[int, Row | None]], echoed: bool = False
) -> Answer:
    """Prompt and answer. The answer's first row stands at the prompt's last token; after its own last is none."""
    tokens = [*prompt, *(token for token, _ in generated)]
    if not tokens:
        raise ValueError("wanted a sequence; got one without tokens")
    listed = [row for _, row in generated][1 if echoed else 0 :]
    for n, row in enumerate(listed):
        if row is None:
            raise ValueError(f"wanted log-probabilities for each token; got null for {n + (1 if echoed else 0)}")
    return Answer(tokens, [*([] if echoed else rows), *listed, None])


def _of_sglang(body: dict[str, Any], prompt: list[int] | None, texts: list[list[int]]) -> Answer:
    """`meta_info` with triples [log-probability, id, text or null]; of the prompt only with logprob_start_len=0."""
    meta = body["meta_info"]
    parts: dict[str, list[tuple[int, Row | None]]] = {}
    for part in ("input", "output"):
        own = meta.get(f"{part}_token_logprobs") or []
        top = meta.get(f"{part}_top_logprobs") or []
        if len(own) != len(top):
            raise ValueError(
                f"wanted {part}_top_logprobs for {len(own)} tokens; got {len(top)} (ask: top_logprobs_num)"
            )
        parts[part] = []
        for n in range(len(own)):
            try:
                row = None if top[n] is None else Row([e[1] for e in top[n]], [e[0] for e in top[n]], own=own[n][0])
                parts[part].append((_checked_ids([own[n][1]], f"{part}_token_logprobs")[0], row))
            except (IndexError, TypeError):
                raise ValueError(f"wanted {part}_top_logprobs[{n}] to be triples; got {top[n]!r:.60}") from None
    inputs, number = parts["input"], meta.get("prompt_tokens")
    if not inputs and not parts["output"]:
        raise ValueError("wanted log-probabilities in meta_info; got none (ask: return_logprob, top_logprobs_num)")
    known = prompt if prompt is not None else texts[0] if len(texts) == 1 else None
    length = len(known) if known is not None else number
    if not isinstance(length, int) or length < 1 or (isinstance(number, int) and number != length):
        raise ValueError(f"wanted meta_info.prompt_tokens to be the prompt's {length} tokens; got {number}")
    if not inputs:
        return _joined(known or [-1] * length, [None] * (length - 1), parts["output"])
    if len(inputs) != length:
        raise ValueError(
            f"wanted input_token_logprobs for the prompt's {length} tokens; got {len(inputs)} (logprob_start_len=0)"
        )
    tokens = [token for token, _ in inputs]
    if known is not None and tokens != known:
        raise ValueError(_first_difference(tokens, known))
    if texts and tokens not in texts:
        raise ValueError(_first_difference(tokens, texts[0]))
    if inputs[0][1] is not None:
        raise ValueError("wanted null for the first token, which nothing comes before; got log-probabilities")
    for n, (_, row) in enumerate(inputs[1:], 1):
        if row is None:
            raise ValueError(f"wanted log-probabilities for each token; got null for {n}")
    return _joined(tokens, [row for _, row in inputs[1:]], parts["output"])


# -------------------------------------------------------------------------------------------------------------- columns


def of_columns(record: dict[str, Any], keys: Keys, align: str, vocabulary: Vocabulary | None) -> Answer:
    """Columns of ids and of log-probabilities, a list of K each a position; `align` says of which token."""
    name = keys.tokens or "input_ids"
    tokens = _checked_ids(value_of(record, name), name)
    texts = _encodings(record, keys, vocabulary)
    if texts and tokens not in texts:
        raise ValueError(_first_difference(tokens, texts[0]))
    logs = _checked_list(value_of(record, keys.log_probs), keys.log_probs)
    if any(row and isinstance(row[0], dict) for row in logs):  # axolotl's first format: ids and logs in one column
        rows = [_of_list(row, f"{keys.log_probs}[{n}]", vocabulary) if row else None for n, row in enumerate(logs)]
    else:
        ids = _checked_list(value_of(record, keys.ids), keys.ids)
        if len(ids) != len(logs):
            raise ValueError(f"wanted {keys.ids} and {keys.log_probs} of one length; got {len(ids)} and {len(logs)}")
        rows = []
        for n, (some, values) in enumerate(zip(ids, logs, strict=True)):
            if not some and not values:
                rows.append(None)
                continue
            if not isinstance(some, list) or not isinstance(values, list) or len(some) != len(values):
                raise ValueError(f"wanted {keys.ids}[{n}] and {keys.log_probs}[{n}] to be lists of one length")
            rows.append(Row(some, values))
    wanted = {
        "next": (len(tokens) - 1, len(tokens)),
        "own": (len(tokens), len(tokens)),
        "last": (1, len(tokens)),
    }[align]
    if not wanted[0] <= len(rows) <= wanted[1]:
        raise ValueError(
            f"wanted {' to '.join(map(str, sorted(set(wanted))))} rows of {keys.log_probs} for {len(tokens)} tokens "
            f"with align={align!r}; got {len(rows)}"
        )
    if align != "next":
        rows = _with_own(record, rows, tokens[len(tokens) - len(rows) :])
        rows = [*[None] * (len(tokens) - len(rows)), *rows]
        if rows[0] is not None and max(rows[0].log_probs, default=-1e9) > -9999:
            raise ValueError(
                f"align={align!r} has rows of the tokens themselves, and nothing comes before the first: wanted no "
                f"log-probabilities for it; got {len(rows[0].ids)} (are these rows of the token after: align='next'?)"
            )
        rows = rows[1:]
    return Answer(tokens, [*rows, *[None] * (len(tokens) - len(rows))])


def _with_own(record: dict[str, Any], rows: list[Row | None], tokens: list[int]) -> list[Row | None]:
    """With the tokens' own log-probabilities, where the record has them as TRL does."""
    if "actual_token_ids" in record:
        named = [value[0] if isinstance(value, list) and value else value for value in record["actual_token_ids"]]
        if named != tokens:
            raise ValueError(_first_difference(named, tokens))
    own = record.get("actual_logprobs")
    if own is None:
        return rows
    if len(own) != len(rows):
        raise ValueError(f"wanted actual_logprobs for {len(rows)} rows; got {len(own)}")
    flat = [value[0] if isinstance(value, list) and value else value for value in own]
    return [row and row._replace(own=value) for row, value in zip(rows, flat, strict=True)]


# --------------------------------------------------------------------------------------------------------------- checks


def _checked_ids(value: Any, name: str) -> list[int]:
    ids = _checked_list(value, name)
    if not all(type(token) is int and token >= 0 for token in ids):
        wrong = next(token for token in ids if not (type(token) is int and token >= 0))
        raise ValueError(f"wanted {name} to be token ids; got {wrong!r:.60}")
    return ids


def _checked_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"wanted {name} to be a list; got {value!r:.60}")
    return value


def _first_difference(got: list[Any], wanted: list[int]) -> str:
    for n, (one, other) in enumerate(zip(got, wanted, strict=False)):
        if one != other:
            return f"position {n}: the log-probabilities are of other tokens: wanted {other}; got {one}"
    return f"the log-probabilities are of another number of tokens: wanted {len(wanted)}; got {len(got)}"


def _other_text(prompt: list[int], texts: list[list[int]], keys: Keys) -> str:
    for n, (one, other) in enumerate(zip(prompt, texts[0], strict=False)):
        if one != other:
            return f"position {n}: wanted the tokens of {keys.text}, {other} here; got {one}"
    return f"wanted the {len(texts[0])} tokens of {keys.text}; got {len(prompt)}"
