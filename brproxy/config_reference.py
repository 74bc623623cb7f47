"""The configuration reference, made from the models that check the file: it cannot go out of date."""

from __future__ import annotations

from pydantic import BaseModel

from brproxy.config import Config
from brproxy.config_workers import Worker
from brproxy.validation import table_model

_WORKER_TABLE = "[[worker]] "


def reference_rows() -> list[tuple[str, str, str]]:
    """Return (key path, default in TOML, description) of every key, in order."""
    return _rows(Config, "")


def reference_table() -> str:
    """Return the reference as a Markdown table."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {_cell(default)} | {text} |" for key, default, text in reference_rows()]
    return "\n".join(lines)


def _cell(default: str) -> str:
    return default if default in {"required", "not set"} else f"`{default}`"


def _rows(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        nested = table_model(field.annotation)
        if nested is not None:
            rows += _rows(nested, _WORKER_TABLE if nested is Worker else f"{prefix}{key}.")
            continue
        default = "required" if field.is_required() else _toml(field.get_default(call_default_factory=True))
        rows.append((f"{prefix}{key}", default, field.description or ""))
    return rows


def _toml(value: object) -> str:
    """Return a default as it is written in TOML; TOML has no null, a key that is not set is left out."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
