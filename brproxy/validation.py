"""TOML files checked by pydantic models, and what is wrong with them in one line."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from brproxy.types import InvalidInputError

M = TypeVar("M", bound=BaseModel)
Keys = list[int | str]


class ConfigError(InvalidInputError):
    """A file is not usable; the text names file, key path, what is wrong and what is allowed."""


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
_UNION_TAGS = ("str", "list[str]")


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
    except tomllib.TOMLDecodeError as error:
        msg = f"{path}: not valid TOML: {error}"
        raise ConfigError(msg) from error


def validate(model: type[M], document: dict[str, Any], source: str) -> M:
    """Check a parsed document; ``source`` is what the messages call it. Raises ConfigError."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        errors = error.errors()
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        msg = f"{source}: {_one_line(model, errors[0])}{more}"
        raise ConfigError(msg) from error


def _one_line(model: type[BaseModel], error: ErrorDetails) -> str:
    """Return ``key.path: what is wrong`` for an error that pydantic found."""
    keys = list(error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, keys[:-1])
        close = get_close_matches(str(keys[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
        return f"{_path(keys)}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{_path(keys)}: is missing; it must be given"
    text = error["msg"].removeprefix("Value error, ")
    for pydantic_words, plain_words in _PLAIN_WORDS:
        text = text.replace(pydantic_words, plain_words)
    if error["type"] == "model_type":
        text = "must be a table"
    if (len(keys) > 1 and keys[-1] in _UNION_TAGS) or (len(keys) > 2 and keys[-2] in _UNION_TAGS):
        keys = keys[: next(i for i, key in enumerate(keys) if key in _UNION_TAGS)]
        text = "must be a string or a list of strings"
    value = error["input"]
    named = text.startswith("unknown") or not isinstance(value, str | int | float)
    return (f"{_path(keys)}: " if keys else "") + text + ("" if named else f", got {value!r}")


def _path(keys: Sequence[int | str]) -> str:
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
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
