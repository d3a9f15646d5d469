"""What a process takes with the trainer's libraries and nothing else: measured in one."""

import subprocess
import sys
from functools import cache

_TINY_TRAINING = """
import sys
import torch, tensorboard.summary.writer.event_file_writer
import partialfc.training.run
from partialfc import ArcFace, PartialFC
if sys.argv[1] == "True":
    from partialfc.data.loaders import dali
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
    torch.nn.Linear(8 * 30 * 30, 16),
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
head = PartialFC(1024, 16, ArcFace(), sample_rate=0.5)
for _ in range(2):
    head(net(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    optimizer.step()
    head.optimizer.step()
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)
"""


@cache
def process_baseline(with_dali: bool) -> int:
    """Peak resident bytes of a process with the trainer's libraries; getrusage's would be at least
    those of the process that started it."""
    command = [sys.executable, "-c", _TINY_TRAINING, str(with_dali)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
