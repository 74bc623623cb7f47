"""The prefill of a request that another worker decodes: attempts like any other, whose answer is kept."""

from __future__ import annotations

from brproxy.engines.transfer import Handoff
from brproxy.journey import Action, State
from brproxy.proxy.attempts import Attempts
from brproxy.proxy.driver import Lease
from brproxy.proxy.exchange.client_sink import ClientSink
from brproxy.proxy.exchange.handles import PrefillAnswer
from brproxy.proxy.incoming import Incoming
from brproxy.proxy.legs.handover import Handover, NotPrefilledError
from brproxy.proxy.service import Service
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError
from brproxy.roster import Member


class PrefillLeg(Attempts):
    """A prefill, by one worker after another until one has done it.

    ``handoff`` is then what the leg to the worker that decodes needs, and ``reply`` the answer; both are None
    where the client has got an error instead. A worker that failed this leg is not asked again. ``orphan`` is
    the answer of one that had not answered when the client left, where that is to be waited for.

    Where no worker is left, ``run`` raises NotPrefilledError if one that decodes may do it all: not if two
    workers may have died of the request, of either leg.
    """

    __slots__ = ("_body", "_handover", "handoff", "orphan", "reply")

    ASKS_USAGE = False
    ANSWER = PrefillAnswer

    def __init__(
        self, service: Service, handover: Handover, lease: Lease, incoming: Incoming, sink: ClientSink
    ) -> None:
        super().__init__(service, handover.group, lease, incoming, sink)
        self._handover = handover
        self._body = b""
        self.handoff: Handoff | None = None
        self.reply: bytes | None = None
        self.orphan: PrefillAnswer | None = None

    def handed(self, body: bytes) -> None:
        """See PrefillAttempt.handed."""
        self.reply = body
        # Its one token is the client's of the other leg, and no KV of it is kept.
        usage = self._group.dialect.read_reply(body)
        if usage is not None and usage.prompt_tokens is not None:
            self._lease.correct_prompt(usage.prompt_tokens)
            if usage.cached_tokens is not None:
                self._lease.correct_cached(usage.cached_tokens)
            facts = self._incoming.facts
            if facts.teaches:
                # Who decodes reports the same, of a request that is known by then.
                self._service.estimator.learn_prompt(
                    facts.model,
                    facts.user,
                    facts.prompt_text,
                    usage.prompt_tokens,
                    self._lease.entry.request.prompt_tokens,
                )
        self._lease.first_token()
        # An engine keeps what it has prefilled beside those that it runs.
        self._lease.rest()

    def adopts(self, answer: PrefillAnswer) -> bool:
        """See PrefillAttempt.adopts."""
        # Who refused is left as well, and has nothing.
        moves_on = self._journey.state is State.WAITING
        if answer.has_begun or moves_on or not self._handover.may_free():
            return False
        self.orphan = answer
        return True

    def _failure(self) -> Exception:
        is_deserted = isinstance(self._error, WorkerFailedError) and self._incoming.runs.may_go_on
        if is_deserted and self._handover.transfer.DECODES_ALONE:
            return NotPrefilledError(str(self._error))
        return super()._failure()

    async def _send(self, *, afresh: bool) -> Action:
        """As Attempts._send; raises TransferError for a request that cannot be split."""
        incoming, handover = self._incoming, self._handover
        handoff = handover.handoff(incoming.request_id, self._group.reach(self._worker)[0])
        # Before there is a connection: it can fail.
        self._body = handover.transfer.prefill_body(incoming.path, handover.document(incoming), handoff)
        self.handoff = handoff
        return await super()._send(afresh=afresh)

    def _request(self, member: Member, endpoint: Endpoint) -> bytes:
        return self._leg(member, endpoint, self._body, is_read=True)
