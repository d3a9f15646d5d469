"""Small runs of launch/train.py on real handwriting, as a user starts them."""

import json
import os
import subprocess
import sys

from tests.support.places import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def command(packs, folder, *overrides, ranks=None):
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [
        *start,
        "launch/train.py",
        "configs/omniglot.toml",
        f"data.train={packs / 'train.rec'}",
        f"verification.pairs=['{packs / 'heldout_pairs.bin'}']",
        f"verification.identification=['{packs / 'heldout.rec'}']",
        f"run.folder={folder}",
        "run.epochs=",
        "schedule.warmup_steps=2",
        "data.global_batch=48",
        "backbone.name=convnet_s",
        "log.every_steps=1",
        *overrides,
    ]


def run(*arguments, **keywords):
    return subprocess.run(
        command(*arguments, **keywords),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}
