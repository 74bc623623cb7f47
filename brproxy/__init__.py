"""brproxy: a load balancer for barrier-synchronised data-parallel LLM serving."""

from importlib.metadata import version

__version__ = version("brproxy")
