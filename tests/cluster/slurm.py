"""A real Slurm on this one machine: munged, slurmctld and three slurmd, and no systemd.

No cgroup and no accounting database either. Partition ``low`` is preempted by ``high`` after a
grace of 20 s, and the user's signal is sent at its beginning.
"""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

from tests.support.ports import free_port
from tests.support.waiting import wait_for

NODES = ("n1", "n2", "n3")
HOSTS = Path("/etc/hosts")


class Slurm:
    """Running daemons; ``environment`` makes Slurm's commands talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._hosts = HOSTS.read_text()

    def __enter__(self) -> "Slurm":
        for name in ("run", "state", "log", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(_conf(self.folder))
        (self.folder / "gres.conf").write_text(_GPUS)
        _start_munged()
        missing = [node for node in NODES if not re.search(rf"\s{node}\b", self._hosts)]
        # submitit's master address is the name of a node.
        HOSTS.write_text(self._hosts + "".join(f"127.0.0.1 {node}\n" for node in missing))
        self.run("slurmctld", "-c")
        for node in NODES:
            self.run("slurmd", "-N", node)
        wait_for(lambda: self.run("sinfo", "-hNp", "low", "-t", "idle", "-o", "%N").count("n") == 3)
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user=root")
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld"):
            os.kill(int((self.folder / "run" / f"{name}.pid").read_text()), signal.SIGTERM)
        HOSTS.write_text(self._hosts)

    def run(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def job(self, job_id: str) -> dict[str, str]:
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text))

    def preempt(self) -> None:
        """A job of the partition that goes before takes all nodes for a moment."""
        output = ["-o", "/dev/null", "-e", "/dev/null"]
        self.run("sbatch", "-p", "high", "-N3", "--exclusive", *output, "--wrap", "sleep 0.2")


def _start_munged() -> None:
    """munge signs what Slurm's daemons tell each other; one daemon serves the machine."""
    for folder, mode in (
        ("/run/munge", "755"),
        ("/var/log/munge", "700"),
        ("/var/lib/munge", "700"),
    ):
        command = ["install", "-d", "-o", "munge", "-g", "munge", "-m", mode, folder]
        subprocess.run(command, check=True)
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        as_munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        subprocess.run([*as_munge, "/usr/sbin/munged", "--force"], check=True)


_GPUS = """\
AutoDetect=off
NodeName=n[1-3] Name=gpu File=/dev/null
NodeName=n[1-3] Name=gpu File=/dev/zero
"""
"""Two devices a node that are no GPUs: Slurm hands them out, and torch sees none."""


def _conf(folder: Path) -> str:
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 "
        "RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
        for node in NODES
    )
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmctldPort={free_port()}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
GresTypes=gpu
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=2
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
{nodes}
PartitionName=low Nodes=n1,n2,n3 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n1,n2,n3 PriorityTier=10 PreemptMode=OFF
"""
