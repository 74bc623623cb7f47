"""``brproxy workers``: the admin API of a running proxy, from the command line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from http import HTTPMethod, HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from brproxy.admin import PATIENCE_S, read_token
from brproxy.config import load_config
from brproxy.config_sections import Admin
from brproxy.origins import read_origin
from brproxy.types import BrproxyError, InvalidInputError

_ANSWER_BYTES_MAX = 64 << 20
_RELOAD_S = 60.0
"""For an answer (seconds): a file of thousands of workers takes a while to read."""

_WORDS = ("group", "name", "url", "state", "health")
_NUMBERS = ("requests", "slots", "kv_tokens", "kv_capacity_tokens")
_OF_GROUPS = ("group", "state")
_GROUP_NUMBERS = ("workers", "requests", "waiting")

Keys = tuple[str, ...]
"""Names of columns, as the API has them."""

workers_command = typer.Typer(
    help="List, add, drain, resume and remove the workers of a running proxy, over its admin API.",
    no_args_is_help=True,
)

_Config = Annotated[
    Path | None,
    typer.Option("--config", help="The proxy's file: says where its admin API is.", show_default=False),
]
_Url = Annotated[
    str,
    typer.Option("--url", help='Where the admin API is instead, as "http://host:port".', show_default=False),
]
_TokenFile = Annotated[
    str, typer.Option("--token-file", help="File that has the token, for --url.", show_default=False)
]
_Name = Annotated[str, typer.Argument(help="The worker's name, as `list` shows it.", show_default=False)]


class AdminApiError(BrproxyError):
    """The admin API cannot be reached, or refuses."""


class AdminClient:
    """Asks the admin API of one proxy; raises InvalidInputError if it is not said which."""

    def __init__(self, config: Path | None, url: str, token_file: str) -> None:
        if (config is None) == (not url):
            msg = "either --config FILE or --url URL says where the admin API is"
            raise InvalidInputError(msg)
        if config is None:
            admin = Admin(token_file=token_file)
        else:
            admin = load_config(config).admin
            if not admin.enabled:
                msg = f"{config}: admin.enabled: is false; it must be true for the proxy to have an admin API"
                raise InvalidInputError(msg)
            host = f"[{admin.host}]" if ":" in admin.host else admin.host
            url = f"http://{host}:{admin.port}"
        self._origin = read_origin(url)
        if self._origin.scheme != "http":
            msg = f"--url: {url!r} must begin with http://; the admin API speaks no HTTPS"
            raise InvalidInputError(msg)
        token = read_token(admin)
        self._fields = {"Authorization": f"Bearer {token}"} if token else {}

    def ask(self, method: HTTPMethod, path: str, document: dict[str, Any] | None = None) -> Any:
        """Return the answer's JSON; raises AdminApiError, a line for each mistake."""
        connection = HTTPConnection(self._origin.host, self._origin.port, timeout=_RELOAD_S + PATIENCE_S)
        try:
            body = None if document is None else json.dumps(document, default=str)
            connection.request(method, f"/admin/{path}", body, self._fields)
            answer = connection.getresponse()
            content = json.loads(answer.read(_ANSWER_BYTES_MAX))
        except (OSError, HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            msg = f"{self._origin.url}: the admin API cannot be reached: {reason}"
            raise AdminApiError(msg) from error
        except ValueError as error:
            msg = f"{self._origin.url}: what answers is no admin API: its answer is no JSON"
            raise AdminApiError(msg) from error
        finally:
            connection.close()
        if answer.status >= HTTPStatus.BAD_REQUEST:
            raise AdminApiError("\n".join(_mistakes(content)))
        return content

    def change(self, name: str, method: HTTPMethod, verb: str = "") -> None:
        """Have something done to a worker, and say what it is then."""
        for row in self.ask(method, f"workers/{quote(name, safe='')}{verb}")["workers"]:
            left = f", with {row['requests']} requests" if row["requests"] else ""
            typer.echo(f"worker {row['name']} [{row['group']}]: {row['state']}{left}")


def _mistakes(content: Any) -> list[str]:
    """Return what a refusal says, a line each."""
    try:
        return [str(line) for line in content.get("mistakes") or [content["error"]["message"]]]
    except (AttributeError, KeyError, TypeError):
        return ["the admin API refuses, and does not say why"]


@workers_command.command("list")
def list_workers(config: _Config = None, url: _Url = "", token_file: _TokenFile = "") -> None:
    """List the workers (state, health, and what is booked for each), and the groups that they are in."""
    answer = AdminClient(config, url, token_file).ask(HTTPMethod.GET, "workers")
    workers = [
        row | {"reason": "" if row["health"] == "healthy" else row["reason"]} for row in answer["workers"]
    ]
    groups = [
        row | {"group": row["name"], "models": ", ".join(row["models"]) or "any"} for row in answer["groups"]
    ]
    for line in _table(workers, _WORDS, _NUMBERS, "reason"):
        typer.echo(line)
    typer.echo("")
    for line in _table(groups, _OF_GROUPS, _GROUP_NUMBERS, "models"):
        typer.echo(line)


def _table(rows: list[dict[str, Any]], words: Keys, numbers: Keys, last: str) -> Iterator[str]:
    """Yield a line for the names of the columns and one for each row; numbers stand to the right."""
    lines = [{key: key.removesuffix("_tokens") for key in (*words, *numbers)}]
    lines += [{key: "-" if row[key] is None else str(row[key]) for key in lines[0]} for row in rows]
    width = {key: max(len(line[key]) for line in lines) for key in lines[0]}
    for line, row in zip(lines, [{last: last}, *rows], strict=True):
        cells = [line[key].ljust(width[key]) for key in words]
        cells += [line[key].rjust(width[key]) for key in numbers]
        yield "  ".join([*cells, row[last]]).rstrip()


@workers_command.command()
def add(
    worker: Annotated[str, typer.Argument(help="Where it listens.", show_default=False)],
    keys: Annotated[
        list[str] | None, typer.Argument(help="As in its table: slots=256 name=dp-3.", show_default=False)
    ] = None,
    config: _Config = None,
    url: _Url = "",
    token_file: _TokenFile = "",
) -> None:
    """Add a worker to a group; it gets requests after its first successful check."""
    document = {"url": worker} | dict(_key_and_value(text) for text in keys or [])
    for row in AdminClient(config, url, token_file).ask(HTTPMethod.POST, "workers", document)["workers"]:
        typer.echo(f"worker {row['name']} [{row['group']}]: added")


def _key_and_value(text: str) -> tuple[str, Any]:
    """Read ``key=value``, the value as TOML has it or, without its quotes, as a shell leaves it."""
    key, found, value = text.partition("=")
    if not found:
        msg = f"{text!r} must be like key=value, with a key of a [[worker]] table"
        raise InvalidInputError(msg)
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return key.strip(), value.strip()


@workers_command.command()
def drain(name: _Name, config: _Config = None, url: _Url = "", token_file: _TokenFile = "") -> None:
    """Have a worker take no new requests; it finishes what it has, and stays until resumed or removed."""
    AdminClient(config, url, token_file).change(name, HTTPMethod.POST, "/drain")


@workers_command.command()
def resume(name: _Name, config: _Config = None, url: _Url = "", token_file: _TokenFile = "") -> None:
    """Have a worker that drains take requests again."""
    AdminClient(config, url, token_file).change(name, HTTPMethod.POST, "/resume")


@workers_command.command()
def remove(name: _Name, config: _Config = None, url: _Url = "", token_file: _TokenFile = "") -> None:
    """Have a worker drain and go with its last request; the file's own comes back with the next reload."""
    AdminClient(config, url, token_file).change(name, HTTPMethod.DELETE)


@workers_command.command()
def reload(config: _Config = None, url: _Url = "", token_file: _TokenFile = "") -> None:
    """Have the proxy read its configuration file again, and say what changed, a line each."""
    answer = AdminClient(config, url, token_file).ask(HTTPMethod.POST, "reload")
    for change in answer["changes"] or ["no worker changes"]:
        typer.echo(change)
    for key in answer["taken_up"]:
        typer.echo(f"{key} changed")
    for key in answer["needs_restart"]:
        typer.echo(f"{key} changed, which needs a restart")
    for name in answer["kept"]:
        typer.echo(f"{name} was added by the admin API and is kept")
