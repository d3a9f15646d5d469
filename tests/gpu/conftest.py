"""On the simulated device, every test here also says whether its streams are in order."""

import pytest

from tests.simulated_gpu import library


@pytest.fixture(autouse=True)
def _in_order():
    if not library.loaded:
        yield
        return
    from tests.simulated_gpu.watch import Watch

    with Watch() as watch:
        yield
    assert not watch.races
