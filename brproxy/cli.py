"""The ``brproxy`` command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from brproxy.app import serve as serve_until_stopped
from brproxy.build import endpoint_settings, reach_of
from brproxy.command import USAGE_ERROR, make_command, run_command
from brproxy.config import Config, load_config
from brproxy.config_reference import reference_table
from brproxy.config_workers import Worker
from brproxy.discovery import find_out
from brproxy.engines.dialect import make_dialect
from brproxy.findings import Finding, contradictions, told
from brproxy.logs import configure_logging
from brproxy.proxy.asking import Verdict, probe
from brproxy.proxy.rank_check import RankCheck
from brproxy.relay.endpoint import Endpoint
from brproxy.starting import finding_line, found_at, of_urls, refuse_to_overwrite, write_first_file
from brproxy.types import InvalidInputError
from brproxy.workers_command import workers_command

app = make_command("brproxy", "A load balancer for barrier-synchronised data-parallel LLM serving.")

app.add_typer(workers_command, name="workers")

_GENERATION_S = 15.0
"""For one token of a worker that may be busy (seconds)."""

ConfigFile = Annotated[Path, typer.Option("--config", help="TOML configuration file.", show_default=False)]
Urls = Annotated[
    list[str] | None,
    typer.Argument(metavar="[URL]...", help='Workers, as "http://host:port".', show_default=False),
]


@app.command()
def serve(
    urls: Urls = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML configuration file.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="TCP port, not the file's or 8080; 0: a free one.")
    ] = None,
) -> None:
    """Run the proxy until SIGTERM or Ctrl-C, for a file's workers or those named; SIGHUP reads it again."""
    if (config is None) == (not urls):
        msg = "serve needs either --config FILE or the URLs of workers, and not both"
        raise InvalidInputError(msg)
    settings = load_config(config) if config is not None else of_urls(urls or ())
    configure_logging(settings.log.level, settings.log.format)
    uvloop.run(_serve(settings, port, config))


async def _serve(settings: Config, port: int | None, path: Path | None) -> None:
    if path is None:
        settings = await found_at(settings)
    if port is not None:
        settings = settings.model_copy(update={"listen": settings.listen.model_copy(update={"port": port})})
    await serve_until_stopped(settings, path)


@app.command()
def init(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help='Workers, as "http://host:port".')],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("brproxy.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Ask workers who they are and write the configuration; exit code 2 if any is left out."""
    settings = of_urls(urls)
    refuse_to_overwrite(out, force=force)
    findings = list(asyncio.run(find_out(settings)).values())
    for finding in findings:
        typer.echo(finding_line(finding))
    write_first_file(out, findings, force=force)
    typer.echo(f"{out}: written; next: brproxy check --config {out}, brproxy serve --config {out}")
    if any(finding.identity is None for finding in findings):
        raise typer.Exit(USAGE_ERROR)


@app.command()
def check(config: ConfigFile) -> None:
    """Validate the configuration and ask each worker, a line each; exit code 2 if any does not answer.

    Lines that begin with "!" are what the file and a worker contradict each other in.
    """
    settings = load_config(config)
    groups = ", ".join(f"{name} ({size})" for name, size in settings.group_sizes.items())
    typer.echo(f"{config}: valid; policy {settings.routing.policy}; workers by group: {groups}")
    if not asyncio.run(_probe_all(settings)):
        raise typer.Exit(USAGE_ERROR)


@app.command()
def reference() -> None:
    """Print every configuration key with its default and meaning, as a Markdown table."""
    typer.echo(reference_table())


async def _probe_all(config: Config) -> bool:
    """Print a line for each worker; return whether all answered."""
    settings = endpoint_settings(config)
    endpoints = [Endpoint(worker.url, settings, reach_of(worker)) for worker in config.worker]
    try:
        findings = await find_out(config)
        results = await asyncio.gather(
            *(
                _check_worker(endpoint, config, worker, findings[worker.url])
                for endpoint, worker in zip(endpoints, config.worker, strict=True)
            )
        )
    finally:
        for endpoint in endpoints:
            endpoint.close()
    return all(results)


async def _check_worker(endpoint: Endpoint, config: Config, worker: Worker, finding: Finding) -> bool:
    name, identity = f"worker {worker.label} [{worker.group}]", finding.identity
    ok, words = await _probe(endpoint, config, worker)
    if not ok:
        typer.echo(f"{name}: {words}")
        return False
    typer.echo(f"{name}: {words}; {told(worker, identity) if identity is not None else finding.failure}")
    for line in contradictions(worker, identity) if identity is not None else ():
        typer.echo(f"! {name}: {line}")
    return await _check_ranks(endpoint, config, worker, identity.names if identity is not None else ())


async def _probe(endpoint: Endpoint, config: Config, worker: Worker) -> tuple[bool, str]:
    """Return whether the worker is well, and what to say of that."""
    path = config.health.path or make_dialect(worker.engine).HEALTH_PATH
    started_s = time.perf_counter()
    result = await probe(endpoint, path, config.health.timeout_s)
    duration_ms = (time.perf_counter() - started_s) * 1000
    if result.verdict is not Verdict.OK:
        return False, f"{result.verdict.value.upper()}: {result.reason}"
    return True, f"ok, {duration_ms:.0f} ms"


async def _check_ranks(endpoint: Endpoint, config: Config, worker: Worker, names: Sequence[str]) -> bool:
    """Print what the server means by a rank's number; ``names`` are the models that it lists."""
    if not worker.ranks:
        return True
    model = min(worker.models, default=names[0] if names else "")
    ranks = RankCheck(model, _GENERATION_S, config.limits.control_bytes_max)
    verdict = await ranks.check(endpoint, worker.rank_guess)
    typer.echo(f"worker {worker.label} [{worker.group}]: {'' if verdict.ok else 'FAILED: '}{verdict.text}")
    return verdict.ok


def main() -> None:
    """Run the command."""
    run_command(app, "brproxy")
