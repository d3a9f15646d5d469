"""The Triton kernels in a process of their own, and what they are compared with.

Triton's interpreter must be chosen before Triton is imported, and the rest of the test process must
not get it. Where there is a GPU they also run on it.

Shape suffixes: B = rows of the gathered batch, C = rows of a shard, P = positives, T = rows of a
tile.
"""

import importlib
import importlib.util
import io
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from partialfc.head.row_set import RowSet
from partialfc.head.rows.stored import RoundingKeys, SgdStep, Stored
from partialfc.head.tiles.positives import Positives
from partialfc.margins import Bend
from tests.support.places import ROOT
from tests.support.processes import WARM

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Worker:
    """A process that runs the launch wrappers, on CPU tensors with the interpreter or on a GPU."""

    def __init__(self, device):
        self.device = device
        self._pool = ProcessPoolExecutor(
            1, mp_context=WARM, initializer=_interpret, initargs=(device == "cpu",)
        )

    def run(self, function, *args):
        return self._pool.submit(function, *args).result()

    def __call__(self, name, **kwargs):
        """Return the result of a wrapper, and its arguments as they are afterwards."""
        return unpack(self.run(_call, name, self.device, pack(kwargs)))

    def close(self):
        self._pool.shutdown()


def _interpret(yes):
    os.environ["TRITON_INTERPRET"] = str(int(yes))


def _call(name, device, packed):
    kwargs = unpack(packed)
    for argument, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            kwargs[argument] = value.to(device)
        elif isinstance(value, Bend):
            kwargs[argument] = Bend(value.threshold_B.to(device), value.coefficient_3.to(device))
    result = kernel(name)(**kwargs)
    return pack((result, kwargs))


def kernel(name):
    if name in ("sgd_", "catch_up_"):
        return {"sgd_": sgd_, "catch_up_": catch_up_}[name]
    return getattr(importlib.import_module("partialfc.head.tiles.triton_steps"), name)


def sgd_(**case):
    """The launch wrapper with the tensors of a case in its groups."""
    positives = (case[name] for name in ("row_P", "row_P", "slope_P", "embedding_BD"))
    rates = (case[name] for name in ("lr", "weight_decay", "momentum"))
    keys = RoundingKeys(case["center_key"], case["momentum_key"])
    importlib.import_module("partialfc.head.rows.kernels").sgd_(
        stored_of(case),
        case["start"],
        case["stop"],
        case["gradient_TD"],
        Positives(*positives),
        case["first_N"],
        SgdStep(*rates, keys, case["skip"]),
    )


def catch_up_(**case):
    """The launch wrapper with the tensors of a case in its groups."""
    keys = RoundingKeys(case["center_key"], case["momentum_key"])
    importlib.import_module("partialfc.head.rows.kernels").catch_up_(
        stored_of(case), case["product_t22"], case["block"], keys
    )


def stored_of(case):
    states = {
        "centers_scale": case["center_scale_C1"],
        "momentum": case["momentum_CD"],
        "momentum_scale": case["momentum_scale_C1"],
        "at_step": case.get("at_step_C1"),
    }
    rows = RowSet.of(
        case["rows_n"], first_row=case["first_row"], compact=case.get("compact", False)
    )
    states = {name: state for name, state in states.items() if state is not None}
    return Stored(case["centers_CD"], states, rows)


def pack(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpack(packed):
    return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)


BENDS = {
    "none": None,
    "filter": (0.0, 0.0, 0.0),
    "curricular": (0.0, 0.3, 1 / 32),
    "mv": (5, 1.2, 0),
}


def bend_of(name, columns):
    """A threshold for each column, and a + b z + c z² above it."""
    if BENDS[name] is None:
        return None
    return Bend(torch.linspace(-5, 12, columns), torch.tensor(BENDS[name], dtype=torch.float32))


def exponential_truth(logit_TB, column, bend, shift_B):
    """Values and sums in fp64; positives [B] or [K, B]."""
    logit_TB = logit_TB.double()
    column_KB = column.view(-1, logit_TB.shape[1])
    is_positive_TB = (torch.arange(len(logit_TB)).view(-1, 1, 1) == column_KB).any(1)
    slope_TB = torch.ones_like(logit_TB)
    if bend is not None:
        constant, linear, quadratic = bend.coefficient_3.double()
        above_TB = logit_TB > bend.threshold_B
        bent_TB = constant + linear * logit_TB + quadratic * logit_TB**2
        slope_TB[above_TB] = (linear + 2 * quadratic * logit_TB)[above_TB]
        logit_TB = torch.where(above_TB, bent_TB, logit_TB)
    offset_B = 0 if shift_B is None else shift_B.double()
    exp_TB = (logit_TB - offset_B).exp().masked_fill(is_positive_TB, 0)
    return exp_TB * slope_TB, exp_TB.sum(0)


def compiled_python(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
