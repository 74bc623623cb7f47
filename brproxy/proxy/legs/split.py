"""Whether a request is split into two legs, and which goes first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from brproxy.engines.paths import Work, path_kind
from brproxy.engines.transfer import Order, TransferError
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.driver import Lease
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.decode_first import DecodeFirstLegs
from brproxy.proxy.legs.handover import Handover, NotPrefilledError
from brproxy.proxy.legs.prefill_first import DecodeLeg, MakeDecodeLeg, prefill_then_decode
from brproxy.proxy.legs.together import MergedLegs, PairedLegs
from brproxy.proxy.service import GroupService, Service
from brproxy.types import PendingRequest

# As plain names: looking a member of an enumeration up costs more than comparing it.
_GENERATES, _PREFILL_FIRST, _TOGETHER = Work.GENERATES, Order.PREFILL_FIRST, Order.TOGETHER

MakeLegs = Callable[[Service, GroupService, Lease, Incoming, ClientSink, Handover], Attempts]
"""Makes the leg that decodes, which has the other one with it."""


class Kinds(NamedTuple):
    """What makes the attempts of a request in one leg, and in two of each order."""

    alone: Callable[[Service, GroupService, Lease, Incoming, ClientSink], Attempts] = Attempts
    prefill_first: MakeDecodeLeg = DecodeLeg
    together: MakeLegs = PairedLegs
    decode_first: MakeLegs = DecodeFirstLegs


KINDS = Kinds()


async def run_split(
    service: Service,
    group: GroupService,
    handover: Handover,
    request: PendingRequest,
    incoming: Incoming,
    sink: ClientSink,
    kinds: Kinds = KINDS,
) -> None:
    """Answer the client; raises what Attempts.run and GroupDriver.admit do."""
    if _is_split(group, handover, request, incoming, sink):
        handover.counts["split"] += 1
        try:
            await _split(service, group, handover, request, incoming, sink, kinds)
        except (TransferError, NotPrefilledError):
            # Raised before anything was sent, or as nothing came of it.
            handover.counts["split"] -= 1
            if not handover.transfer.DECODES_ALONE:
                raise
        else:
            return
    handover.counts["alone"] += 1
    if _is_json(incoming):
        # What is no object can name nobody's KV.
        with suppress(TransferError):
            incoming.upload.beginning = handover.transfer.alone_body(incoming.upload.beginning or b"")
    with group.driver.admit(request) as lease:
        await kinds.alone(service, group, lease, incoming, sink).run()


async def _split(
    service: Service,
    group: GroupService,
    handover: Handover,
    request: PendingRequest,
    incoming: Incoming,
    sink: ClientSink,
    kinds: Kinds,
) -> None:
    order = handover.transfer.ORDER
    if order is _PREFILL_FIRST:
        await prefill_then_decode(service, group, handover, request, incoming, sink, kinds.prefill_first)
        return
    legs: MakeLegs = kinds.together if order is _TOGETHER else kinds.decode_first
    if handover.transfer.tells_of_prompt(incoming.path, incoming.upload.beginning or b""):
        legs = MergedLegs
    with group.driver.admit(request) as lease:
        await legs(service, group, lease, incoming, sink, handover).run()


def _is_json(incoming: Incoming) -> bool:
    """Tell whether a body is there as a whole, and may be JSON."""
    upload = incoming.upload
    return bool(upload.beginning) and upload.is_whole and not (incoming.facts.malformed or incoming.is_form)


def _is_split(
    group: GroupService, handover: Handover, request: PendingRequest, incoming: Incoming, sink: ClientSink
) -> bool:
    """Tell whether a request is prefilled by one worker and decoded by another."""
    facts, method = incoming.facts, sink.client.method
    if method != "POST" or not _is_json(incoming):
        return False
    if path_kind(incoming.path, method).work is not _GENERATES:
        return False
    if not handover.transfer.DECODES_ALONE:
        return True
    # Handles are of one sequence; and whoever can do both does, where nobody can be found for a half.
    if facts.sequences != 1 or not any(handover.routable()):
        return False
    is_short = request.prompt_tokens < handover.limits.split_prompt_tokens_min
    return not (is_short and not group.group.dispatcher.waiting.count)
