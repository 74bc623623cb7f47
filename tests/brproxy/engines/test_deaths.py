"""What a dialect takes for its engine's last words, and what for an ordinary error."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import DIALECTS, make_dialect

NAMES = DIALECTS.names()
DEATH = "EngineCore encountered an issue. See stack trace (above) for the root cause."


def error(message=DEATH, kind="InternalServerError", code=500):
    return {"message": message, "type": kind, "param": None, "code": code}


@pytest.mark.parametrize(
    ("name", "body", "died"),
    [
        ("vllm", {"error": error()}, True),
        ("vllm", {"object": "error", **error()}, True),
        ("vllm", {"type": "error", "error": error()}, True),
        ("vllm", {"error": error("Background loop has errored already.")}, True),
        ("vllm", {"error": error("Internal server error")}, False),
        ("vllm", {"error": error(f"The model `{DEATH}` does not exist.", "NotFoundError", 404)}, False),
        ("vllm", {"error": error(kind="BadRequestError", code=400)}, False),
        ("vllm", {"error": DEATH}, False),
        ("vllm", {"choices": [{"text": DEATH}]}, False),
        ("vllm", [DEATH], False),
        ("sglang", {"error": error()}, False),
        ("openai", {"error": error()}, False),
    ],
)
def test_a_dead_engine_is_known_by_its_error(name, body, died):
    dialect, data = make_dialect(name), json.dumps(body).encode()
    assert dialect.is_death(500, data) == died
    assert dialect.may_tell_death(500) == (name == "vllm")
    assert not dialect.is_death(503, data)
    assert not dialect.is_death(200, data)
    assert not dialect.is_death(404, data)
    if "object" not in body:
        facts = dialect.read_event(data)
        assert facts.died == died
        assert not facts.refused


@pytest.mark.parametrize("name", NAMES)
@given(status=st.integers(100, 599), body=st.binary(max_size=60))
def test_any_answer_can_be_asked_for_a_death(name, status, body):
    assert not make_dialect(name).is_death(status, body)
