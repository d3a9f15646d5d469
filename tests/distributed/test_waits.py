"""Seconds that a rank spends in collectives."""

from types import SimpleNamespace

import pytest

from partialfc.distributed import ranks


class _Event:
    """Of a GPU that is ``behind`` collectives behind the host."""

    behind, recorded = 3, 0

    def record(self):
        _Event.recorded += 1
        self.at = _Event.recorded

    def query(self):
        return self.at <= _Event.recorded - 2 * _Event.behind

    def elapsed_time(self, other):
        return 1.0  # ms


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(ranks, "_event", _Event)
    monkeypatch.setattr(ranks, "_seconds", {})
    monkeypatch.setattr(_Event, "recorded", 0)
    yield SimpleNamespace(is_cuda=True)
    ranks._on_device.clear()


def test_no_collective_of_a_gpu_is_forgotten_between_two_looks(gpu):
    """It kept the last 4,096: of ten thousand between two records, more than half were lost."""
    kept = 0
    for _ in range(10_000):
        with ranks._timed("all_gather", gpu):
            pass
        kept = max(kept, len(ranks._on_device))
    assert ranks.wait_seconds()["all_gather"] == pytest.approx(10.0, abs=0.01)
    assert kept <= _Event.behind + 1
