"""What predictors have learnt, kept in a small file across restarts.

The file is a convenience: one that is missing, corrupt, old or of another predictor is ignored with a
warning, and the proxy learns anew.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from brproxy.prediction.predictor import AnyPredictor

log = logging.getLogger(__name__)

FORMAT = 1
STATE_BYTES_MAX = 256 << 20


def save_state(path: Path, predictors: Mapping[str, AnyPredictor], name: str) -> None:
    """Write what ``predictors`` (by barrier group) have learnt; all of them are called ``name``.

    The file is replaced in one piece: a reader never sees half of it. A failure is logged.
    """
    groups = {group: predictor.state() for group, predictor in predictors.items()}
    document = {"format": FORMAT, "predictor": name, "groups": groups}
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(orjson.dumps(document))
        partial.replace(path)
    except OSError as error:
        log.warning("%s: what predictors have learnt cannot be kept: %s", path, error.strerror)


def load_state(path: Path, predictors: Mapping[str, AnyPredictor], name: str) -> None:
    """Have ``predictors`` learn what the file has for their groups, if it is there and fits."""
    if not path.exists():
        return
    try:
        groups = _read_groups(path, name)
        for group, predictor in predictors.items():
            if group in groups:
                predictor.restore(groups[group])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: ignored, predictors start anew: %s", path, " ".join(str(error).split()))


def _read_groups(path: Path, name: str) -> dict[str, Any]:
    if path.stat().st_size > STATE_BYTES_MAX:
        msg = f"it is larger than {STATE_BYTES_MAX} bytes"
        raise ValueError(msg)
    document = orjson.loads(path.read_bytes())
    if document["format"] != FORMAT or document["predictor"] != name:
        msg = f"it is of format {document['format']}, predictor {document['predictor']!r}"
        raise ValueError(msg)
    groups: dict[str, Any] = document["groups"]
    return groups
