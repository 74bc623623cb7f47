"""What a server means by a rank's number, and what an operator is told who took it for something else."""

import pytest

from brproxy.proxy.rank_check import RankCheck
from brproxy.ranks import RankGuess
from brproxy.relay.endpoint import Endpoint, EndpointSettings

SETTINGS = EndpointSettings(connect_s=5.0, keepalive_s=4.0, idle_max=8, head_bytes_max=4096)
CHECK = RankCheck("emulated", timeout_s=30.0, bytes_max=4096)
SECOND_NODE = tuple(range(4, 8))


@pytest.fixture
async def endpoint_of(stack):
    def make(url):
        endpoint = Endpoint(url, SETTINGS)
        stack.callback(endpoint.close)
        return endpoint

    return make


@pytest.mark.parametrize("are_global", [False, True])
@pytest.mark.parametrize("guess", [("local", 4), ("local", 0), ("global", 0)])
async def test_each_guess_at_each_server(are_global, guess, start_emulator, endpoint_of):
    emulator = await start_emulator(8, ranks_per_url=4, ranks_are_global=are_global)
    verdict = await CHECK.check(endpoint_of(emulator.urls[1]), RankGuess(SECOND_NODE, *guess))
    sends_global = guess != ("local", 4)
    sent = 7 if sends_global else 3
    if sends_global is are_global:
        assert verdict == (True, f"rank 7, sent as {sent}, is taken")
        return
    told = f"rank 7, sent as {sent}, is refused (status 400: data_parallel_rank is out of range.); "
    fix = (
        '7 is taken: set rank_mode = "global" without rank_base'
        if are_global
        else '3 is taken: set rank_mode = "local" and rank_base = 4'
    )
    assert verdict == (False, told + fix)


async def test_more_ranks_than_there_are(start_emulator, endpoint_of):
    emulator = await start_emulator(2, ranks_per_url=2)
    verdict = await CHECK.check(endpoint_of(emulator.urls[0]), RankGuess((0, 1, 2), "local", 0))
    assert not verdict.ok
    assert verdict.text.endswith("nor is another number taken: set ranks to those that are behind this URL")


async def test_a_number_that_means_another_rank_is_doubted(start_emulator, endpoint_of):
    # Of one server with all eight, the second half by numbers of its own.
    emulator = await start_emulator(8, ranks_per_url=8)
    endpoint = endpoint_of(emulator.urls[0])
    fix = 'set rank_mode = "global" without rank_base'
    doubt = f"so is 7: unless more ranks than these are behind this URL, {fix}"
    assert await CHECK.check(endpoint, RankGuess(SECOND_NODE, "local", 4)) == (
        True,
        f"rank 7, sent as 3, is taken; {doubt}",
    )
    assert await CHECK.check(endpoint, RankGuess(tuple(range(8)), "local", 0)) == (
        True,
        "rank 7, sent as 7, is taken",
    )


def by_rank(fixed, *, wrong, other, right="3"):
    """Return a script's answers: ``wrong`` for any rank but ``right``, ``other`` for none."""

    async def script(worker, reader, writer):
        while True:
            await worker.read_request(reader)
            _, found, rest = worker.requests[-1].partition(b"X-data-parallel-rank: ")
            answer = other if not found else fixed(b"{}") if rest.startswith(right.encode()) else wrong
            if answer is None:
                await reader.read()
                return
            writer.write(answer)

    return script


EVENTS = b'data: {"error": {"message": "out of\\n range", "code": 400}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (EVENTS, "200 OK", "status 200, and out of range"),
        (b'{"object":"error","message":"DP rank 7 is not active"}', "200 OK", "status 200, and DP rank 7 is"),
        (b'{"error":"no"}', "400 Bad", "status 400: no"),
        (b"<html>", "400 Bad", "status 400)"),
        (b"[1]", "400 Bad", "status 400)"),
    ],
)
async def test_every_way_of_refusing(body, status, words, raw_worker, endpoint_of, fixed):
    wrong = fixed(body, status)
    worker = await raw_worker(by_rank(fixed, wrong=wrong, other=fixed(b"{}")))
    verdict = await CHECK.check(endpoint_of(worker.url), RankGuess(SECOND_NODE, "global", 0))
    assert not verdict.ok
    assert f"is refused ({words}" in verdict.text
    assert verdict.text.endswith('3 is taken: set rank_mode = "local" and rank_base = 4')
    assert "\n" not in verdict.text


async def test_silence_is_a_wrong_guess_and_limited_in_time(raw_worker, endpoint_of, fixed):
    worker = await raw_worker(by_rank(fixed, wrong=None, other=fixed(b"{}")))
    check = RankCheck("", timeout_s=0.05, bytes_max=4096)
    verdict = await check.check(endpoint_of(worker.url), RankGuess(SECOND_NODE, "global", 0))
    assert not verdict.ok
    assert "sent as 7, gets no answer (" in verdict.text
    assert "did not answer within 0.05 s" in verdict.text
    assert verdict.text.endswith('set rank_mode = "local" and rank_base = 4')


@pytest.mark.parametrize("status", ["404 Not Found", "503 Busy", "401 Who", "302 Found"])
async def test_what_is_about_something_else_is_no_wrong_guess(status, raw_worker, endpoint_of, fixed):
    worker = await raw_worker(by_rank(fixed, wrong=fixed(b"{}", status), other=None))
    verdict = await CHECK.check(endpoint_of(worker.url), RankGuess(SECOND_NODE, "global", 0))
    assert verdict == (True, f"rank 7, sent as 7, cannot be tried (status {status[:3]})")
    assert len(worker.requests) == 1


async def test_a_server_that_refuses_any_request_says_nothing_about_ranks(raw_worker, endpoint_of, fixed):
    wrong = fixed(b'{"error":{"message":"chat only"}}', "400 Bad")
    worker = await raw_worker(by_rank(fixed, wrong=wrong, other=wrong))
    verdict = await CHECK.check(endpoint_of(worker.url), RankGuess(SECOND_NODE, "global", 0))
    assert verdict.ok
    assert verdict.text.endswith("without a rank (status 400: chat only): ranks cannot be tried")
    assert [
        b"\r\n\r\n" in head and head.startswith(b"POST /v1/completions ") for head in worker.requests
    ] == [True] * 2


async def test_the_words_of_a_server_are_one_short_line(raw_worker, endpoint_of, fixed):
    words = b'{"error":{"message":"\\u001b[31m%b"}}' % (b"x" * 3000)
    worker = await raw_worker(by_rank(fixed, wrong=fixed(words, "400 Bad"), other=fixed(b"{}")))
    verdict = await CHECK.check(endpoint_of(worker.url), RankGuess(SECOND_NODE, "global", 0))
    assert verdict.text.isprintable()
    assert len(verdict.text) < 400
