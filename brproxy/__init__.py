"""brproxy: a load balancer for barrier-synchronised data-parallel LLM serving. See ARCHITECTURE.md."""

import os

# A decision multiplies matrices of a few thousand numbers: a second thread costs more than it computes, and
# would take a core from the event loop's neighbours. Has to be said before numpy is imported.
for _library in ("OPENBLAS", "MKL", "OMP"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
