"""What engines say of themselves, as their pages have it, and small servers that say it."""

import asyncio
import json
from contextlib import asynccontextmanager

MODEL = "deepseek-ai/DeepSeek-V3.2"
LORA = "sql"


def models(owner, *names, adapters=(), length=131_072):
    entries = [{"id": name, "owned_by": owner, "parent": None, "max_model_len": length} for name in names]
    entries += [{"id": name, "owned_by": owner, "parent": names[0]} for name in adapters]
    return json.dumps({"object": "list", "data": entries}).encode()


# The labels that vLLM 0.33 has there: the line is longer than any other of its page.
CACHE_LABELS = {
    "block_size": "32",
    "user_specified_block_size": "True",
    "gpu_memory_utilization": "0.9",
    "cache_dtype": "auto",
    "is_attention_free": "False",
    "num_gpu_blocks_override": "None",
    "sliding_window": "None",
    "enable_prefix_caching": "True",
    "prefix_caching_hash_algo": "sha256",
    "kv_cache_dtype_skip_layers": "[]",
    "calculate_kv_scales": "False",
    "cpu_kvcache_space_bytes": "None",
    "mamba_page_size_padded": "None",
    "mamba_block_size": "None",
    "user_specified_mamba_block_size": "False",
    "mamba_cache_dtype": "auto",
    "mamba_ssm_cache_dtype": "auto",
    "mamba_cache_mode": "none",
    "mamba_num_attention_pages": "None",
    "num_cpu_blocks": "None",
    "kv_sharing_fast_prefill": "False",
    "kv_cache_memory_bytes": "None",
    "kv_offloading_size": "None",
    "kv_offloading_backend": "native",
    "kv_cache_max_concurrency": "7.03125",
    "hash_block_size": "None",
    "skip_hash_warmup": "False",
    "enable_mamba_cache_stochastic_rounding": "False",
    "mamba_cache_philox_rounds": "0",
}


def cache_config(**labels):
    """Return a page with the KV cache of each rank; a label may be a list with one for each of them."""
    ranks = labels.pop("engine", ["0"])
    lines = ["# TYPE vllm:cache_config_info gauge"]
    for place, rank in enumerate(ranks):
        own = {key: value[place] if isinstance(value, list) else value for key, value in labels.items()}
        shown = CACHE_LABELS | own | {"engine": rank}
        joined = ",".join(f'{key}="{value}"' for key, value in sorted(shown.items()))
        lines.append(f"vllm:cache_config_info{{{joined}}} 1.0")
    return "\n".join([*lines, 'vllm:num_requests_running{engine="0"} 0.0', ""]).encode()


VLLM = {
    "/version": b'{"version":"0.33.0"}',
    "/v1/models": models("vllm", MODEL, adapters=[LORA]),
    "/metrics": cache_config(kv_cache_size_tokens="921600", num_gpu_blocks="28800"),
    "/health": b"",
}


def server_info(**members):
    info = {
        "model_path": "/models/x",
        "served_model_name": MODEL,
        "dp_size": 1,
        "enable_dp_attention": False,
        "disaggregation_mode": "null",
        "max_running_requests": None,
        "max_total_num_tokens": 450_000,
        "api_key": "secret",
        "internal_states": [
            {"effective_max_running_requests_per_dp": 256, "memory_usage": {"token_capacity": 440_000}}
        ],
        "version": "0.5.23",
    }
    return json.dumps(info | members).encode()


def loads(*ranks):
    rows = [
        {"dp_rank": rank, "max_running_requests": slots, "max_total_num_tokens": kv_tokens}
        for rank, slots, kv_tokens in ranks
    ]
    return json.dumps({"version": "0.5.23", "loads": rows}).encode()


SGLANG = {
    "/v1/models": models("sglang", MODEL),
    "/server_info": server_info(),
    "/v1/loads": loads((0, 256, 440_000)),
    "/health": b"",
}
OPENAI = {"/v1/models": models("somebody", MODEL), "/health": b""}


class PageServer:
    """Answers GET with pages, 404 without; notes what was asked for.

    ``silent`` paths are never answered; to those of ``faults`` it writes these bytes and breaks off.
    """

    def __init__(self, pages, *, status=404, silent=(), faults=None):
        self.pages = pages
        self.faults = faults or {}
        self.status = status
        self.silent = silent
        self.asked = []
        self.heads = []
        self.url = ""

    async def handle(self, reader, writer):
        try:
            while True:
                if await reader.readexactly(1) != b"G":
                    # As servers do with what is no HTTP, TLS above all.
                    writer.write(b"HTTP/1.1 400 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    break
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ")[1].decode()
                self.asked.append(path)
                self.heads.append(head)
                if path in self.silent:
                    await reader.read()
                    break
                if path in self.faults:
                    writer.write(self.faults[path])
                    break
                body = self.pages.get(path)
                status = f"{self.status} No" if body is None else "200 OK"
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body or b'')}\r\n\r\n".encode())
                writer.write(body or b"")
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(pages, *, tls=None, **settings):
    """Serve ``pages`` for as long as the block runs, over TLS where a context is given."""
    engine = PageServer(pages, **settings)
    server = await asyncio.start_server(engine.handle, "127.0.0.1", 0, ssl=tls)
    scheme = "http" if tls is None else "https"
    engine.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()
