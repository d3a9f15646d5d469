"""Gives every Python that finds this folder on ``PYTHONPATH`` a simulated CUDA device.

Python imports a module of this name by itself, before anything else.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from tests.simulated_gpu.library import unable

if reason := unable():
    print(f"no simulated GPU: {reason}", file=sys.stderr)
else:
    try:
        from tests.simulated_gpu.device import install

        install()
    except Exception as error:  # Python would go on without it
        raise SystemExit(f"no simulated GPU: {error!r}") from error
