"""What a GPU machine runs, here: without what its image lacks, on a simulated device."""

import json
import re
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from partialfc import ArcFace, NormalizedSoftmax, PartialFC, RowSGD
from tests.support import image, reference
from tests.support.places import ROOT
from tests.support.ranks import run_on_ranks
from tests.support.reference import relative_error
from tests.support.waiting import PATIENCE, wait_for
from tools.bench import gpu, scale, train
from tools.bench import head as bench
from tools.bench._gpu.stages import TOTAL, Stage, stages
from tools.bench._head.baselines import BASELINES, AbsentError, Size, baseline
from tools.bench._head.measure import build
from tools.bench._head.tensor_parallel import PARALLEL, TensorParallel

SIMULATED = """
if not any(word in " ".join(sys.orig_argv) for word in ("bench/gpu.py", "resource_tracker")):
    from tests.simulated_gpu.device import install
    install()
"""


@pytest.mark.slow
def test_tests_for_a_gpu_are_collected_where_packages_are_missing(tmp_path):
    """One file that asks for one of them at its top stopped the collection of all 799."""
    env = image.environment(tmp_path)
    files = ("tests/gpu", "tests/head/test_kernels.py", "tests/head/test_fused_kernels.py")
    words = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files)
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(tests/\S+\.py): (\d+)$", done.stdout, re.MULTILINE))
    assert int(counts["tests/gpu/test_losses.py"]) > 200
    assert {"tests/head/test_kernels.py", "tests/head/test_fused_kernels.py"} <= set(counts)
    assert "tests/gpu/test_resume.py" not in counts, "the packages were not hidden"


@pytest.mark.slow
def test_the_command_goes_to_its_end_within_the_image(tmp_path):
    """With no pydantic, rich, DALI, Liger or git, on a simulated CUDA device: an import at a top, a
    call that is misspelt or a record that is not written would end it on the machine."""
    library = pytest.importorskip("tests.simulated_gpu.library")
    if reason := library.unable():
        pytest.skip(reason)
    lacks = (*image.LACKS, "triton")  # its interpreter takes seconds for a step
    env = image.environment(tmp_path / "site", lacks=lacks, then=SIMULATED)
    env["PYTHON"] = sys.executable
    out = tmp_path / "out"
    names = ["imports", "tests", "head", "baselines", "train", "scale"]  # rest: the same tools
    command = ["bash", str(ROOT / "tools/bench/gpu.sh"), str(out), "--small"]
    command += ["--part", ",".join(names)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert (out / "gpu.json").exists(), said
    report = json.loads((out / "gpu.json").read_text())["stages"]
    assert [one["stage"] for one in report] == names, said
    assert {one["stage"]: one["state"] for one in report if one["state"] != "ended well"} == {}, (
        said
    )
    assert done.returncode == 0, said
    for one in report:
        assert all((out / record).exists() for record in one["records"]), one
    missing = [line for one in report for line in one["not_measured"]]
    assert missing
    assert all("skipped: " in line for line in missing), missing
    assert {line.split(": ")[2].split(" (")[0] for line in missing} == {*BASELINES, *PARALLEL}
    record = json.loads((out / "head_gpu_textbook.json").read_text())
    assert "sha256_of_sources" in record["commit"]
    (row,) = record["rows"]
    assert set(row["heads"]) == {"ours", "textbook", "textbook_tf32"}
    for line in (*missing, "imports: ended well", "measured: train_gpu.json", "1 skipped"):
        assert line in done.stdout


def test_stages_end_within_eight_minutes_and_benchmarks_within_their_stages(capsys):
    """By what they should take on an H200; and every option that a stage gives exists."""
    every = stages("cuda", "out", small=False, kernels=True)
    assert [stage.name for stage in every][:4] == ["imports", "tests", "head", "baselines"]
    assert sum(stage.seconds for stage in every) <= TOTAL <= 8 * 60 - 10
    tools = {"head.py": bench.main, "scale.py": scale.main, "train.py": train.main}
    for stage in every:
        expected = 0.0
        for tool, *words in stage.commands:
            if "--json" in words:
                filled = [word.replace("{left}", "100") for word in words]
                assert tools[tool.rpartition("/")[2]]([*filled, "--dry-run"]) == 0
                about = re.search(r"about ([\d.]+) (s|minutes)", capsys.readouterr().err)
                expected += float(about[1]) * (60 if about[2] == "minutes" else 1)
        assert not stage.seconds or expected < stage.seconds, (stage.name, expected)


def test_a_stage_that_hangs_ends_at_its_limit_and_the_next_begins(tmp_path, monkeypatch, capsys):
    """It took the time of all behind it. Its processes are gone, and what it wrote is kept."""
    monkeypatch.setattr(gpu, "_SOONER", 0.0)
    monkeypatch.setattr(gpu, "_STOPPING", 0.2)
    record, marker = tmp_path / "one.json", tmp_path / "one.json.pid"

    class Hanging(subprocess.Popen):
        """Begins to hang before its time begins to count."""

        def __init__(self, words, **named):
            super().__init__(words, **named)
            wait_for(lambda: "--json" not in words or written(marker))

    monkeypatch.setattr(gpu.subprocess, "Popen", Hanging)
    hangs = "import subprocess, sys, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    hangs += "open(sys.argv[2], 'w').write('{\"not_measured\": [\"row 2\"]}');"
    hangs += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    hangs += "open(sys.argv[2] + '.pid', 'w').write(str(child.pid)); time.sleep(600)"
    one = Stage(name="one", shows="", seconds=1.0, commands=(["-c", hangs, "--json", str(record)],))
    two = Stage(name="two", shows="", seconds=300.0, commands=(["-c", "raise SystemExit(3)"],))
    monkeypatch.setattr(gpu, "stages", lambda *_, **__: [one, two])
    assert gpu.main([str(tmp_path)]) == 1
    first, second = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert (first["state"], second["state"]) == ("out of time", "not whole")
    assert first["not_measured"] == ["one.json: row 2"]
    assert second["exit_codes"] == [3]
    wait_for(lambda: not _runs(int(marker.read_text())))
    assert "not measured: one.json: row 2" in capsys.readouterr().out


CUT = """
import sys
from pathlib import Path
from tools.bench import gpu
from tools.bench._gpu.stages import Stage

out = Path(sys.argv[1])
hangs = "import os, sys, time; open(sys.argv[2], 'w').write('{\\"not_measured\\": [\\"row 2\\"]}');"
hangs += "open(sys.argv[2] + '.pid', 'w').write(str(os.getpid())); time.sleep(600)"
command = ["-c", hangs, "--json", str(out / "one.json")]
every = [Stage(name=name, shows="", seconds=300.0, commands=(command,)) for name in ("one", "two")]
gpu.stages = lambda *_, **__: every
sys.exit(gpu.main([str(out)]))
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_what_was_measured_is_told_where_the_command_is_cut_off(sign, tmp_path):
    """A lent machine ends when it likes. Nothing goes on without the command, or is begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", CUT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    marker = tmp_path / "one.json.pid"
    wait_for(lambda: written(marker))
    process.send_signal(sign)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    (stage,) = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert (stage["state"], stage["not_measured"]) == ("cut off", ["one.json: row 2"])
    assert "in the order of their worth, at most: one 300 s, two 300 s" in said
    assert "one: cut off" in said
    assert not _runs(int(marker.read_text()))


def written(marker):
    return marker.exists() and marker.read_text()


def _runs(process):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def liger_of_torch():
    """Their call, with torch's equations behind it."""

    class Loss:
        def __call__(self, weight, rows, target, bias=None):
            return F.cross_entropy((rows @ weight.T).float(), target)

    class Function:
        @staticmethod
        def forward(ctx, _input, weight, target, bias=None, reduction="mean", chunk_mem_const=1):
            raise NotImplementedError

        @staticmethod
        def apply(_input, weight, target, bias, reduction, chunk_mem_const):
            assert (bias, reduction, chunk_mem_const) == (None, "mean", 300 // (4 * 16))
            return F.cross_entropy((_input @ weight.T).float(), target), None

    return {
        "liger_kernel.transformers": types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Loss),
        "liger_kernel.ops.fused_linear_cross_entropy": types.SimpleNamespace(
            LigerFusedLinearCrossEntropyFunction=Function
        ),
    }


def cut_of_torch(rows, weight, target, filter_eps="high"):
    return F.cross_entropy((rows @ weight.T).float(), target)


@pytest.mark.parametrize(("name", "angular"), [*((n, 0.0) for n in BASELINES), ("compiled", 0.5)])
def test_a_baseline_takes_the_step_of_ours(name, angular, monkeypatch):
    """Loss, gradient and moved centers: a figure beside another problem would say nothing."""
    theirs = liger_of_torch()
    theirs["cut_cross_entropy"] = types.SimpleNamespace(linear_cross_entropy=cut_of_torch)
    for module, stand_in in theirs.items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    size = Size(classes=300, batch=24, dim=16, dtype=torch.float32, angular=angular)
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    device = torch.device("cpu")
    margin = ArcFace(scale=64, angular=angular) if angular else NormalizedSoftmax(scale=64)
    head = PartialFC(300, 16, margin, optimizer=RowSGD(**rule))
    other = baseline(name, size, 64.0, rule, device)
    other.centers.data.copy_(head.centers.detach())
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        embeddings = torch.randn(24, 16, generator=generator)
        identities = torch.randint(0, 300, (24,), generator=generator)
        mine, its = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
        loss = head(mine, identities)
        loss.backward()
        head.optimizer.step()
        assert float(other.step(its, identities)) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert relative_error(its.grad, mine.grad.double()) < 1e-4
    assert relative_error(other.centers.detach(), head.centers.detach().double()) < 1e-4


def test_a_baseline_that_is_not_there_says_why():
    """Not as a failure; and none stands beside ArcFace that has no margin."""
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    for angular, name, why in (
        (0.0, "liger", "liger_kernel"),
        (0.5, "cut_cross_entropy", "margin"),
    ):
        size = Size(classes=300, batch=24, dim=16, dtype=torch.float32, angular=angular)
        with pytest.raises(AbsentError, match=why):
            baseline(name, size, 64.0, rule, torch.device("cpu"))


CLASSES, BATCH, DIM = 203, 24, 32
"""No multiple of two ranks."""


def tensor_parallel_problem():
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(BATCH, DIM, generator=generator)
    centers = torch.randn(CLASSES, DIM, generator=generator)
    return embeddings, centers, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def tensor_parallel_on_rank(rank, world_size, name):
    """Loss, and gradients of this rank's embeddings and centers: a step of plain SGD is one."""
    embeddings, centers, identities = tensor_parallel_problem()
    head = TensorParallel(name, CLASSES, DIM, 16.0, {"lr": 1.0}, torch.device("cpu"))
    before = centers.chunk(world_size)[rank]
    head.centers.data.copy_(before)
    own = embeddings.chunk(world_size)[rank].clone().requires_grad_()
    loss = head.step(own, identities.chunk(world_size)[rank])
    return loss.item(), own.grad.numpy(), (before - head.centers.detach()).numpy()


@pytest.mark.parametrize("name", PARALLEL)
def test_tensor_parallel_equals_the_oracle_on_two_ranks(name):
    """Sharded by torch or whole in fp64: a baseline of another problem would say nothing."""
    embeddings, centers, identities = tensor_parallel_problem()
    scaled = lambda cosine: 16.0 * cosine  # noqa: E731
    truth = reference.gradients_of(embeddings, centers, identities, scaled, scale=16.0)
    results = run_on_ranks(2, tensor_parallel_on_rank, name)
    exact = name == "tensor_parallel"
    for loss, _, _ in results:
        assert loss == pytest.approx(float(truth[0]), rel=1e-6 if exact else 1e-3)
    for part in (1, 2):
        found = torch.cat([torch.from_numpy(result[part]) for result in results])
        assert relative_error(found, truth[part]) < (1e-5 if exact else 1e-2)


def test_tensor_parallel_is_skipped_on_one_rank_and_with_a_margin(tmp_path):
    (case,) = bench._cases(bench._parser().parse_args(["--classes", "40"]), 1)
    case = replace(case, margin="normalized_softmax")
    with pytest.raises(AbsentError, match="on several ranks"):
        build("tensor_parallel", case, torch.device("cpu"))
    out = tmp_path / "several.json"
    assert bench.main(["--world", "gpus", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["not_measured"] == [bench.ONE_GPU]
