"""The ``brproxy`` command."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from brproxy.app import serve as serve_until_stopped
from brproxy.build import endpoint_settings
from brproxy.command import USAGE_ERROR, make_command, run_command
from brproxy.config import Config, load_config
from brproxy.config_reference import reference_table
from brproxy.config_workers import Worker
from brproxy.engines.dialect import make_dialect
from brproxy.logs import configure_logging
from brproxy.proxy.asking import Question, Verdict, ask, probe
from brproxy.proxy.models import listed_models
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError
from brproxy.workers_command import workers_command

app = make_command("brproxy", "A load balancer for barrier-synchronised data-parallel LLM serving.")

app.add_typer(workers_command, name="workers")

ConfigFile = Annotated[Path, typer.Option("--config", help="TOML configuration file.", show_default=False)]


@app.command()
def serve(config: ConfigFile) -> None:
    """Run the proxy until SIGTERM or Ctrl-C; SIGHUP has it read the file again."""
    settings = load_config(config)
    configure_logging(settings.log.level, settings.log.format)
    uvloop.run(serve_until_stopped(settings, config))


@app.command()
def check(config: ConfigFile) -> None:
    """Validate the configuration and probe each worker, a line each; exit code 2 if any does not answer."""
    settings = load_config(config)
    groups = ", ".join(f"{name} ({len(workers)})" for name, workers in settings.groups.items())
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
    endpoints = [Endpoint(worker.url, settings) for worker in config.worker]
    try:
        results = await asyncio.gather(
            *(
                _probe(endpoint, config, worker)
                for endpoint, worker in zip(endpoints, config.worker, strict=True)
            )
        )
    finally:
        for endpoint in endpoints:
            endpoint.close()
    return all(results)


async def _probe(endpoint: Endpoint, config: Config, worker: Worker) -> bool:
    dialect = make_dialect(worker.engine)
    path, timeout_s = config.health.path or dialect.HEALTH_PATH, config.health.timeout_s
    started_s = time.perf_counter()
    result = await probe(endpoint, path, timeout_s)
    duration_ms = (time.perf_counter() - started_s) * 1000
    if result.verdict is not Verdict.OK:
        typer.echo(f"worker {worker.label} [{worker.group}]: {result.verdict.value.upper()}: {result.reason}")
        return False
    question = Question(dialect.MODELS_PATH, timeout_s, config.limits.control_bytes_max)
    models = await _models(endpoint, question)
    missing = sorted(worker.models - set(models)) if models else []
    note = f"; configured but not served: {', '.join(missing)}" if missing else ""
    served = ", ".join(models) or "none reported"
    typer.echo(f"worker {worker.label} [{worker.group}]: ok, {duration_ms:.0f} ms; models: {served}{note}")
    return True


async def _models(endpoint: Endpoint, question: Question) -> list[str]:
    try:
        return list(listed_models(await ask(endpoint, question), question.bytes_max) or ())
    except WorkerFailedError:
        return []


def main() -> None:
    """Run the command."""
    run_command(app, "brproxy")
