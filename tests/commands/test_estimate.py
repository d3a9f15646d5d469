"""partialfc estimate: counted bytes by hand, its verdicts, and memory measured on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from partialfc.__main__ import main
from partialfc.backbones import build_backbone
from partialfc.commands import estimate
from partialfc.commands._estimate import head as of_head
from partialfc.commands._estimate.backbone import count
from partialfc.config import ConfigError, load
from partialfc.config.heads import each_head
from tests.support.places import FIXTURES, ROOT
from tests.support.processes import python
from tools import omniglot

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
H200 = ["--nodes", "1", "--gpus-per-node", "8", "--gpu", "h200"]


def estimated(tmp_path, *arguments) -> dict:
    """The record of a request that must not be a mistake."""
    out = tmp_path / "estimate.json"
    code = estimate.main([*map(str, arguments), "--json", str(out)])
    record = json.loads(out.read_text())
    assert code == (0 if record["fits"] else 1)
    return record


def on_meta(*layers) -> nn.Module:
    return nn.Sequential(*layers).to("meta")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_equal_a_count_by_hand(autocast):
    """What backward needs of 8 images through Linear(64, 128), ReLU, Linear(128, 32)."""
    network = on_meta(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    found = count(network, (8, 64), autocast=autocast)
    size = 4 if autocast is None else 2
    hidden, out = 8 * 128 * size, 8 * 32 * size  # the ReLU keeps its output, as the Linear does
    expected = hidden + out
    if autocast:  # 16-bit copies of the images, and of the weight that passes a gradient on
        expected += (8 * 64 + 128 * 32) * 2
    assert found.saved == expected
    weights = (64 * 128 + 128 + 128 * 32 + 32) * 4
    assert found.weights == found.trained == weights
    # The first layer has no gradient of its input: two products in forward, three in backward.
    assert found.flops == 2 * 8 * (2 * 64 * 128 + 3 * 128 * 32)


def test_a_storage_counts_once_and_recomputation_saves():
    network = on_meta(nn.Flatten(), nn.Linear(48, 16), nn.Identity(), nn.Unflatten(1, (4, 4)))
    assert count(network, (2, 3, 4, 4)).saved == 2 * 16 * 4, "views have no memory"
    kept, recomputed = (
        count(
            build_backbone("iresnet18", checkpoint_activations=again).to("meta").train(),
            (4, 3, 112, 112),
            keeps_gradients=True,
        )
        for again in (False, True)
    )
    assert recomputed.saved < 0.4 * kept.saved
    assert recomputed.backward < 0.8 * kept.backward
    assert 1.2 * kept.flops < recomputed.flops < 1.4 * kept.flops
    assert kept.gradients == recomputed.gradients == 0


def test_the_flops_are_those_that_everybody_counts():
    """ms1mv3_r50: 37.9 GFLOP an image, multiply-adds counted as two."""
    config = estimate.load(ROOT / "configs" / "ms1mv3_r50.toml")
    assert estimate.count_backbone(config, 8).flops / 128 == pytest.approx(37.9e9, rel=0.01)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "gpu", ["h200", *(pytest.param(other, marks=pytest.mark.slow) for other in ("v100-32g", "cpu"))]
)
def test_every_shipped_config_estimates(path, gpu, tmp_path):
    heads = [f"{name}=93431" for name in each_head(load(path)) if name]
    where = ["--gpus-per-node", "2", "--gpu", gpu, "--identities", ",".join(heads) or "93431"]
    record = estimated(tmp_path, path, *where)
    assert record["images_per_second"] > 0
    assert record["bytes"] == max(record["moments"].values())
    for index, moment in enumerate(record["moments"].values()):
        parts = [part for group in record["memory"].values() for part in group]
        assert moment == sum(part["bytes"][index] for part in parts)


def test_too_many_identities_do_not_fit_and_the_most_do(tmp_path, capsys):
    path = ROOT / "configs" / "ms1mv3_r50.toml", "backbone.name=convnet_s"  # counted in no time
    record = estimated(tmp_path, *path, *H200, "--identities", 400_000_000)
    assert not record["fits"]
    assert "does not fit" in capsys.readouterr().out
    most = record["most_identities"]
    # 149 GB of 4,096 B an identity and rank: 33M
    assert most / 8 == pytest.approx(33e6, rel=0.1)
    assert estimated(tmp_path, *path, *H200, "--identities", most)["fits"]
    assert not estimated(tmp_path, *path, *H200, "--identities", int(most * 1.01))["fits"]
    small = ["head.center_format=fp16", "head.optimizer.momentum_format=int8"]
    narrow = estimated(tmp_path, *path, *small, *H200, "--identities", most)["most_identities"]
    assert narrow / most == pytest.approx(4096 / (1024 + 512 + 8), rel=0.02)


def test_an_unknown_gpu_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as refused:
        estimate.main([str(CONFIGS[0]), "--gpu", "h300"])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "h300" in message
    assert all(name in message for name in (*estimate.GPUS, "cpu"))


def test_fused_kernels_cut_a_tile_for_the_multiprocessors_of_their_card():
    """An A100 has fewer than an H200, so fewer sums of splits; a V100 cannot run them."""
    size = ["data.global_batch=1024", "head.margin.scale=64", "head.fused=true"]
    config = load(str(ROOT / "configs" / "ms1mv3_r50.toml"), size)
    shard = of_head.shard_of(config, 10_000, 1, "cuda")
    card = {name: gpu.card for name, gpu in estimate.GPUS.items()}
    h200, h100, a100 = (
        next(part.bytes[0] for part in parts if part.name == "tile")
        for parts in (
            of_head.head_parts(config, shard, 1, "cuda", card[name])
            for name in ("h200", "h100", "a100")
        )
    )
    assert h100 == h200
    splits = [multiprocessors // (1024 // 64) for multiprocessors in (132, 108)]
    assert h200 - a100 == (splits[0] - splits[1]) * 1024 * (1 + 512) * 4
    with pytest.raises(ConfigError, match="tensor cores for bf16"):
        of_head.head_parts(config, shard, 1, "cuda", card["v100-32g"])


def test_without_a_pack_the_error_names_both_ways_out(capsys):
    config = str(ROOT / "configs" / "ms1mv3_r50.toml")
    assert main(["estimate", config, *H200, "data.train=missing.rec"]) == 2
    message = capsys.readouterr().err
    assert "data.train" in message
    assert "missing.rec" in message
    assert "--identities" in message


def test_a_batch_that_does_not_divide_is_refused(capsys):
    config = str(CONFIGS[0])
    assert main(["estimate", config, "--gpus-per-node", "7", "--gpu", "h200"]) == 2
    assert "data.global_batch" in capsys.readouterr().err


# --- Measured

HEAD_ALONE = """
import sys, torch
from partialfc import PartialFC
from partialfc.margins import MARGINS
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
def train(identities, dim, batch, rate, margin="arcface", weight=0.0):
    head = PartialFC(identities, dim, MARGINS[margin](), sample_rate=rate, center_weight=weight,
                     inter_class_weight=weight)
    for state in head.optimizer.states().values():
        state.zero_()  # memory that nobody wrote takes no room, and a run writes all of it in time
    for _ in range(2):
        embeddings = torch.randn(batch, dim, requires_grad=True)
        head(embeddings, torch.randint(0, identities, (batch,))).backward()
        head.optimizer.step()
torch.set_num_threads(2)
train(1024, 16, 8, 0.5)
before = peak()
train(*map(int, sys.argv[1:4]), float(sys.argv[4]), sys.argv[5], float(sys.argv[6]))
print(peak() - before)
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("rate", "batch", "margin", "weight"),
    [
        (1.0, 128, "arcface", 0.0),
        (0.1, 128, "arcface", 0.0),
        (0.1, 128, "subcenter_arcface", 0.0),
        (0.1, 1024, "arcface", 0.5),
    ],
)
def test_memory_of_the_head_is_within_15_percent(rate, batch, margin, weight, tmp_path):
    """Beyond the process with its libraries: nothing else is in the way. 60,000 x 512; the last
    with the losses on class centers."""
    request = ["60000", "512", str(batch), str(rate), margin, str(weight)]
    sizes = ["backbone.embedding_dim=512", f"data.global_batch={batch}"]
    sizes += [f"head.sample_rate={rate}", f"head.margin.name={margin}"]
    sizes += [f"losses.{name}.weight={weight}" for name in ("center", "inter_class")]
    predicted = predicted_bytes(tmp_path, sizes, "head", "losses")
    assert predicted == pytest.approx(measured_bytes(HEAD_ALONE, *request), rel=0.15)


PAIRS_ALONE = """
import ctypes, sys, torch
from partialfc.losses.over_ranks import EmbeddingLosses, Weighted
from partialfc.losses import LOSSES
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
def train(batch, names):
    losses = EmbeddingLosses({name: Weighted(LOSSES[name]()) for name in names})
    embeddings = torch.randn(batch, 512, requires_grad=True)
    losses(embeddings, torch.arange(batch) // 4).backward()
torch.set_num_threads(2)
ctypes.CDLL(None).mallopt(-3, 1_000_000)  # M_MMAP_THRESHOLD
train(8, LOSSES)
before = peak()
train(2048, sys.argv[1:])
print(peak() - before)
"""


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    "names", [("triplet",), ("contrastive",), ("uniformity",), ("triplet", "contrastive")]
)
def test_memory_of_losses_over_pairs_is_within_15_percent(names, tmp_path):
    """2,048 embeddings of 512 on one rank. With the C library's own threshold, what it does not
    return to the system comes on top; the estimate has that as heap slack."""
    sizes = ["backbone.embedding_dim=512", "data.global_batch=2048"]
    sizes += [f"losses.{name}.weight=1" for name in names]
    embeddings = 2 * 4 * 2048 * 512  # and their gradient, which the backbone's part has
    predicted = predicted_bytes(tmp_path, sizes, "losses") + embeddings
    measured = measured_bytes(PAIRS_ALONE, *names)
    assert predicted == pytest.approx(measured, rel=0.15)


def measured_bytes(program, *arguments) -> int:
    done = python("-c", program, *arguments)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def predicted_bytes(tmp_path, settings, *groups) -> int:
    """Most bytes of some groups of parts at one moment, with 60,000 identities on a CPU."""
    request = ROOT / "configs" / "demo.toml", *settings, "--gpu", "cpu", "--identities", 60_000
    memory = estimated(tmp_path, *request)["memory"]
    parts = [part["bytes"] for group in groups for part in memory[group]]
    return max(sum(sizes) for sizes in zip(*parts, strict=True))


@needs_proc
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_of_a_whole_run_is_within_15_percent(ranks, tmp_path):
    """Peak resident bytes of launch/train.py, all of them: activations and libraries are most.

    Under torchrun, because getrusage's peak is at least that of the process that started it.
    """
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "8", "--held-out", "2", "--pairs", "40", "--size", "112"]
    assert omniglot.main([str(archive), str(tmp_path), *size]) == 0
    settings = [
        "configs/omniglot.toml",
        "backbone.name=convnet_m",
        "data.image_size=112",
        f"data.global_batch={64 * ranks}",
        f"data.train={tmp_path / 'train.rec'}",
        f"verification.pairs=['{tmp_path / 'heldout_pairs.bin'}']",
        "verification.identification=",
        "verification.every_steps=",
        "verification.batch=32",
        f"run.folder={tmp_path / 'run'}",
        "run.epochs=",
        "run.steps=2",
        "schedule.warmup_steps=1",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={ranks}", "launch/train.py", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_bytes"]
    record = estimated(tmp_path, *settings, "--gpus-per-node", ranks, "--gpu", "cpu")
    assert record["bytes"] == pytest.approx(measured, rel=0.15)


def test_rows_in_host_memory_leave_the_device_and_pass_through_it(tmp_path):
    """A hundred million identities on one H200, or none: the states must not be counted there."""
    config = ROOT / "configs/ms1mv3_r50.toml"
    wanted = [
        *("--identities", "100000000", "--gpus-per-node", "1", "--gpu", "h200"),
        *("head.sample_rate=0.01", "head.center_format=fp16", "data.global_batch=4096"),
        "backbone.name=convnet_s",
        *("optimizer.accumulation=8", "head.optimizer.momentum_format=int8"),
    ]
    on_device = estimated(tmp_path, config, *wanted)
    in_host = estimated(tmp_path, config, *wanted, "head.states_in=host")
    assert not on_device["fits"]
    assert in_host["fits"]
    states, staged = 10**8 * (512 + 4 + 4), 3 * 10**6 * (512 * 2 + 512 + 4 + 4)
    saved = bytes_of_head(on_device) - bytes_of_head(in_host)
    assert saved == pytest.approx(states - staged, rel=0.01)


def test_fp8_centers_and_8_bit_momentum_take_two_bytes_an_element(tmp_path):
    """150 million on one H200 with momentum in host memory, 117 million with both on the GPU."""
    config = ROOT / "configs/ms1mv3_r50.toml"
    wanted = [
        *("--identities", "150000000", "--gpus-per-node", "1", "--gpu", "h200"),
        *("head.sample_rate=0.01", "head.center_format=fp8", "data.global_batch=4096"),
        "backbone.name=convnet_s",
        *("optimizer.accumulation=8", "head.optimizer.momentum_format=int8"),
    ]
    in_host = estimated(tmp_path, config, *wanted, "head.states_in=host")
    assert in_host["fits"]
    held = {part["name"]: part["bytes"][0] for part in in_host["memory"]["head"]}
    assert held["class centers"] == 150_000_000 * 512
    assert held["staged rows"] == 3 * 1_500_000 * (512 + 512 + 12)
    on_device = estimated(tmp_path, config, *wanted)
    assert not on_device["fits"]
    held = {part["name"]: part["bytes"][0] for part in on_device["memory"]["head"]}
    assert held["class centers"] + held["row states"] == 150_000_000 * (2 * 512 + 12)
    assert on_device["most_identities"] > 110e6


def bytes_of_head(record) -> int:
    return sum(part["bytes"][0] for part in record["memory"]["head"])


@pytest.mark.slow
def test_a_teacher_has_weights_a_forward_pass_and_time(tmp_path):
    """Its forward comes before the student's, so it counts where it is more than a validation's."""
    teacher = build_backbone("iresnet18", embedding_dim=64, image_size=112)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    request = [ROOT / "configs" / "demo.toml", "data.image_size=112", "backbone.embedding_dim=64"]
    request += ["backbone.name=convnet_s", "verification.batch=8", "--gpu", "cpu"]
    request += ["--identities", "1000"]
    taught = ["losses.teacher.weight=1", f"losses.teacher.from={tmp_path / 'teacher.safetensors'}"]
    alone, both = estimated(tmp_path, *request), estimated(tmp_path, *request, *taught)
    weights, forward = both["memory"]["teacher"]
    held = [*teacher.parameters(), *teacher.buffers()]
    assert weights["bytes"] == [sum(one.nbytes for one in held if one.is_floating_point())] * 4
    assert forward["bytes"][:3] == [0, 0, 0]
    assert forward["bytes"][3] > 10**8, "all images of a batch, where a validation has 8"
    assert "teacher" not in alone["memory"]
    (seconds,) = (part["seconds"] for part in both["seconds"] if part["name"] == "teacher")
    backbone = next(part["seconds"] for part in alone["seconds"] if part["name"] == "backbone")
    assert seconds > backbone / 3
    wider = [taught[0], "losses.teacher.from=nowhere.safetensors"]
    with pytest.raises(ConfigError, match=r"losses\.teacher\.from: .*nowhere.*on this machine"):
        estimate.main([*map(str, request), *wider])


def test_a_search_of_neighbours_is_counted(tmp_path):
    """Four times the identities take 16 times as long: all centers are compared with all others."""
    request = [
        *(ROOT / "configs/ms1mv3_r50.toml", "--gpus-per-node", "1", "--gpu", "h200"),
        *("backbone.name=convnet_s", "head.sample_rate=0.1", "head.negatives=nearest"),
    ]
    found = [
        estimated(tmp_path, *request, "--identities", identities)
        for identities in (250_000, 1_000_000)
    ]
    seconds = [_named(one["seconds"], "head: search of neighbours")["seconds"] for one in found]
    assert seconds[1] == pytest.approx(16 * seconds[0], rel=0.01)
    lists = _named(found[1]["memory"]["head"], "lists of neighbours")
    assert lists["bytes"][0] == 0
    assert lists["origin"] == "1,000,000 x 16 x 14 B, 0.21 GiB in host memory"
    many = ["--nodes", 512, "--gpus-per-node", 8, "data.global_batch=262144"]
    request = [*request[:1], *many, *request[3:]]
    of_many = estimated(tmp_path, *request, "--identities", 100_000_000)
    search = _named(of_many["memory"]["head"], "search of neighbours")
    assert "a tile of 512 x 131,072 scores" in search["origin"], "32 rows of every rank"


def test_pass_2_beside_the_backward_has_memory_of_its_own(tmp_path):
    """No other stream uses it, at no time: what is added is what pass 2 has beyond the backward."""
    request = [ROOT / "configs/ms1mv3_r50.toml", "--identities", "1000000", "--gpu", "h200"]
    request += ["backbone.name=convnet_s", "head.keep_mib=0"]
    beside, behind = (
        _named(estimated(tmp_path, *request, *more)["memory"]["head"], "tile")["bytes"]
        for more in ([], ["head.overlap=false"])
    )
    more = behind[2] - behind[1]
    assert more > 100 << 20
    assert beside == [behind[0] + more, behind[1] + more, behind[2], behind[3] + more]


def _named(parts, name):
    return next(part for part in parts if part["name"] == name)


def test_copies_for_other_hosts_are_counted_by_host(tmp_path):
    """Two generations of a host's own part and of another's, and what leaves it for each copy."""
    wanted = [
        ROOT / "configs/ms1mv3_r50.toml",
        *("--identities", "1000000", "--nodes", "4", "--gpus-per-node", "2", "--gpu", "h200"),
        "backbone.name=convnet_s",
    ]
    assert "peers" not in estimated(tmp_path, *wanted)
    found = estimated(tmp_path, *wanted, "checkpoint.peers_every_steps=20")["peers"]
    part = 10**6 * 2 * 4 * 512 / 4
    assert found["sent"] == pytest.approx(part, rel=0.01)
    assert found["memory"] == pytest.approx(4 * part, rel=0.02)
