"""When a run is no longer sound."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from partialfc.errors import NonFiniteError, in_words
from partialfc.model.step import Step
from partialfc.records.ledger import Ledger
from partialfc.training import recorder as recorder_module
from partialfc.training.recorder import Recorder
from partialfc.training.run import train
from partialfc.training.stages import Span
from tests.support.models import runtime, settings

WHOLE = Span(last=1000, global_batch=24, steps_per_epoch=100)


def record(tmp_path, compute, steps):
    """Note steps: "." counts, "s" is skipped, "n" has a loss that is not finite."""
    config = settings(
        run={"folder": str(tmp_path)},
        precision={"compute": compute},
        log={"every_steps": 5, "tensorboard": False, "progress": False},
    )
    with Recorder(config, runtime(), 0, WHOLE, 1000, Ledger(None)) as recorder:
        for number, kind in enumerate(steps, 1):
            loss = torch.tensor(torch.inf if kind == "n" else 2.0)
            skipped = torch.tensor(float(kind != "."))
            recorder.stepped(number, Step(loss, loss, skipped, torch.tensor(8.0)), 0.1)


def test_fp16_may_skip_but_not_twenty_times_in_a_row(tmp_path):
    """R12: it looks for its loss scale; what it skipped is counted."""
    record(tmp_path, "fp16", "." + "s" * 19 + "." + "s" * 19)
    assert '"skipped_steps": 38.0' in (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(NonFiniteError, match="20 of them in a row, up to step 25"):
        record(tmp_path, "fp16", "." + "s" * 20 + "....")


@pytest.mark.parametrize(
    ("compute", "steps"), [("fp32", "..s.."), ("bf16", "..s.."), ("fp16", "..n..")]
)
def test_elsewhere_one_step_ends_the_run_at_the_next_record(tmp_path, compute, steps):
    """R12: and nothing of it is recorded."""
    with pytest.raises(NonFiniteError, match="up to step 5"):
        record(tmp_path, compute, steps)
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_the_time_that_a_step_waits_for_data_is_a_metric(tmp_path, monkeypatch):
    """The mean of the steps since the last record, and no other time."""
    clock = [100.0]
    monkeypatch.setattr(recorder_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    log = {"every_steps": 2, "tensorboard": False, "progress": False}
    config = settings(run={"folder": str(tmp_path)}, log=log)
    loss = torch.tensor(2.0)
    with Recorder(config, runtime(), 0, WHOLE, 1000, Ledger(None)) as recorder:
        for step, wait in enumerate((0.03, 0.05, 0.0, 0.0), 1):
            with recorder.waiting():
                clock[0] += wait
            clock[0] += 0.01
            recorder.stepped(step, Step(loss, loss, torch.tensor(0.0), torch.tensor(8.0)), 0.1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    waits = [json.loads(line)["data_wait_seconds"] for line in lines]
    assert waits == pytest.approx([0.04, 0.0])


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_what_the_end_draws_with_is_asked_for_at_the_start(package, tmp_path, monkeypatch):
    """A run of weeks would end in an import that fails."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        train(settings(run={"folder": str(tmp_path / "run")}), runtime())
    assert in_words(caught.value) == f"{package} is not installed: pip install 'partialfc[train]'"
    assert not (tmp_path / "run").exists()
