"""What a scenario is made of, as data: so that it can be printed, shrunk and run again.

Every number that a run needs of a client or a worker is drawn beforehand and stands here. Whoever leaves an
action out, or makes one simpler, changes nothing of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

KEEP = "keep"


@dataclass(frozen=True)
class Answer:
    """What a worker does with one attempt at a request.

    ``kind``: "answer" (as asked: a stream, or a reply), "refusal" (503), "refusal-event" (200, and an event
    that says 503), "error" (500), "garbage" (no HTTP), "garbage-body" (chunks that are none).
    ``framing``: "chunked", "length" or "close". ``usage``: what it reports of prompt and output, if it does.
    Of workers that are apart there are "bad-request" (400), "no-params" (a prefill that keeps nothing), and
    "error-event" (200, and an event that says 500). ``fails_in_event``: where its KV does not come it says so
    in an event, and not by a status. A token is ``padding`` bytes longer than it need be. ``late_s`` before
    the first byte, ``gap_s`` between pieces. After ``stop_at`` bytes (None: all of them) comes ``ending``:
    "keep" (the connection stays), "close", "reset", "hang" (nothing, for ever), "stale" (it stays for a
    moment). ``length_said`` is a Content-Length that is far too large, or no number. ``extra``: bytes that
    nobody asked for follow. ``early``: it does not wait for the request's body.
    """

    kind: str = "answer"
    framing: str = "chunked"
    tokens: int = 3
    usage: tuple[int, int] | None = None
    done: bool = True
    late_s: float = 0.0
    gap_s: float = 0.0
    stop_at: int | None = None
    ending: str = KEEP
    interim: bool = False
    early: bool = False
    length_said: int | None = None
    extra: bool = False
    padding: int = 0
    fails_in_event: bool = False


@dataclass(frozen=True)
class Ask:
    """One request. The k-th attempt at it gets ``answers[k]``, any further one the last.

    ``kind``: "chat", "completion", "embedding", "upload", "upgrade", "page" (the proxy's own), "bad" (no
    HTTP). ``prompt`` is its length: characters, or tokens where ``token_ids``. ``batch``: the closed
    batch that it says to be of.

    Where prefill and decode are apart ``answers`` are those of workers that decode, ``prefills`` the others'.
    ``own_handles``: its client says itself where its KV is. ``unsplit``: the member that makes it a request
    for one worker. ``request_id``: its client's X-Request-Id. ``posts``: what a decode worker posts to the
    metaserver besides its own: "unknown", "twice", "late", "no-json", "no-length", "long".
    """

    id: int
    kind: str = "chat"
    method: str = "POST"
    model: str = ""
    stream: bool = True
    prompt: int = 20
    token_ids: bool = False
    max_tokens: int | None = None
    choices: int | None = None
    own_usage: bool = False
    http10: bool = False
    closes: bool = False
    chunked: bool = False
    batch: str = ""
    answers: tuple[Answer, ...] = (Answer(),)
    prefills: tuple[Answer, ...] = (Answer(),)
    own_handles: bool = False
    unsplit: str = ""
    request_id: str = ""
    posts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Visit:
    """One client connection from ``at_s`` on, with its requests, all at once if ``pipelined``.

    Requests go out in pieces of ``piece`` bytes, ``piece_gap_s`` in between (0: whole); after ``sends_max``
    bytes (None: all) nothing more is sent. It leaves after ``leaves_after_s`` or once it has
    ``leaves_at_bytes``, by a reset if ``resets``. Having received ``stalls_at_bytes`` it reads nothing for
    ``stall_s``. ``half_closes``: it says that it will send nothing more, and reads on.
    """

    at_s: float
    asks: tuple[Ask, ...]
    pipelined: bool = False
    piece: int = 0
    piece_gap_s: float = 0.0
    sends_max: int | None = None
    leaves_after_s: float | None = None
    leaves_at_bytes: int | None = None
    resets: bool = False
    stalls_at_bytes: int | None = None
    stall_s: float = 0.0
    half_closes: bool = False

    @property
    def leaves(self) -> bool:
        """Whether it may go before it has what it asked for."""
        return self.leaves_after_s is not None or self.leaves_at_bytes is not None


@dataclass(frozen=True)
class Trouble:
    """Something that is wrong with ``worker`` (or with all, or the proxy) from ``at_s`` for ``lasts_s``.

    ``kind``: "connect-refused", "connect-silent", "connect-reset", "restart", "freeze", "health-late",
    "health-never", "health-endless", "health-error", "out-of-files", "clock-jump" (by ``lasts_s``),
    "policy-raises", "predictor-raises", "shutdown" (of the proxy: nothing comes after it),
    "member-leaves" (and comes back), "member-joins" (a new one, in the same group), "member-drains" (and is
    resumed), "group-anew" and "group-cut" (the group of ``worker`` is removed by a reload and comes again
    with the next; what it has may end, or has half a second), "page-fails" (the page at its bootstrap port),
    "limits-fall" and "limits-rise" (of a member, and are as before again).
    """

    at_s: float
    kind: str
    worker: int = 0
    lasts_s: float = 1.0


Action = Visit | Trouble


@dataclass(frozen=True)
class Parted:
    """Prefill and decode apart: the role of each worker, the transfer of each group.

    A prefill worker keeps KV for ``lease_s``, moving it takes ``transfer_s``, and workers wait for each other
    for ``wait_s``. ``drops_query``: what decode workers post to the metaserver comes without its URL's query.
    """

    roles: tuple[str, ...]
    transfers: tuple[tuple[str, str], ...]
    lease_s: float
    transfer_s: float
    wait_s: float
    drops_query: bool = False


@dataclass(frozen=True)
class Scenario:
    """A world and what happens in it. ``settings`` is a configuration but for its workers.

    ``workers``: slots, KV capacity (None: unknown), group of each, and ranks behind it (0: it has none).
    ``parted``: how prefill and decode are apart, None where each worker does both.
    """

    seed: int
    settings: dict[str, dict[str, object]]
    workers: tuple[tuple[int, int | None, str, int], ...]
    actions: tuple[Action, ...] = field(default=())
    parted: Parted | None = None

    @property
    def ends_s(self) -> float:
        """When the last action begins and all trouble is over."""
        ends = [a.at_s + (a.lasts_s if isinstance(a, Trouble) else 0.0) for a in self.actions]
        return max(ends, default=0.0)


def describe(value: object) -> str:
    """Return an action as Python would write it, without what is as usual."""
    if isinstance(value, tuple):
        return "(" + "".join(f"{describe(one)}, " for one in value).rstrip(" ") + ")"
    if not isinstance(value, Answer | Ask | Visit | Trouble):
        return repr(value)
    said = []
    for one in fields(value):
        content = getattr(value, one.name)
        if content != one.default:
            said.append(f"{one.name}={describe(content)}")
    return f"{type(value).__name__}({', '.join(said)})"
