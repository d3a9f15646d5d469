"""The benchmark of the head: its record, its textbook head, its measure of memory."""

import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from partialfc import ArcFace, CosFace
from partialfc.head.tiles import passes
from tests.support import reference
from tests.support.places import ROOT
from tests.support.ranks import run_on_ranks
from tools.bench import head as bench
from tools.bench._head import measure, processes
from tools.bench._head.measure import Case, batch_of, build
from tools.bench._head.plot import plot
from tools.bench._head.turns import Turns

TIMES = {"min", "p10", "p25", "median", "p75", "p90", "max", "steps"}
HEAD = {
    *("construction_seconds", "sampled_rows", "centers_bytes", "state_bytes", "last_loss"),
    *("extra_peak_bytes_all_ranks", "baseline_bytes", "stored_bytes", "extra_peak_bytes"),
    *("floor_seconds", "row_io_seconds", "fraction_of_floor"),
}
MARGINS = {
    # At s = 64 some samples saturate at 69.08, as in arcface_torch; the oracle's do not.
    "arcface": (ArcFace(scale=32), {"scale": 32}),
    "cosface": (CosFace(scale=30, additive=0.35), {"scale": 30, "angular": 0, "additive": 0.35}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "rate"), [(1, 1), (2, 0.3)])
def test_a_record_has_every_figure(world_size, rate, tmp_path):
    command = [sys.executable, str(ROOT / "tools/bench/head.py"), "--json", "out.json"]
    command += ["--classes", "2000", "--batch", "16", "--dim", "64", "--rate", str(rate)]
    command += ["--steps", "3", "--seconds", "0", "--world", str(world_size)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.json").read_text()
    for private in (str(ROOT), str(tmp_path), str(Path.home()) + "/", platform.node()):
        assert private not in text or len(private) < 4, private
    record = json.loads(text)
    assert {"command", "date", "commit", "hardware", "versions", "arguments"} <= set(record)
    (row,) = record["rows"]
    assert (row["world"], row["classes"], row["batch"], row["rate"]) == (world_size, 2000, 16, rate)
    positive(row["ceilings"], {"fp32", "bf16", "copy"})
    positive(row, {"times_faster_than_textbook"})
    positive(row["three_products_seconds"], TIMES)
    assert row["three_products_seconds"]["min"] < row["heads"]["ours"]["step_seconds"]["min"]
    for head in (row["heads"]["ours"], row["heads"]["textbook"]):
        positive(head["step_seconds"], TIMES)
        positive(head["step_cpu_seconds"], TIMES)
        # At this size a step may fit into what the process held before.
        positive(head, HEAD - {"extra_peak_bytes", "extra_peak_bytes_all_ranks"})
        assert set(head) >= HEAD
        assert head["step_seconds"]["steps"] == 3
        at_step = 2000 * 4 if head is row["heads"]["ours"] and rate < 1 else 0
        assert head["centers_bytes"] == head["state_bytes"] - at_step == 2000 * 64 * 4
        assert head["sampled_rows"] == pytest.approx(2000 * rate, abs=2)
        assert head["stored_bytes"] == (2 * head["centers_bytes"] + at_step) // world_size
        assert head["floor_seconds"] < head["step_seconds"]["median"]
    plot([record], tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def positive(values, names):
    assert names <= set(values)
    for name in names:
        assert math.isfinite(values[name]), name
        assert values[name] > 0, name


def problem():
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(24, 32, generator=generator)
    centers = torch.randn(203, 32, generator=generator)
    return embeddings, centers, torch.randint(0, 203, (24,), generator=generator)


def textbook_on_rank(rank, world_size, margin):
    """Loss and exact gradients of this rank's embeddings and centers."""
    embeddings, centers, identities = problem()
    head = reference.TextbookHead(203, 32, **margin)
    owned = slice(head.start, head.start + head.num_local)
    head.centers.data.copy_(centers[owned])
    mine = slice(rank * 24 // world_size, (rank + 1) * 24 // world_size)
    own = embeddings[mine].clone().requires_grad_()
    loss = head(own, identities[mine])
    loss.backward()
    return loss.item(), (own.grad / world_size).numpy(), head.centers.grad.numpy()


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_textbook_head_equals_the_oracle(world_size, name):
    margin, settings = MARGINS[name]
    embeddings, centers, identities = problem()
    truth = reference.gradients_of(
        embeddings, centers, identities, reference.positive_logit(margin), scale=margin.scale
    )
    if world_size == 1:
        results = [textbook_on_rank(0, 1, settings)]
    else:
        results = run_on_ranks(world_size, textbook_on_rank, settings)
    for loss, _, _ in results:
        assert loss == pytest.approx(float(truth[0]), rel=1e-6)
    for part in (1, 2):
        gradient = torch.cat([torch.from_numpy(result[part]) for result in results])
        assert reference.relative_error(gradient, truth[part]) < 1e-5


def test_the_textbook_head_samples_its_positives_and_steps_densely():
    embeddings, _, identities = problem()
    head = reference.TextbookHead(203, 32, sample_rate=0.3)
    before = head.centers.detach().clone()
    own = embeddings.clone().requires_grad_()
    assert head.step(own, identities).isfinite()
    rows = head.sampled
    assert len(rows) == int(0.3 * 203) == len(rows.unique())
    assert set(identities.tolist()) <= set(rows.tolist())
    assert (rows.diff() > 0).all()
    assert own.grad.abs().sum() > 0
    unsampled = torch.ones(203, dtype=torch.bool).index_fill_(0, rows, False)
    decayed = before * (1 - 0.1 * 5e-4)  # the dense step reaches rows that nobody sampled
    torch.testing.assert_close(head.centers.detach()[unsampled], decayed[unsampled])


def test_more_positives_than_the_quota_are_all_sampled():
    _, _, identities = problem()
    head = reference.TextbookHead(203, 32, sample_rate=0.01)
    rows, target = head.sample(identities)
    assert rows.tolist() == identities.unique().tolist()
    assert (rows[target] == identities).all()


PLANT = """
import json, sys, torch
from tools.bench._head import measure

build = measure.build

def planted(name, case, device):
    head, step = build(name, case, device)
    def with_plant(*batch):
        plant = torch.ones(int(sys.argv[1]))
        return step(*batch)
    return head, with_plant

measure.build = planted
case = measure.Case(
    classes=2000, batch=16, dim=64, rate=1.0, dtype="fp32", centers="fp32", momentum="fp32",
    device="cpu", heads=("ours",), threads=1, steps=3, seconds=0.0, memory=True,
)
with measure.joined(case) as device:
    print(json.dumps(measure.memory_of(case, device)))
"""


def extra_with(floats):
    command = [sys.executable, "-c", PLANT, str(floats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["extra_peak_bytes"]


@pytest.mark.slow
def test_50_megabytes_for_a_moment_are_seen():
    """The tiny head plants them too, before the baseline: they are freed and counted again."""
    assert extra_with(12_500_000) - extra_with(1) == pytest.approx(50e6, abs=3e6)


CASE = Case(
    classes=500,
    batch=16,
    dim=16,
    rate=1.0,
    dtype="fp32",
    centers="fp32",
    momentum="fp32",
    device="cpu",
    heads=("ours", "textbook"),
    threads=1,
    steps=2,
    seconds=0.0,
)


@pytest.mark.slow
def test_one_process_measures_many_cases_and_what_finds_no_memory_fails_alone(tmp_path):
    """As on a GPU. The second case asks for more than any address space; the third must be whole,
    and the heads of the record, its table and its picture must take what is missing."""
    cases = [CASE, replace(CASE, classes=10**13), replace(CASE, batch=8)]
    job = json.dumps({"cases": [asdict(case) for case in cases], "until": math.inf})
    command = [sys.executable, str(processes.WORKER), job, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out").read_text().splitlines()
    found = [one for one in map(json.loads, lines) if not one.get("partial")]
    for one in (found[0], found[2]):
        assert [head["step_seconds"]["steps"] for head in one["heads"].values()] == [2, 2]
    assert {head["at"] for head in found[1]["heads"].values()} == {"construction"}
    assert (
        "tried to allocate 640000000000000 bytes" in found[1]["heads"]["textbook"]["out_of_memory"]
    )
    rows = [
        bench.with_floors({"world": 1, **asdict(case), **one})
        for case, one in zip(cases, found, strict=True)
    ]
    lines = bench.shown(rows).splitlines()[2:]
    assert all("out of memory" in line for line in lines[2:4])
    assert all(" ms " in line for line in lines[:2] + lines[4:])
    plot([{"rows": rows}], tmp_path / "out.png")


class Ledger:
    """Memory of which every byte is known."""

    is_exact = True

    def __init__(self) -> None:
        self.bytes = self.most = 0

    def use(self, count: int) -> None:
        self.bytes += count
        self.most = max(self.most, self.bytes)

    def now(self) -> int:
        return self.bytes

    def peak(self) -> int:
        return self.most

    def reset(self) -> None:
        self.most = self.bytes


def test_memory_of_a_head_is_its_own_where_several_share_a_process():
    """What a head keeps is not another's extra memory, whoever made it when; and a head that dies
    in a step gives back what it held and leaves the others alone."""
    ledger = Ledger()

    class Head(torch.nn.Module):
        def __init__(self, keeps: int, needs: int) -> None:
            super().__init__()
            self.centers = torch.nn.Parameter(torch.zeros(100))
            self.optimizer, self.keeps, self.needs = torch.optim.SGD([self.centers]), keeps, needs
            ledger.use(400)

        def step(self, embeddings_bD, identities_b):
            ledger.use(self.keeps)  # buffers, in the first step
            self.keeps = 0
            if self.needs > 10**6:
                raise torch.OutOfMemoryError("Tried to allocate 61.04 GiB.")
            ledger.use(self.needs)
            ledger.use(-self.needs)
            return torch.zeros(())

        def __del__(self) -> None:
            ledger.use(-400)

    def build(name):
        head = Head(*{"small": (7, 1000), "huge": (0, 10**9), "large": (50, 3000)}[name])
        return head, head.step

    turns = Turns(["small", "huge", "large"], build, torch.device("cpu"), memory=ledger)
    assert ledger.bytes == 3 * 400
    for counted in (False, True):
        turns.take(torch.zeros(2, 3), torch.zeros(2), counted=counted)
        assert ledger.bytes == 2 * 400 + 7 + 50, "the dead one is gone"
    found = turns.results()
    assert found["small"]["extra_peak_bytes"] == 1007
    assert found["large"]["extra_peak_bytes"] == 3050
    assert found["small"]["baseline_bytes"] == 450
    assert found["small"]["stored_bytes"] == 400
    assert found["huge"]["out_of_memory"] == "OutOfMemoryError: Tried to allocate 61.04 GiB."
    assert "step_seconds" not in found["huge"]


def test_heads_of_a_gpu_are_there_one_after_the_other(monkeypatch):
    """Side by side, two heads of a million identities did not fit in 80 GB; and what is known after
    the first is told before the second begins."""
    calls, told = [], []

    def in_turns(names, *_):
        calls.append(names)
        return {name: {"step_seconds": {"median": 1.0}} for name in names}, [0.5]

    monkeypatch.setattr(measure, "_in_turns", in_turns)
    monkeypatch.setattr(measure, "three_products", lambda *_: None)
    case, device = replace(CASE, device="cuda"), torch.device("cuda")
    whole = measure.times_of(case, device, {}, math.inf, lambda found: told.append({**found}))
    assert calls == [("ours",), ("textbook",)]
    assert [one["partial"] for one in told] == [True, True]
    assert set(whole["heads"]) == {"ours", "textbook"}
    assert "partial" not in whole
    late = measure.times_of(case, device, {}, 0.0)
    assert late["heads"] == {name: {"not_measured": measure.NO_TIME} for name in case.heads}
    assert len(calls) == 2


def test_what_does_not_fit_says_which_card_has_room():
    row = {"world": 1, **asdict(replace(CASE, device="cuda", classes=10**6, batch=4096, dim=512))}
    row |= {"ceilings": {}, "heads": {"textbook": {"out_of_memory": "Tried to allocate"}}}
    needs = bench.with_floors(row)["heads"]["textbook"]["needs"]
    assert needs == "about 69 GiB: h100" or needs.endswith("a100"), needs


WORKER = """
import json, os, sys, time
job = json.loads(sys.argv[1])
with open(sys.argv[2], "a") as out:
    for case in job["cases"]:
        print(case["classes"], *case["heads"], file=open(os.environ["SEEN"], "a"), flush=True)
        if case["classes"] == 2:
            os._exit(9)
        if case["classes"] == 3 and "fused" in case["heads"]:
            print(json.dumps({"lost": "fused", "why": "CUDA error"}), file=out, flush=True)
            os._exit(1)
        if case["classes"] == 4:
            first = {"heads": {"ours": {"kept": 1}}, "partial": True}
            print(json.dumps(first), file=out, flush=True)
            time.sleep(600)
        print(json.dumps({"heads": {n: {} for n in case["heads"]}}), file=out, flush=True)
"""


def test_a_lost_process_loses_one_case_or_one_head(tmp_path, monkeypatch):
    """It is killed, or a kernel leaves its device unusable, or it hangs: what was measured before
    must stay, and what comes after must be measured, without the head that would end it again."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(processes, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(processes, "_GRACE", 0.0)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    heads = ("ours", "fused")
    cases = [replace(CASE, classes=c, heads=heads, device="cuda") for c in (1, 2, 3, 5, 4, 6)]
    now, found = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time, sleep=time.sleep)
    monkeypatch.setattr(processes, "time", clock)
    for one in processes.measured(cases, 1, 5.0):
        found.append(one)
        if one[1].get("partial"):  # the time is over while the fourth hangs
            now[0] = 6.0
    assert [case.classes for case, _ in found] == [1, 2, 3, 5, 4, 4]
    assert found[0][1]["heads"] == {"ours": {}, "fused": {}}
    assert all("code [9]" in found[1][1]["heads"][name]["failed"] for name in heads)
    without = {"ours": {}, "fused": {"failed": "CUDA error", "at": "a lost process"}}
    assert found[2][1]["heads"] == found[3][1]["heads"] == without
    assert found[4][1]["partial"]
    assert found[5][1]["heads"]["ours"] == {"kept": 1}, "what it had measured before is kept"
    assert found[5][1]["heads"]["fused"] == without["fused"]
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen == ["1 ours fused", "2 ours fused", "3 ours fused", "3 ours", "5 ours", "4 ours"]


def test_what_no_time_was_left_for_is_named(tmp_path, capsys):
    """A record that looks whole, or a command that says all is well."""
    out = tmp_path / "out.json"
    size = ["--classes", "1000,20", "--batch", "16", "--rate", "0.5"]
    assert bench.main([*size, "--budget", "0", "--json", str(out)]) == 1
    record = json.loads(out.read_text())
    named = [
        f"C {classes}, B 16, r 0.5: ours, textbook (no time was left)"
        for classes in ("1,000", "20")
    ]
    assert record["not_measured"] == named
    assert record["rows"] == []
    assert capsys.readouterr().out.count("not measured, no time") == 2


@pytest.mark.slow
def test_a_size_of_the_tiles_is_that_of_its_rows_only(tmp_path):
    """Cases share a process on a GPU: the rows after would have the tiles of another."""
    out = tmp_path / "out.json"
    words = [
        "--classes",
        "3000",
        "--batch",
        "16",
        "--dim",
        "32",
        "--only",
        "ours",
        "--seconds",
        "0",
    ]
    assert bench.main([*words, "--tile-mib", "1,2", "--json", str(out)]) == 0
    assert [row["tile_mib"] for row in json.loads(out.read_text())["rows"]] == [1, 2]
    (case,) = bench._cases(bench._parser().parse_args([*words, "--tile-mib", "1"]), 1)
    before = dict(passes.TILE_BYTES)
    try:
        build("ours", case, torch.device("cpu"))
        assert {**before, "cpu": 1 << 20} == passes.TILE_BYTES
        build("ours", replace(case, tile_mib=None), torch.device("cpu"))
        assert before == passes.TILE_BYTES
    finally:
        passes.TILE_BYTES.update(before)


def test_markers_of_the_picture_tell_dimensions_and_ranks_apart(monkeypatch):
    """D = 128 and D = 512 had the same marker and colour."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    head = {"step_seconds": {"median": 0.1}, "extra_peak_bytes": 1 << 20}
    rows = [
        {"rate": 0.1, "dim": dim, "batch": 8, "world": world, "dtype": "fp32",
         "classes": 1000, "heads": {"ours": head}}
        for dim in (128, 512) for world in (1, 2)
    ]  # fmt: skip
    plot([{"rows": rows}], "out.png")
    for axes in kept[0].axes:
        looks = {(line.get_marker(), line.get_fillstyle()) for line in axes.lines}
        assert len(looks) == 4
        assert "log scale" in axes.get_xlabel()
        assert "log scale" in axes.get_title(loc="left")


def test_rows_of_several_identities_are_measured_beside_one_and_a_pass_for_each():
    """One identity is the head of the other rows, bit for bit; --positives names what is asked."""
    words = ["--positives", "1,4", "--classes", "500", "--batch", "16", "--dim", "16"]
    (case,) = bench._cases(bench._parser().parse_args(words), 1)
    assert case.heads == ("K=1", "K=4", "K=4 in turn")
    embeddings, identities = batch_of(case, 0, torch.device("cpu"))
    losses, kept = {}, {}
    for name in ("ours", *case.heads):
        head, step = build(name, case, torch.device("cpu"))
        kept[name] = []
        remember = head.optimizer.add_micro_batch
        head.optimizer.add_micro_batch = lambda *parts, to=kept[name], by=remember: (
            to.append(len(parts[0].target_P)),
            by(*parts),
        )
        losses[name] = float(step(embeddings.clone().requires_grad_(), identities))
    assert losses["K=1"] == losses["ours"] != losses["K=4"]
    assert kept == {"ours": [16], "K=1": [16], "K=4": [64], "K=4 in turn": [16] * 4}
    with pytest.raises(SystemExit, match="must be numbers >= 1"):
        bench._cases(bench._parser().parse_args(["--positives", "1,x"]), 1)


def test_rows_that_stay_are_measured_beside_those_that_move():
    words = ["--only=ours", "--with=stay", "--classes=500", "--batch=16", "--dim=16", "--rate=0.1"]
    (case,) = bench._cases(bench._parser().parse_args(words), 1)
    heads = {name: build(name, case, torch.device("cpu"))[0] for name in case.heads}
    rules = {name: head.optimizer.rule.unsampled for name, head in heads.items()}
    assert rules == {"ours": "move", "stay": "stay"}
    with pytest.raises(SystemExit, match=r"must be of .*, stay"):
        bench._cases(bench._parser().parse_args(["--with", "stays"]), 1)
    found = {"classes": 500, "batch": 16, "dim": 16, "device": "cpu", "dtype": "fp32"}
    figures = {"sampled_rows": 50, "centers_bytes": 1, "state_bytes": 1}
    for name, cpu in (("ours", 3.0), ("stay", 2.0)):
        times = {"step_seconds": {"median": 1.0}, "step_cpu_seconds": {"median": cpu}}
        found.setdefault("heads", {})[name] = {**figures, **times}
    row = bench.with_floors({**found, "ceilings": {"fp32": 1e9, "copy": 1e9}})
    assert row["cpu_times_stay"] == 1.5
