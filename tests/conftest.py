"""What all tests need of the process that runs them."""

import os
import signal
from contextlib import suppress

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side

import pytest

from tests.support.places import FIXTURES

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)

with suppress(ModuleNotFoundError):  # a GPU machine's image may lack it
    import hypothesis

    # How long an example takes says what else the machine does.
    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
    hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def packs(tmp_path_factory):
    """Real handwriting: 40 identities to train on, 6 characters held out."""
    from tools import omniglot  # it needs packages that the tests of kernels do without

    folder = tmp_path_factory.mktemp("packs")
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "16", "--held-out", "6", "--pairs", "100", "--size", "32"]
    assert omniglot.main([str(archive), str(folder), *size]) == 0
    return folder
