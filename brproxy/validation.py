"""TOML files checked by pydantic models, and what is wrong with them: every mistake, a line each."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from brproxy.types import InvalidInputError

M = TypeVar("M", bound=BaseModel)
Keys = list[int | str]

MISTAKES_SHOWN_MAX = 50
"""Most mistakes of a file that are told (lines). A file may have thousands, one for each of its workers, and
the first would leave the screen; how many more there are is said in a last line."""


class ConfigError(InvalidInputError):
    """A file is not usable; each line names file, key path, what is wrong and what is allowed."""


class Section(BaseModel):
    """A table of a file: unknown keys and lax types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# What pydantic says, and how the rest of brproxy says it.
_PLAIN_WORDS = (
    ("Input should be", "must be"),
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("a valid ", "a "),
    ("a integer", "an integer"),
)
# A key that takes a string or a list: pydantic adds the alternative that it tried to the key path.
_STRING_TAG, _LIST_TAG = "str", "list[str]"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_VALUE_CHARS_MAX = 80


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ConfigError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: must be UTF-8 text: byte {error.start} is not"
        raise ConfigError(msg) from error
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError, an endless number, or nested too deep
        msg = f"{path}: not valid TOML: {error}"
        raise ConfigError(msg) from error


class Disagreement(NamedTuple):
    """A mistake that only values beside each other show; ``keys`` lead to it from the checked value."""

    keys: tuple[int | str, ...]
    text: str


def refuse(disagreements: Iterable[Disagreement]) -> None:
    """Have pydantic report these beside its own; for validators. Raises ValidationError if there are any."""
    errors = [
        InitErrorDetails(
            type=PydanticCustomError("disagreement", "{text}", {"text": text}), loc=keys, input=None
        )
        for keys, text in disagreements
    ]
    if errors:
        raise ValidationError.from_exception_data("disagreements", errors)


def validate(model: type[M], document: dict[str, Any], source: str) -> M:
    """Check a parsed document; ``source`` is what the messages call it.

    Raises ConfigError: a line for each mistake, MISTAKES_SHOWN_MAX of them and one that counts the others.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        mistakes = [_one_line(model, details) for details in error.errors() if not _is_told_twice(details)]
        lines = [f"{source}: {mistake}" for mistake in mistakes[:MISTAKES_SHOWN_MAX]]
        if len(mistakes) > MISTAKES_SHOWN_MAX:
            lines.append(f"{source}: and {len(mistakes) - MISTAKES_SHOWN_MAX} more mistakes")
        raise ConfigError("\n".join(lines)) from error


def _is_told_twice(error: ErrorDetails) -> bool:
    """Whether another error tells the same: pydantic reports what each alternative of a union refuses.

    What is no list is told as no string; of a list the items are told that are no strings.
    """
    tag = error["loc"][-1] if len(error["loc"]) > 1 else None
    return tag == _LIST_TAG or (tag == _STRING_TAG and isinstance(error["input"], list))


def _one_line(model: type[BaseModel], error: ErrorDetails) -> str:
    """Return ``key.path: what is wrong`` for an error that pydantic found."""
    keys = [key for key in error["loc"] if key not in {_STRING_TAG, _LIST_TAG}]
    path = f"{_path(keys)}: " if keys else ""
    if error["type"] == "extra_forbidden":
        keys = list(error["loc"])
        known = _keys_at(model, keys[:-1])
        close = get_close_matches(str(keys[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
        return f"{_path(keys)}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{path}is missing; it must be given"
    if error["type"] == "disagreement":
        return path + error["msg"]
    value = error["input"]
    text = _in_plain_words(error)
    if text.startswith("unknown") or not isinstance(value, str | int | float):
        return path + text
    shown = repr(value)
    return f"{path}{text}, got {shown if len(shown) <= _VALUE_CHARS_MAX else shown[:_VALUE_CHARS_MAX] + '…'}"


def _in_plain_words(error: ErrorDetails) -> str:
    if error["type"] == "model_type":
        return "must be a table"
    if error["loc"][-1:] == (_STRING_TAG,):
        return "must be a string or a list of strings"
    text = error["msg"].removeprefix("Value error, ")
    for pydantic_words, plain_words in _PLAIN_WORDS:
        text = text.replace(pydantic_words, plain_words)
    return text


def _path(keys: Sequence[int | str]) -> str:
    """Return a path as TOML writes it; a key that it would quote may hold anything, line ends too."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{key if _BARE_KEY.fullmatch(key) else json.dumps(key)}"
    return text.removeprefix(".")


def _keys_at(model: type[BaseModel], keys: Keys) -> list[str]:
    """Return the keys that the table at ``keys`` may have."""
    for key in keys:
        if isinstance(key, int):
            continue
        by_key = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
        model = table_model(by_key[key]) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def table_model(annotation: object) -> type[BaseModel] | None:
    """Return the model of a table or of a list of tables, None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
