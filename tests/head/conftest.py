"""What tests of the kernels share."""

import pytest

from tests.support.kernels import DEVICES, Worker


@pytest.fixture(scope="module", params=DEVICES)
def launch(request):
    worker = Worker(request.param)
    yield worker
    worker.close()
