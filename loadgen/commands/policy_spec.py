"""A policy as written in commands and scenarios: ``NAME[:key=value,…][+…][@PREDICTOR]``.

``br-0:beta_per_worker=1`` sets a parameter, ``br-h@oracle`` names the predictor. Between them, in this order:
``+late`` or ``+early`` has it bind so, ``+learnt`` has it know what a step costs only as a proxy learns it,
``+fifo`` has closed batches wait like all others. The text is also what tables call it.
"""

from __future__ import annotations

import tomllib
from typing import Any

from brproxy.prediction.predictor import PREDICTORS
from brproxy.routing.policy import POLICIES, PolicyParams
from brproxy.types import InvalidInputError
from brproxy.validation import validate
from loadgen.simulator import SimulatedPolicy

_FIFO, _LEARNT = "+fifo", "+learnt"
_BINDING = {"+late": True, "+early": False}


def parse_policy(text: str, predictor: str = "survival") -> SimulatedPolicy:
    """Return what ``text`` describes; ``predictor`` is for those that name none. Raises InvalidInputError."""
    rest, at, named_predictor = text.partition("@")
    takes_batches = not rest.endswith(_FIFO)
    rest = rest.removesuffix(_FIFO)
    learns_costs = rest.endswith(_LEARNT)
    rest = rest.removesuffix(_LEARNT)
    params: dict[str, Any] = {}
    for suffix, late in _BINDING.items():
        if rest.endswith(suffix):
            rest = rest.removesuffix(suffix)
            params["late_binding"] = late
    name, _, assignments = rest.partition(":")
    policy = POLICIES.get(name)
    for assignment in filter(None, assignments.split(",")):
        key, _, value = assignment.partition("=")
        params[key] = _toml_value(text, value)
    chosen_predictor = named_predictor if at else predictor
    PREDICTORS.get(chosen_predictor)
    checked: PolicyParams = validate(policy.Params, params, f"policy {text!r}")
    return SimulatedPolicy(
        name, chosen_predictor, checked, learns_costs=learns_costs, takes_batches=takes_batches
    )


def parse_policies(text: str, predictor: str = "survival") -> dict[str, SimulatedPolicy]:
    """Return the policies of a list separated by spaces or commas between names, by their text.

    A comma inside parameters binds to them: ``br-h:gamma=0.9,horizon_steps=80`` is one policy.
    """
    specs: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.replace(" ", ",").split(","))):
        if "=" in part and ":" not in part and specs:
            specs[-1] += "," + part
        else:
            specs.append(part)
    if not specs:
        msg = "no policy is named; give at least one"
        raise InvalidInputError(msg)
    return {spec: parse_policy(spec, predictor) for spec in specs}


def _toml_value(text: str, value: str) -> object:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        msg = f"policy {text!r}: {value!r} is not a TOML value, like 8, 0.5 or true"
        raise InvalidInputError(msg) from error
