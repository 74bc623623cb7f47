"""What a simulated worker answers to the proxy itself: its load, and how long a prompt is. Pure."""

from __future__ import annotations

KV_CAPACITY_TOKENS = 1 << 30
"""What a worker holds where its scenario says nothing."""

_LOAD_PAGE = b"""# HELP vllm:kv_cache_usage_perc KV-cache usage
vllm:kv_cache_usage_perc{engine="0"} %b
vllm:cache_config_info{engine="0",kv_cache_size_tokens="%d"} 1.0
vllm:num_requests_running{engine="0"} %d
vllm:num_requests_waiting{engine="0"} %d
vllm:num_preemptions_total{engine="0"} 0.0
"""
_USAGES = (b"NaN", b"-3", b"1e308", b"", b"1.0", b"0.5", b"+Inf", b"\xff\x00")
_COUNTS = (
    *((b"200 OK", b""), (b"200 OK", b""), (b"200 OK", b'{"count":18446744073709551616}')),
    *((b"200 OK", b'{"count":-1}'), (b"400 Bad Request", b"{}"), (b"200 OK", b'{"count":0}')),
    *((b"500 Broken", b"no"), (b"404 Not Found", b"{}"), (b"200 OK", b"\xff\x00")),
)
"""Status and body, b"" for a true one."""
_COUNTS_LATE_S = (0.0, 0.0, 0.2, 0.0, 0.7, 0.0, 1.5)


class Pages:
    """The pages of one worker. ``load``: how that of its load is wrong, see Trouble; "none": it is not."""

    def __init__(self) -> None:
        self.load = "none"
        self.kv_capacity_tokens = KV_CAPACITY_TOKENS
        self._loads = self._counts = 0

    def load_page(self) -> bytes:
        """Return the answer to who asks for the load: none of it is what came through the proxy."""
        if self.load == "load-missing":
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        self._loads += 1
        usage, capacity = b"0.0", self.kv_capacity_tokens
        if self.load == "load-foreign":
            usage = b"0.9"
        elif self.load == "load-garbage":
            usage, capacity = _USAGES[self._loads % len(_USAGES)], self._loads % 3 * (1 << 40)
        page = _LOAD_PAGE % (usage, capacity, self._loads, self._loads % 2)
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page)

    def count(self, body_bytes: int) -> tuple[float, bytes]:
        """Return after how many seconds to answer who asks for a prompt's size, and what: mostly some number.

        At times it is late, or nonsense.
        """
        self._counts += 1
        status, answer = _COUNTS[self._counts % len(_COUNTS)]
        answer = answer or b'{"count":%d,"max_model_len":4096,"tokens":[]}' % (body_bytes // 5)
        late_s = _COUNTS_LATE_S[self._counts % len(_COUNTS_LATE_S)]
        return late_s, b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(answer), answer)
