"""The real proxy in a simulated world: virtual time, connections in memory, seeded clients and workers.

``python -m tests.simulation --seed N`` runs one scenario, ``--seeds K`` so many from there on, ``--hours H``
until so many hours have been simulated. A promise that is not held ends with the seed, a shrunk script and
the command that repeats it. The same seed is the same run, byte for byte.

What is simulated: ``loop`` (time), ``network`` and ``transport`` (connections), ``workers`` and ``clients``
(scripts), ``pages`` (what workers answer to the proxy itself), ``members`` and ``regroup`` (workers and
groups that come and go), ``scenario`` (a seed's script, made of ``actions``), ``messages`` (its bytes),
``outside`` (all else that would differ from run to run). What is not: handlers, relay, pools, ledger,
dispatcher, health checks and aiohttp's server are the real ones, started by ``app.running_proxy``. ``world``
runs one scenario, ``checks`` looks into the proxy, ``shrink`` makes scripts short.

``--parted`` has other workers prefill than decode (``parted_scenario``): ``leg_workers``, of which
``prefill_workers`` and ``decode_workers`` are, speak the five transfers with what they say to the
``metaserver``, ``kv`` is who keeps what for whom, and ``leg_checks`` looks at what becomes of both legs.

Promises, with the check that holds each. Behind every event of the loop:

* ``books``: columns are of equal length, what is booked on the rows of a worker is its load, in tokens and
  in requests (GroupChecks._check_books).
* ``ends-once``: every request that came in is in the ledger or has ended, once (GroupChecks.check).
* ``places``: who waits has a place or goes first, each once, of whatever batch (GroupChecks._check_ends).
* ``round-due``: while anybody waits, a decision round is due (GroupChecks.check).
* ``limits``: nobody is over a limit: requests at once, requests that wait, slots, idle connections, bodies
  (GroupChecks.check, _check_books, _check_pool; Checks.check).
* ``bounded-buffers``: for a client that does not read, little waits (Checks._check_proxy).
* ``one-owner``: a connection in the pool is there once, and nobody uses it (GroupChecks._check_pool).
* ``no-exception``: nothing reaches the loop's exception handler, no task fails unseen, nothing is logged as
  an error (Checks.complain).

By clients and workers, whenever something has come:

* ``same-request``: a worker gets a client's body as it was sent (Worker._compare).
* ``own-rank``: a worker with several ranks is told which one, by the proxy and never by a client, and no
  other is told one (Worker._see_rank).
* ``own-batch``: no worker is told which batch a request is of (Worker._serve_one).
* ``own-answer``: nobody gets another's answer, nor another status than the worker's (Client._attempt).
* ``same-bytes``: what a client gets is what one worker sent for one attempt, or a beginning of it and then an
  error event at most: no byte twice, none out of order (Client._judge_prefix).
* ``no-whole-cut``: what was cut does not look whole (Client._judge_whole).
* ``answered``: who has done nothing wrong is answered, and gets all that was sent (Client._judge_partial).
* ``well-formed``: what comes is HTTP (Client._answer).
* ``no-500``: the proxy does not fail (Client._judge_own).
* ``bounded-reads``: of what it asks itself the proxy reads so much and no more (Worker._send_for_ever).
* ``deliveries``: a request comes to workers once, once more for each retry, and once more for a kept
  connection that was closed (World._count_deliveries).

* ``moves-on``: what a worker that is out has not even read goes to another (Members.stuck).
* ``runs``: what a worker may have worked on goes to one more at most (World._count_deliveries).
* ``retries``: whoever is refused is tried elsewhere, and nobody is tried for ever (World._count_deliveries).

Where prefill and decode are apart:

* ``own-leg``: either leg is what it must be: a prefill makes one token and no stream, and what was prefilled
  is fetched, once, and from nobody who has been out for some time; nothing is prefilled again that can be
  fetched (PrefillWorker._see_leg, PrefillWorker._see_need, DecodeWorker._see_handles).
  Apart from that both are what the client sent, under one id, and without its own handles (``same-request``).
* ``own-answer``: what a prefill gives is nobody's answer, but for an error (Client._attempt).
* ``lease``: nothing is to be fetched when its lease has ended long since (DecodeWorker._see_handles).
* ``both-end``: nobody works on for who has left (LegChecks.look_at_work).
* ``freed``: what a request leaves behind is freed, and not only at the end of its lease; a prefill whose
  client leaves is waited for, as only its answer says how (LegChecks.look).
* ``answered``: posts to the metaserver are, each with the status that it deserves (Posts._post).
* ``deliveries``: of each leg; ``runs``: of both together (LegChecks.count); ``nothing-left``: no name that is
  waited for, and nothing to be freed (LegChecks.idle).

Once all trouble is over:

* ``ends``: every visit ends within bounded time, and time passes (World._all_end, VirtualLoop).
* ``returns-to-zero``: without requests nothing is booked, waits, is counted or is watched, and with no other
  load no worker is seen to have any (Checks.idle).
* ``nothing-left``: no connection, task or timer of a request is left, nor a group that was removed; after the
  proxy's end nothing at all (Checks.idle, Checks.closed).
* ``serves-again``: a request to each group is served by the first worker that gets it (World._probe).
"""
