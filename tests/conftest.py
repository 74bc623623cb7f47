"""What all tests share: ports that nobody else takes, and drawn examples that may take their time."""

import random
import socket
import sys

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine only.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# For a run beside a whole one, with other versions: --hypothesis-profile=brief.
settings.register_profile("brief", settings.get_profile("patient"), max_examples=25)

REAL_ENGINES = {
    "--real-vllm": "vLLM",
    "--real-ranks": "vLLM with --data-parallel-size 2",
    "--real-prefill": "vLLM that prefills",
    "--real-decode": "vLLM that decodes for it",
    "--real-sglang": "SGLang",
}


def pytest_addoption(parser):
    for option, engine in REAL_ENGINES.items():
        parser.addoption(
            option, metavar="URL", help=f"where a real {engine} listens: tests/real_engines use it"
        )
    parser.addoption(
        "--simulation-seeds", metavar="N", type=int, default=1000, help="how many tests/simulation runs"
    )


def pytest_collection_modifyitems(items):
    """Begin with what takes longest in one piece, so that nobody waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_quality.py")


def pytest_ignore_collect(collection_path, config):
    """Leave the tests of real engines out where there is none."""
    here = collection_path.name == "real_engines"
    return True if here and not any(map(config.getoption, REAL_ENGINES)) else None


PORTS = range(20_000, 32_000)
"""Below the ports that systems hand out by themselves, to servers on port 0 and to clients."""

RESERVED_AT = "127.0.0.2" if sys.platform == "linux" else None
"""Another address of this machine, where suites beside each other tell which ports they use."""


@pytest.fixture(scope="session")
def unused_tcp_port_factory():
    """Return a function that returns ports of 127.0.0.1 that nobody uses and no other suite gets meanwhile.

    pytest-asyncio's fixture of this name lets go of a port before the test takes it.
    """
    reserved = []

    def free():
        for port in random.sample(PORTS, len(PORTS)):
            reservation = socket.socket()
            try:
                if RESERVED_AT is not None:
                    reservation.bind((RESERVED_AT, port))
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            except OSError:
                reservation.close()
            else:
                reserved.append(reservation)
                return port
        raise AssertionError("no port is free")

    yield free
    for reservation in reserved:
        reservation.close()


@pytest.fixture
def unused_tcp_port(unused_tcp_port_factory):
    return unused_tcp_port_factory()
