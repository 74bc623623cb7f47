"""A stream with usage that only the proxy asked for, held against the stream that the client asked for."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import make_dialect
from brproxy.engines.unasked import UsageRemover

USAGE = {"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": 6}
DONE = b"data: [DONE]\n\n"


def event(**fields):
    document = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", **fields}
    return b"data: " + orjson.dumps(document) + b"\n\n"


def vllm_stream(texts, reason, fingerprint, *, chat, asked, forced=False):
    """Return the events that vLLM 0.33 sends for one sequence, by its ``*_stream_generator``."""

    def chunk(text, finish_reason, **more):
        choice = {"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}
        choice |= {"logprobs": None, "finish_reason": finish_reason, "token_ids": None}
        if forced:
            more = {"usage": USAGE} | more
        return event(choices=[choice], **more)

    events = []
    if chat:
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        usage = {"usage": USAGE} if forced else {}
        events.append(event(choices=[first], **usage, prompt_token_ids=None, prompt_text=None))
    events += [chunk(text, None) for text in texts]
    has_usage_event = asked or forced
    mark = {} if fingerprint is None else {"system_fingerprint": fingerprint}
    events.append(chunk("", reason, **({} if has_usage_event else mark)))
    if has_usage_event:
        events.append(event(choices=[], usage=USAGE, **mark))
    return [*events, DONE]


def without_usage(dialect, events):
    remover = UsageRemover(takes_fingerprint=dialect.USAGE_TAKES_FINGERPRINT)
    passed = [
        remover.pass_on(event, dialect.read_event(event.removeprefix(b"data: ").strip())) for event in events
    ]
    return b"".join(passed) + remover.rest()


@given(
    st.lists(st.text(max_size=8) | st.just('"system_fingerprint":"x"'), max_size=4),
    st.sampled_from(["stop", "length", "tool_calls"]),
    st.none() | st.text(max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_a_client_gets_what_vllm_would_have_sent_it(texts, reason, fingerprint, chat, forced):
    sent = vllm_stream(texts, reason, fingerprint, chat=chat, asked=True, forced=forced)
    wanted = vllm_stream(texts, reason, fingerprint, chat=chat, asked=False, forced=forced)
    if forced and not chat and not texts:
        # With nothing before the last event, nothing shows that everybody gets reports.
        return
    assert without_usage(make_dialect("vllm"), sent) == b"".join(wanted)


def finish(index, reason="stop"):
    return event(choices=[{"index": index, "delta": {"content": ""}, "finish_reason": reason}])


def content(index, text):
    return event(choices=[{"index": index, "delta": {"content": text}, "finish_reason": None}])


def test_several_sequences_keep_their_order():
    events = [content(0, "a"), finish(0), content(1, "b"), finish(1)]
    usage = event(choices=[], usage=USAGE, system_fingerprint="f")
    marked = events[3][:-3] + b',"system_fingerprint":"f"}\n\n'
    assert without_usage(make_dialect("vllm"), [*events, usage, DONE]) == b"".join(events[:3]) + marked + DONE


def test_a_stream_that_ends_without_usage_loses_nothing():
    events = [content(0, "a"), finish(0)]
    assert without_usage(make_dialect("vllm"), events) == b"".join(events)


@pytest.mark.parametrize("name", ["openai", "sglang"])
def test_others_only_send_one_event_more(name):
    remover = UsageRemover(takes_fingerprint=make_dialect(name).USAGE_TAKES_FINGERPRINT)
    last = finish(0)
    assert remover.pass_on(last, make_dialect(name).read_event(last[6:-2])) == last
    assert not remover.held
    events = [content(0, "a"), last, event(choices=[], usage=USAGE), DONE]
    assert without_usage(make_dialect(name), events) == events[0] + events[1] + DONE


def test_blank_lines_before_the_report_stay():
    remover = UsageRemover(takes_fingerprint=True)
    usage = b"\n\r\n" + event(choices=[], usage=USAGE)
    assert remover.pass_on(usage, make_dialect("vllm").read_event(usage[9:-2])) == b"\n\r\n"


@given(
    st.lists(
        st.sampled_from([b": c\n\n", b"data: {}\n\n", b"data: }\n\n", finish(0), content(0, "x")]), max_size=6
    )
)
def test_nothing_else_is_lost_or_moved(events):
    assert without_usage(make_dialect("vllm"), events) == b"".join(events)
