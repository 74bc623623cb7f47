"""A few hundred exchanges with and without the proxy; differential.py is the command that runs many."""

from tests.brproxy.proxy.differential import differ

BOTH_LOOPS = True


async def test_a_client_sees_the_same_through_the_proxy():
    # What is rare: a stream that ends without a blank line, and an upload that is passed on as it comes.
    _, failures = await differ([91, 781, *range(140, 340)])
    assert not failures


async def test_a_stream_that_breaks_looks_complete_in_no_framing():
    # An error event within a Content-Length; the same for HTTP/1.0; a first event that breaks off unframed.
    _, failures = await differ([134, 239, 2368])
    assert not failures
