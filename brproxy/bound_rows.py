"""The requests that are bound in one barrier group, a row of numbers for each, for forecasts. Pure.

Rows have no holes (ending one moves the last into its place), so that forecasting over thousands of requests
is array arithmetic. The ledger writes them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from brproxy.lifecycle import Entry, LifecycleError
from brproxy.prediction.predictor import ActiveRequests
from brproxy.roster import Roster
from brproxy.routing.view import IntArray
from brproxy.types import RequestId

ID, WORKER, KV_TOKENS, OUTPUT_TOKENS, SEQUENCES, CURVE, LENGTH_MAX, CERTAIN = range(8)
"""What a row holds, by position."""
WIDTH = 8


class BoundRows:
    """The rows of requests bound to the workers of ``roster``; a ledger is one."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        # Rows whose sequences are not one, sums apart: mostly there are none.
        self._unusual_rows = 0
        self._entries: dict[RequestId, Entry] = {}
        # The entry of a request that is bound, or None. No method of its own: each request asks for it.
        self.find: Callable[[RequestId], Entry | None] = self._entries.get
        self._rows: list[Entry] = []
        # A row for each bound request, one behind the other: coming and going, which each request does, is
        # then two calls, where a column for each number would be sixteen.
        self._cells = array("q")

    @property
    def bound(self) -> int:
        """Requests bound to a worker."""
        return len(self._rows)

    def entry(self, request_id: RequestId) -> Entry:
        """Return a bound request's entry; raises LifecycleError for any other."""
        try:
            return self._entries[request_id]
        except KeyError:
            msg = f"request {request_id} is not bound: it waits, has ended or never arrived"
            raise LifecycleError(msg) from None

    def active(self) -> ActiveRequests:
        """Return the bound requests as arrays (copies); workers are by place, which is their index mostly."""
        # Transposed, so that each column is in one piece.
        columns = self._table().T.copy()
        worker, output_tokens, sequences = columns[WORKER], columns[OUTPUT_TOKENS], None
        if self._unusual_rows:
            sequences = columns[SEQUENCES]
            output_tokens //= np.maximum(sequences, 1)
        place = self.roster.place
        return ActiveRequests(
            worker=worker if place is None else place[worker],
            kv_tokens=columns[KV_TOKENS],
            output_tokens=output_tokens,
            curve=columns[CURVE],
            length_max=columns[LENGTH_MAX],
            certain=columns[CERTAIN].astype(bool),
            sequences=sequences,
        )

    def row_sequences(self, row: int) -> int:
        """Return the sequences of the request in ``row``, in the order of ``active``."""
        return self._cells[row * WIDTH + SEQUENCES]

    def row_ids(self) -> IntArray:
        """Return the ids of the bound requests in the order of ``active`` and ``grow_rows``, int64[N]."""
        return self._table()[:, ID].copy()

    def streamed(self, entries: Sequence[Entry]) -> IntArray:
        """Return how many tokens each sequence of bound requests has streamed, int64[N]."""
        rows = self._table()[[entry.row for entry in entries]]
        streamed: IntArray = rows[:, OUTPUT_TOKENS] // np.maximum(rows[:, SEQUENCES], 1)
        return streamed

    def _table(self) -> IntArray:
        """Return all rows, int64[N, 8]: not to be kept, as nothing can be bound while it is there."""
        return np.frombuffer(self._cells, dtype=np.int64).reshape(-1, WIDTH)
