"""What each transfer says, byte for byte."""

import json

import pytest

from brproxy.engines.transfer import PARAMS_BYTES_MAX, Handoff, TransferError, make_transfer

CHAT = "/v1/chat/completions"
BODY = (
    b' {"model": "m", "stream":true,"stream_options":{"include_usage":true}, "max_completion_tokens" :90,'
    b'"min_tokens":5,"temperature":1.10,"n":1,"kv_transfer_params":{"mine":1} ,"bootstrap_room":9}'
)
HANDOFF = Handoff("xfer-7", 1001, prefill_host="10.0.0.7", engine_id="engine-1", params=b'{"a":1}')
NIXL = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)
KEPT = b'"model": "m","temperature":1.10,"n":1 ,"bootstrap_room":9}'
ALL_BUT_PARAMS = BODY[2:].replace(b',"kv_transfer_params":{"mine":1}', b"")


@pytest.mark.parametrize(
    ("name", "prefill", "decode"),
    [
        (
            "nixl",
            b' {"stream":false,"kv_transfer_params":' + NIXL + b',"max_tokens":1,"max_completion_tokens":1,',
            b' {"kv_transfer_params":{"a":1},',
        ),
        (
            "ascend",
            b' {"stream":false,"kv_transfer_params":'
            + NIXL
            + b',"max_tokens":1,"min_tokens":1,"max_completion_tokens":1,',
            b' {"kv_transfer_params":{"a":1},',
        ),
        (
            "mooncake",
            (
                b' {"stream":false,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,'
                b'"transfer_id":"xfer-7"},"max_tokens":1,"max_completion_tokens":1,'
            ),
            (
                b' {"kv_transfer_params":{"do_remote_decode":false,"do_remote_prefill":true,'
                b'"remote_bootstrap_addr":"http://10.0.0.7:8998","remote_engine_id":"engine-1",'
                b'"transfer_id":"xfer-7"},'
            ),
        ),
        (
            "ascend-layerwise",
            (
                b' {"stream":false,"kv_transfer_params":{"a":1},"max_tokens":1,"min_tokens":1,'
                b'"max_completion_tokens":1,'
            ),
            (
                b' {"kv_transfer_params":{"do_remote_decode":false,"do_remote_prefill":true,'
                b'"metaserver":"http://p/v1/metaserver"},'
            ),
        ),
    ],
)
def test_both_legs_of_a_chat(name, prefill, decode):
    transfer, handoff = make_transfer(name), HANDOFF._replace(metaserver="http://p/v1/metaserver")
    assert transfer.prefill_body(CHAT, BODY, handoff) == prefill + KEPT
    assert transfer.decode_body(CHAT, BODY, handoff) == decode + ALL_BUT_PARAMS


def test_limits_where_each_path_has_them():
    nixl, tail = make_transfer("nixl"), b',"kv_transfer_params":' + NIXL
    body = b'{"token_ids":[1,2],"sampling_params":{ "min_tokens":3,"seed":1,"max_tokens":9 }}'
    assert nixl.prefill_body("/inference/v1/generate", body, HANDOFF) == (
        b'{"stream":false' + tail + b',"sampling_params":{"max_tokens":1,"seed":1 },"token_ids":[1,2]}'
    )
    body = b'{"input":"a","max_output_tokens":7,"background":true}'
    assert nixl.prefill_body("/v1/responses", body, HANDOFF) == (
        b'{"stream":false' + tail + b',"max_output_tokens":1,"input":"a"}'
    )
    with pytest.raises(TransferError, match="sampling_params must be one JSON object"):
        nixl.prefill_body("/inference/v1/generate", b'{"sampling_params":[]}', HANDOFF)


@pytest.mark.parametrize("name", ["nixl", "ascend", "mooncake", "ascend-layerwise"])
def test_a_list_of_prompts_has_the_parameters_of_one_alone_and_is_not_split(name):
    transfer = make_transfer(name)
    for body in (
        b'{"prompt":["a","b"]}',
        b'{"prompt":[[1],[2]]}',
        b'{"prompt":["a"],"prompt_embeds":["a","b"]}',
    ):
        for leg in (transfer.prefill_body, transfer.decode_body):
            with pytest.raises(TransferError, match="one prompt"):
                leg("/v1/completions", body, HANDOFF)
    assert transfer.decode_body("/v1/completions", b'{"prompt":[["a"]]}', HANDOFF)


@pytest.mark.parametrize("name", ["nixl", "ascend", "mooncake", "ascend-layerwise"])
def test_what_is_asked_of_the_prompt_itself_is_not_split(name):
    transfer = make_transfer(name)
    for asked in (
        b'"prompt_logprobs":0',
        b'"sampling_params":{"prompt_logprobs":1}',
        b'"echo":true,"logprobs":1',
    ):
        with pytest.raises(TransferError, match="logprobs"):
            transfer.decode_body("/v1/completions", b"{" + asked + b"}", HANDOFF)
    for asked in (b'"prompt_logprobs":null', b'"echo":false,"logprobs":1', b'"echo":true'):
        assert transfer.decode_body("/v1/completions", b"{" + asked + b"}", HANDOFF)


def test_a_reply_s_parameters_pass_as_they_are_written():
    params = b'{ "remote_block_ids":[[1, 2]],"remote_host":"h\\u00e9", "remote_port":5600 }'
    for name in ("nixl", "ascend"):
        transfer = make_transfer(name)
        assert transfer.read_reply(b'{"id":"x","kv_transfer_params":%b,"usage":{}}' % params) == params
        for nothing in (b"null", b"{}", b"[1]", b'{"a":}', b'{"a":"' + b"x" * PARAMS_BYTES_MAX + b'"}'):
            assert transfer.read_reply(b'{"kv_transfer_params":%b}' % nothing) is None
        assert transfer.read_reply(b"Internal Server Error") is None


def test_of_a_push_the_decode_worker_is_not_told_the_blocks():
    reply = (
        b'{"kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":[[1,2]],"tp_size":2,'
        b'"transfer_mode":"push"}}'
    )
    assert make_transfer("nixl").read_reply(reply) == (
        b'{"do_remote_prefill":true,"tp_size":2,"transfer_mode":"push"}'
    )


def test_without_parameters_the_decode_worker_prefills():
    leg = make_transfer("nixl").decode_body(CHAT, b'{"a":1}', HANDOFF._replace(params=b""))
    assert leg == b'{"kv_transfer_params":null,"a":1}'


def test_engine_ids_of_mooncake_are_on_a_page_by_rank():
    mooncake = make_transfer("mooncake")
    page = b'{"0":{"engine_id":"e0","worker_addr":{"0":{"0":"tcp://h:1"}}},"1":{"engine_id":"e1"}}'
    assert [mooncake.read_bootstrap(page, rank) for rank in (0, 1, 2, None)] == ["e0", "e1", None, None]
    assert mooncake.read_bootstrap(b'{"3":{"engine_id":"e3"}}', None) == "e3"
    for odd in (b'"e"', b'["e"]', b'{"engine_id":7}', b'{"engine_id":""}', b'{"engine_id":"a\\n"}'):
        assert mooncake.read_bootstrap(b'{"0":%b}' % odd, 0) is None
    with pytest.raises(TransferError, match=r"no engine id of 10\.0\.0\.7"):
        mooncake.decode_body(CHAT, BODY, HANDOFF._replace(engine_id=""))


def test_mooncake_writes_addresses_as_a_url_has_them():
    handoff = HANDOFF._replace(prefill_host="fe80::1", bootstrap_port=9000)
    leg = json.loads(make_transfer("mooncake").decode_body(CHAT, BODY, handoff))
    assert leg["kv_transfer_params"]["remote_bootstrap_addr"] == "http://[fe80::1]:9000"


@pytest.mark.parametrize(
    ("posted", "request_id"),
    [
        ("chatcmpl-abc-7", "abc-7"),
        ("cmpl-abc-0", "abc"),
        ("cmpl-abc-0-0", "abc-0"),
        ("cmpl-abc-1", None),
        ("abc", None),
        ("chatcmpl-", None),
        ("chatcmpl-a b", None),
        ("chatcmpl-" + "a" * 600, None),
        (7, None),
    ],
)
def test_a_post_is_known_by_the_request_s_id(posted, request_id):
    post = json.dumps({"token_ids": [], "request_id": posted, "remote_port": 1}).encode()
    found = make_transfer("ascend-layerwise").read_post(post)
    assert found == (None if request_id is None else (request_id, post))


def test_a_post_that_is_no_json_is_none():
    transfer = make_transfer("ascend-layerwise")
    assert transfer.read_post(b'{"request_id":"chatcmpl-a","a":}') is None
    assert transfer.read_post(b'{"request_id":"chatcmpl-a"} {}') is None
    assert transfer.read_post(b'{"request_id":"chatcmpl-a","b":"' + b"x" * PARAMS_BYTES_MAX + b'"}') is None


@pytest.mark.parametrize("name", ["ascend", "ascend-layerwise"])
def test_who_must_be_prefilled_again(name):
    asks_again = make_transfer(name).asks_again
    assert asks_again(b'{"choices":[{"index":0,"delta":{},"stop_reason": "recomputed"}]}')
    assert asks_again(b'{"choices":[{"text":"a"},{"text":"b","stop_reason":"recomputed"}],"usage":null}')
    for other in (
        b'{"choices":[{"delta":{"content":"recomputed"},"stop_reason":null}]}',
        b'{"choices":[{"delta":{"content":"\\"stop_reason\\":\\"recomputed\\""}}]}',
        b'{"choices":["recomputed"]}',
        b'{"stop_reason":"recomputed"}',
        b'["recomputed"]',
        b'{"choices":[{"stop_reason":"recomputed"}',
        b"[DONE]",
    ):
        assert not asks_again(other)


def test_nobody_else_asks_again():
    event = b'{"choices":[{"stop_reason":"recomputed"}]}'
    assert not any(make_transfer(name).asks_again(event) for name in ("nixl", "mooncake", "sglang"))
