"""From one record to tokens: which columns it has, and which of its tokens are trained.

| columns | trained tokens |
|---|---|
| `messages`: list of {role, content} | the assistant's turns, with their end-of-turn token |
| `prompt`, `completion` | the completion and the end-of-text token |
| `question`, `choices`, `label` or `answerKey` | " " + the right choice, the end-of-text token |
| `text` (the name is configurable) | all |

A prompt is tokenised on its own, as it will be when the tuned model is asked to continue it. A
completion is tokenised behind it, as scoring does: alone, many tokenizers would put a space before
its first word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from blindtune.errors import BlindtuneError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RecordShape = Literal["messages", "completion", "choices", "text"]
Record = Mapping[str, Any]

_COLUMNS: tuple[tuple[RecordShape, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("completion", ("prompt", "completion")),
    ("choices", ("question", "choices", "label")),
    ("choices", ("question", "choices", "answerKey")),
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenised record."""

    input_ids: list[int]
    """Token ids."""
    trained: list[bool]
    """For each token whether it is a target of the loss."""
    cut: bool = False
    """Whether a part was left out because it was too long."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A multiple-choice question, its choices, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    label: int

    @property
    def prompt(self) -> str:
        """What a model reads before a choice."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def continuations(self) -> tuple[str, ...]:
        """What stands behind the prompt, one a choice."""
        return tuple(f" {choice}" for choice in self.choices)


def record_shape(columns: Iterable[str], text_column: str, where: str) -> RecordShape:
    """The first shape of the table above whose columns are all there."""
    found = set(columns)
    for shape, needed in _COLUMNS:
        if found.issuperset(needed):
            return shape
    if text_column in found:
        return "text"
    raise DataError(
        f"{where}: expected the columns {text_column!r}, 'prompt' + 'completion', 'messages' or "
        "'question' + 'choices' + 'label', found "
        f"{', '.join(map(repr, sorted(found))) or 'none'}: rename them, or give a "
        "text_column"
    )


def kind_of_value(value: object) -> str:
    """What a value of a private file is, without saying it: errors may end up in logs."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def text_of(record: Record, column: str, where: str) -> str:
    """The string in a column; anything else is an error that names the place."""
    value = record.get(column)
    if not isinstance(value, str):
        found = kind_of_value(value)
        raise DataError(f"{where}: expected a string in {column!r}, got {found}")
    return value


def encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    """Prompt + completion + end of text; a prompt that is too long loses its beginning.

    A completion that alone exceeds `max_length` - 1 loses its end.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt_ids = open_ended_ids(prompt, tokenizer)
    whole_ids = open_ended_ids(prompt + completion, tokenizer)
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        answer_ids = whole_ids[len(prompt_ids) :] + eos
    else:
        answer_ids = _ids_in_a_line(completion, tokenizer) + eos
    cut = len(prompt_ids) + len(answer_ids) > max_length
    answer_ids = answer_ids[: max_length - 1]
    prompt_ids = prompt_ids[-(max_length - len(answer_ids)) :]
    trained = [False] * len(prompt_ids) + [True] * len(answer_ids)
    return Example(input_ids=prompt_ids + answer_ids, trained=trained, cut=cut)


def _ids_in_a_line(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a string that begins a line, without the space that would begin a text."""
    line_break = token_ids("\n", tokenizer, special=False)
    ids = token_ids("\n" + text, tokenizer, special=False)
    if ids[: len(line_break)] == line_break:
        return ids[len(line_break) :]
    return token_ids(text, tokenizer, special=False)


def read_item(record: Record, where: str) -> Item:
    """A multiple-choice record, whichever way it says its choices and the right one.

    `choices` is a list of strings, or `{"text": [...], "label": [...]}`; `label` (or `answerKey`)
    is the index of the right choice, counted from 0, or its letter or name.
    """
    question, choices = text_of(record, "question", where), record.get("choices")
    label = record.get("label", record.get("answerKey"))
    names: Any = None
    if isinstance(choices, Mapping):
        names, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(
            f"{where}: expected a list of two or more strings in `choices`, got "
            f"{kind_of_value(choices)}"
        )
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise DataError(f"{where}: expected choices that are strings and not empty")
    if names is None:
        names = [chr(ord("A") + i) for i in range(len(choices))]
    if not isinstance(names, list) or len(names) != len(choices):
        raise DataError(
            f"{where}: expected as many choice labels as choices, {len(choices)}, got "
            f"{kind_of_value(names)}"
        )
    if isinstance(label, str) and label in names:
        label = names.index(label)
    if type(label) is not int or not 0 <= label < len(choices):
        raise DataError(
            f"{where}: expected `label` to be an index from 0 to {len(choices) - 1} or the name of "
            f"a choice, got {kind_of_value(label)}"
        )
    return Item(question=question, choices=tuple(choices), label=label)


def encode_messages(
    messages: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    where: str,
    chat_template: str | None = None,
) -> Example:
    """A conversation through the chat template, the assistant's turns trained.

    The turns are located by the template's own generation marks where it has them, else by
    rendering the conversation up to each turn, which must be a prefix of the whole. A conversation
    that is too long loses its end, or as much of its beginning as its first assistant turn needs.
    """
    _check_messages(messages, where)
    template = _template(tokenizer, chat_template, where)
    if "{% generation" in template or "{%- generation" in template:
        with encoding():
            encoded = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return _fit(ids, [bool(marked) for marked in mask], max_length)
    text, spans = _assistant_spans(messages, tokenizer, template, where)
    with encoding():
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    trained = [
        first < last and any(a <= first and last <= b for a, b in spans)
        for first, last in encoded["offset_mapping"]
    ]
    return _fit(encoded["input_ids"], trained, max_length)


def _template(tokenizer: PreTrainedTokenizerBase, chosen: str | None, where: str) -> str:
    """The chosen template, or the tokenizer's: of several by name the one called `default`."""
    try:
        template: str = tokenizer.get_chat_template(chosen or None)
    except ValueError as error:
        found = ", ".join(sorted(tokenizer.chat_template or ())) or "none"
        raise DataError(
            f"{where}: expected a tokenizer with a (default) chat template for `messages`, got "
            f"{found}: set chat_template, or give `prompt` + `completion`"
        ) from error
    return template


def _fit(ids: list[int], trained: list[bool], max_length: int) -> Example:
    """The window of a conversation that holds its first assistant turn, or the start of it."""
    end = min(max_length, len(ids))
    if True in trained:
        first = trained.index(True)
        last = trained.index(False, first) if False in trained[first:] else len(ids)
        end = max(end, min(last, first + max_length - 1))
    start = max(0, end - max_length)
    cut = len(ids) > max_length
    return Example(input_ids=ids[start:end], trained=trained[start:end], cut=cut)


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool = True) -> list[int]:
    """Token ids of a string, with the tokenizer's own special tokens or without.

    Raises:
        ModelError: the tokenizer cannot encode it.
    """
    with encoding():
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def open_ended_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a string that goes on: without an end token that the tokenizer appends itself.

    Raises:
        ModelError: the tokenizer cannot encode it.
    """
    ids, eos = token_ids(text, tokenizer), tokenizer.eos_token_id
    appended = eos is not None and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if appended and ids[-1:] == [eos] else ids


@contextmanager
def encoding() -> Iterator[None]:
    """Around a tokenizer at work: another party's can read well, and fail at some text.

    The tokenizers library raises bare Exception, and a panic in its Rust code is no Exception.

    Raises:
        ModelError: the tokenizer failed.
    """
    try:
        yield
    except (BlindtuneError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # A panic quotes the text that it met.
        reason = " ".join(str(error).split())[:200] if isinstance(error, Exception) else "a panic"
        raise ModelError(
            "expected a tokenizer that encodes any text, this one fails at some "
            f"({reason}): ask whoever made it"
        ) from error


def check_unicode(line: str, value: object, where: str) -> None:
    """Refuse JSON whose strings are no Unicode text.

    Args:
        line: the JSON.
        value: what it says.
        where: named in the error.

    Raises:
        DataError: a string has half of a surrogate pair.
    """
    if "\\u" not in line:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        raise DataError(
            f"{where}: expected Unicode text, got half of a surrogate pair ({half}): write the "
            "file with whole characters"
        ) from None


def _check_messages(messages: Any, where: str) -> None:
    good = isinstance(messages, list) and all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not messages:
        raise DataError(
            f"{where}: expected `messages` to be a list of {{role, content}} with strings, "
            f"got {kind_of_value(messages)}"
        )


def _assistant_spans(
    messages: list[dict[str, str]], tokenizer: Any, template: str, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the character span of every assistant turn in it."""
    from jinja2 import TemplateError

    def render(count: int, prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages[:count],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the chat template refuses the messages: {error}") from error

    text = render(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(index, True), render(index + 1, False)
        if not (text.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{where}: the chat template renders turn {index + 1} differently once the "
                "conversation goes on, so the assistant's tokens cannot be located: give a "
                "chat_template with {% generation %} marks, or `prompt` + `completion`"
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans
