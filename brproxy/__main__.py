"""``python -m brproxy`` is the ``brproxy`` command."""

from brproxy.cli import main

main()
