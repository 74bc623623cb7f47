"""What a request's prefill is to a worker."""

from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from brproxy.proxy.legs.handover import prefill_of
from brproxy.types import PendingRequest

# Every field is drawn, also those that have a default.
requests = st.builds(PendingRequest, **dict.fromkeys((field.name for field in fields(PendingRequest)), ...))


@given(requests)
def test_a_prefill_is_its_request_but_for_the_output_and_what_is_learnt(request):
    learnt = {"prompt_hash": None, "prefix_hash": None, "batch": ""}
    asked = replace(request, output_tokens_max=1, runs_to_max=True, **learnt)
    assert prefill_of(request) == asked
