"""Submit training to Slurm, and look after it: every node's every GPU is one rank.

    partialfc slurm CONFIG.toml --nodes 4 --gpus-per-node 8 --time 24:00:00 [key=value ...]
    partialfc slurm status|logs|attach|cancel [JOB]

Several settings files are one job array. Before the time limit, and when it is preempted, a job
saves a checkpoint, goes back to the queue and goes on from there.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from partialfc.commands._command import command_parser
from partialfc.commands._numbers import positive
from partialfc.config import ConfigError
from partialfc.slurm import actions as jobs
from partialfc.slurm.submit import REQUEUES, REQUEUES_HERE, Job, submission_text, submit, train_here

ACTIONS: dict[str, Callable[..., int]] = {
    "status": jobs.show_status,
    "logs": jobs.show_log,
    "attach": jobs.follow_log,
    "cancel": jobs.cancel,
}


def main(arguments: list[str]) -> int:
    """Submit or act; return the exit code: 0, or that of a local run."""
    if arguments and arguments[0] in ACTIONS:
        return _act(arguments)
    options = _parser().parse_intermixed_args(arguments)
    job = _job(options)
    if options.dry_run:
        print(submission_text(job), end="")
        return 0
    if options.local:
        return train_here(job)
    submitted = submit(job)
    print(f"{submitted.job_id}: {submitted.folder}")
    print(f"partialfc slurm attach {submitted.job_id}   # Ctrl-C leaves it running")
    return 0


def _act(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"partialfc slurm {arguments[0]}", description=ACTIONS[arguments[0]].__doc__
    )
    parser.add_argument("job", nargs="?" if arguments[0] == "status" else None, metavar="JOB")
    parser.add_argument("--jobs", type=Path, default=Path("jobs"), metavar="FOLDER")
    if arguments[0] in ("logs", "attach"):
        parser.add_argument("--rank", type=int, default=0, help="whose log (default 0)")
    return ACTIONS[arguments[0]](**vars(parser.parse_args(arguments[1:])))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("slurm", __doc__)
    add = parser.add_argument
    add("words", nargs="+", metavar="CONFIG.toml|key.sub=value", help="settings and overrides")
    add("--nodes", type=positive, default=1, help="(default 1)")
    add("--gpus-per-node", type=positive, help="ranks of a node, one GPU each")
    add("--tasks-per-node", type=positive, help="ranks of a node without GPUs")
    add("--cpus-per-task", type=positive, help="cores of a rank; left out, data.threads of them")
    add("--time", type=_minutes, default=24 * 60, help="[DAYS-]HH:MM:SS of one start (24:00:00)")
    add("--partition", type=_word, help="Slurm's partition; left out, its default one")
    add("--account", type=_word, help="whom Slurm charges")
    add("--qos", type=_word, help="Slurm's quality of service")
    add("--lead", type=positive, default=120, help="seconds to save before the time limit (120)")
    add("--max-requeues", type=_count, help="starts after the first one (100; with --local 5)")
    add("--name", help="of the job; left out, the folder of the run")
    add("--setup", action="append", default=[], help="a shell line before training, e.g. a module")
    add(
        "--slurm",
        action="append",
        default=[],
        type=_word,
        metavar="KEY=VALUE",
        help="any sbatch option that has none here, e.g. wckey=faces",
    )
    add("--jobs", type=Path, default=Path("jobs"), help="folder of scripts and logs (jobs)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run", action="store_true", help="print the sbatch script and submit nothing"
    )
    how.add_argument("--local", action="store_true", help="run the same job here, without Slurm")
    return parser


def _job(options: argparse.Namespace) -> Job:
    """The job that the options describe; its settings are checked before Slurm sees it."""
    configs = [Path(word) for word in options.words if word.endswith(".toml") and "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    for word in options.words:
        if Path(word) not in configs and word not in overrides:
            raise ConfigError(f"{word!r}: must be a settings file (.toml) or key.sub=value.")
    if (options.gpus_per_node is None) == (options.tasks_per_node is None):
        raise ConfigError(
            f"--gpus-per-node = {options.gpus_per_node} with --tasks-per-node = "
            f"{options.tasks_per_node}: set one of them, the ranks of a node."
        )
    if options.max_requeues is None:
        options.max_requeues = REQUEUES_HERE if options.local else REQUEUES
    asked = {field.name: getattr(options, field.name, ()) for field in dataclasses.fields(Job)}
    return Job(**asked | {"configs": tuple(configs), "overrides": tuple(overrides)})


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= 0")
    return int(text)


def _word(text: str) -> str:
    """What a line of the script can hold."""
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} must be on one line")
    return text


def _minutes(text: str) -> int:
    """[DAYS-]HH:MM:SS or minutes, as minutes."""
    if text.isdigit() and int(text):
        return int(text)
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be [DAYS-]HH:MM:SS or minutes")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return max(1, days * 1440 + hours * 60 + minutes + (seconds > 0))
