"""Errors as the real client libraries of the APIs read them."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import anthropic
import openai
import pytest
from anthropic.types import ErrorResponse
from openai.types.responses import ResponseErrorEvent

from brproxy.engines.api_errors import Api, api_of, error_body, error_event
from brproxy.engines.dialect import make_dialect

STATUSES = (400, 404, 408, 413, 429, 500, 502, 503, 504)


@pytest.mark.parametrize(
    ("path", "api"),
    [
        ("/v1/chat/completions", Api.OPENAI),
        ("/v1/completions", Api.OPENAI),
        ("/generate", Api.OPENAI),
        ("/v1/models", Api.OPENAI),
        ("/", Api.OPENAI),
        ("/v1/responses", Api.RESPONSES),
        ("/base/v1/responses/resp_1/cancel", Api.RESPONSES),
        ("/v1/messages", Api.ANTHROPIC),
        ("/base/v1/messages/count_tokens", Api.ANTHROPIC),
    ],
)
def test_the_api_of_a_path(path, api):
    assert api_of(path) is api


class Canned(BaseHTTPRequestHandler):
    """Answers every request with what the test has put on its server."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body, content_type = self.server.answer
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with HTTPServer(("127.0.0.1", 0), Canned) as canned:
        thread = threading.Thread(target=canned.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield canned
        canned.shutdown()
        thread.join()


def call(api, server, *, stream):
    """Ask as a client of ``api`` would, and read to the end; return the events."""
    url = f"http://127.0.0.1:{server.server_port}"
    message = {"role": "user", "content": "x"}
    if api is Api.ANTHROPIC:
        with anthropic.Anthropic(api_key="k", base_url=url, max_retries=0) as client:
            return list(client.messages.create(model="m", max_tokens=1, messages=[message], stream=stream))
    with openai.OpenAI(api_key="k", base_url=url + "/v1", max_retries=0) as client:
        if api is Api.RESPONSES:
            return list(client.responses.create(model="m", input="x", stream=stream))
        return list(client.chat.completions.create(model="m", messages=[message], stream=stream))


def library(api):
    return anthropic if api is Api.ANTHROPIC else openai


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_an_error_of_its_status(api, status, stream, server):
    body = error_body(api, status, "what is wrong", "some_error")
    server.answer = (status, body, "application/json")
    with pytest.raises(library(api).APIStatusError, match="what is wrong") as raised:
        call(api, server, stream=stream)
    assert raised.value.status_code == status
    # Documented with its type, which the library knows by its status alone.
    if api is Api.ANTHROPIC and status != 413:
        assert ErrorResponse.model_validate_json(body).error.message == "what is wrong"


STARTS = {
    Api.OPENAI: b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n',
    Api.RESPONSES: b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
    b'"delta":"x","item_id":"i","output_index":0,"content_index":0,"sequence_number":1,"logprobs":[]}\n\n',
    Api.ANTHROPIC: b'event: ping\ndata: {"type":"ping"}\n\n',
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("api", Api)
def test_a_stream_that_breaks_off_raises(api, status, server):
    events = STARTS[api] + error_event(api, status, "the worker is gone", "upstream_error")
    server.answer = (200, events, "text/event-stream")
    with pytest.raises(library(api).APIError, match="the worker is gone"):
        call(api, server, stream=True)


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize("name", ["openai", "vllm", "sglang"])
def test_our_own_dialects_read_it_as_an_error(api, name):
    data = error_event(api, 502, "gone", "upstream_error").partition(b"data: ")[2]
    facts = make_dialect(name).read_event(data)
    assert (facts.error, facts.died, facts.has_tokens) == (True, False, False)


def test_the_event_of_the_responses_api_is_its_own():
    data = error_event(Api.RESPONSES, 502, "gone", "upstream_error").partition(b"data: ")[2]
    event = ResponseErrorEvent.model_validate_json(data)
    assert (event.type, event.message, event.code) == ("error", "gone", "502")


def test_the_types_of_anthropics_errors():
    assert b'"type":"overloaded_error"' in error_body(Api.ANTHROPIC, 503, "", "x")
    assert b'"type":"rate_limit_error"' in error_body(Api.ANTHROPIC, 429, "", "x")
    assert b'"type":"invalid_request_error"' in error_body(Api.ANTHROPIC, 422, "", "x")
    assert b'"type":"api_error"' in error_body(Api.ANTHROPIC, 502, "", "x")
