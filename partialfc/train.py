"""The training loop, in the order the data flows."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from partialfc import checkpoint, guidance, preemption
from partialfc.agreement import any_rank
from partialfc.build import Model, build
from partialfc.config import Config, ConfigError, config_hash, to_toml
from partialfc.data.arrangements import arrangement
from partialfc.data.augment import Augmentation
from partialfc.data.dataset import DataSet, open_dataset
from partialfc.data.loader import open_batches
from partialfc.data.order import Order
from partialfc.data.stream import Batch, Batches, Stream
from partialfc.errors import CrashLoopError, DataError
from partialfc.evaluation import Evaluation
from partialfc.ledger import fruitless, keeping
from partialfc.metrics import write_text
from partialfc.permutation import key
from partialfc.preemption import Preempted
from partialfc.preflight import Finding, preflight, report
from partialfc.recorder import Recorder, Step
from partialfc.runtime import Runtime, average_buffers, from_leader, refuse_interrupted
from partialfc.saver import Saver
from partialfc.schedule import learning_rate
from partialfc.start import start_from


def train(config: Config, runtime: Runtime) -> None:
    """Train as the settings say, from the newest checkpoint on if there is one. Collective.

    Raises:
        ConfigError: If the settings do not fit the data, the sets or the backbone.
        NonFiniteError: If the loss or the gradient is not finite.
        CheckpointError: If a checkpoint cannot be written, or is of another run.
        DataError: If too many images cannot be decoded.
        CrashLoopError: If the last starts came to no new step.
        Preempted: On every rank, after a checkpoint, if SIGUSR2 reached any of them.
    """
    if config.run.preflight:
        report(look_before(config, runtime), runtime)
    dataset, order, total_steps = _data(config)
    evaluation = Evaluation(config, runtime)
    model = build(config, runtime, dataset.num_identities)
    if runtime.leads:
        sampled = max(2, math.ceil(dataset.num_identities * config.head.sample_rate))
        margin, dim = model.head.margin, config.backbone.embedding_dim
        for sentence in (
            *guidance.warnings(margin, sampled, dim),
            *guidance.pair_warnings(model.losses.losses, config.data.images_per_identity),
        ):
            print(f"warning: {sentence}", flush=True)
    folder, facts = config.run.folder / "checkpoints", facts_of(config, dataset)
    if not config.run.resume and checkpoint.exist(folder):
        raise ConfigError(
            f"run.resume = false with run.folder = {str(config.run.folder)!r}, which holds "
            "checkpoints of a run. Choose another folder, or set run.resume = true to go on."
        )
    written = config.run.folder / "ledger.jsonl" if runtime.leads else None
    digest = hashlib.sha256(to_toml(config).encode()).hexdigest()[:16]
    with keeping(written, ranks=runtime.ranks.size, settings=digest) as ledger:
        if runtime.watchdog is not None:
            runtime.watchdog.follow(ledger)
        _refuse_crash_loop(config, runtime, ledger.before, digest)
        with ledger.spending("restore"):
            found = checkpoint.newest(folder, runtime)
            if found is None and config.run.resume_from is not None:
                found = checkpoint.named(config.run.resume_from, runtime)
            step = checkpoint.load(found, model, facts, runtime) if found else 0
            if found is None and config.run.start_from is not None:
                start_from(config.run.start_from, config, model, runtime)
        ledger.at(step, now=True)
        summary = config.run.folder / "summary.json"
        if step >= total_steps and summary.exists():
            if runtime.leads:
                print(f"{summary}: the run ended at step {step}, and {total_steps} are asked for.")
            return
        if runtime.leads:
            write_text(config.run.folder / "config.toml", to_toml(config))
        with (
            Recorder(config, runtime, step, total_steps, order.steps_per_epoch, ledger) as recorder,
            Saver(
                folder,
                facts,
                runtime,
                keep=config.checkpoint.keep,
                keep_every_steps=config.checkpoint.keep_every_steps,
                settings=to_toml(config),
            ) as saver,
            closing(_batches(config, runtime, dataset, order, step)) as batches,
            any_rank(preemption.asked, runtime.ranks) as asked_to_stop,
        ):
            if runtime.watchdog is not None:
                runtime.watchdog.follow(ledger, saver)
            reached = _loop(
                config,
                runtime,
                model,
                batches,
                evaluation,
                recorder,
                saver,
                asked_to_stop,
                step,
                total_steps,
            )
            if reached < total_steps:
                raise Preempted(f"stopped as asked, after the checkpoint of step {reached}.")


def look_before(config: Config, runtime: Runtime) -> list[Finding]:
    """Return what a look at the machines finds, before a run or instead of it. Collective."""
    dataset, order, _ = _data(config)
    return preflight(config, runtime, dataset, lambda: _batches(config, runtime, dataset, order, 0))


def _refuse_crash_loop(
    config: Config, runtime: Runtime, before: list[dict[str, Any]], settings: str
) -> None:
    allowed = config.run.fruitless_starts
    failed = fruitless(before, settings)
    if not from_leader(int(0 < allowed <= len(failed)), runtime.ranks):
        return
    causes = [
        f"at step {start.reached}: {start.end['cause'] if start.end else 'killed'}"
        for start in failed[-allowed:]
    ]
    raise CrashLoopError(
        f"run.fruitless_starts = {allowed}: so many starts in a row came to no new step"
        + (f" ({'; '.join(causes)})" if causes else "")
        + ". Repair the cause and start once with run.fruitless_starts=0, or with other settings."
    )


def _loop(
    config: Config,
    runtime: Runtime,
    model: Model,
    batches: Batches,
    evaluation: Evaluation,
    recorder: Recorder,
    saver: Saver,
    asked_to_stop: Callable[[], bool],
    step: int,
    total_steps: int,
) -> int:
    """From ``step`` on to the end of the run, or to where it is asked to stop; return the step."""
    ledger = recorder.ledger
    if step == 0 or step >= total_steps:
        with ledger.spending("other"):
            recorder.validated(step, evaluation.measure(model))
    ledger.switch("train")
    stop, pairs = False, _with_next(batches, want_next=model.head.optimizer.stages)
    while step < total_steps and not stop:
        with recorder.waiting():
            (images, identities, replaced), next_identities = next(pairs)
        recorder.bad_images.note(replaced)
        rate = learning_rate(
            step, peak=config.optimizer.lr, total_steps=total_steps, **config.schedule.model_dump()
        )
        saver.check()
        refuse_interrupted()
        if next_identities is not None:
            model.head.prefetch(next_identities)
        done = train_step(model, config, images, identities, rate)
        step += 1
        ledger.at(step)
        recorder.stepped(step, done, rate)
        verify = _due(step, config.verification.every_steps, total_steps)
        stop = asked_to_stop()
        save = stop or _due(step, config.checkpoint.every_steps, total_steps)
        if not (verify or save):
            continue
        recorder.refuse_unsound()
        with recorder.pausing():
            average_buffers(model.backbone, runtime.ranks)
            if verify:  # before the checkpoint, so that no kill leaves a step without it
                with ledger.spending("other"):
                    recorder.validated(step, evaluation.measure(model))
            if save:
                with ledger.spending("save"):
                    saver.save(step, model)
                ledger.at(step, now=True)
    with ledger.spending("save"):
        saver.wait()
    if step >= total_steps:
        with ledger.spending("other"):
            recorder.finish()
    return step


def train_step(
    model: Model, config: Config, images: Tensor, identities: Tensor, rate: float
) -> Step:
    """Take one optimizer step on this rank's part of the global batch. Collective.

    The host waits for a GPU in the sampler only (``sample_rate`` < 1). Where the loss or the
    gradient is not finite, the device itself leaves all weights and statistics as they are, on
    every rank.

    Args:
        model: What is trained.
        config: Accumulation, clipping and the rate of the centers.
        images: [b, 3, S, S] on the device.
        identities: int64 [b].
        rate: Learning rate of the backbone.
    """
    head, optimizer, scaler = model.head, model.optimizer, model.scaler
    parts = config.optimizer.accumulation
    for group in optimizer.param_groups:
        group["lr"] = rate
    head.optimizer.param_groups[0]["lr"] = rate * config.head.optimizer.lr_factor

    # Dropout and drop path are functions of seed, step and rank too, so that a resume repeats them.
    torch.manual_seed(key(config.run.seed, "dropout", head.optimizer.steps, head.ranks.rank))
    buffers = (*model.backbone.buffers(), *head.buffers())
    statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in statistics]
    loss = torch.zeros((), device=images.device)
    terms: dict[str, Tensor] = {}
    if parts > 1:
        head.sample_step(identities)
    pieces = zip(images.chunk(parts), identities.chunk(parts), strict=True)
    for number, (part, own) in enumerate(pieces, 1):
        with _gradients_stay_local(model, number < parts):
            embeddings = model.embed(part)
            part_loss = (head(embeddings, own) + model.losses(embeddings, own)) / parts
            scaler.scale(part_loss).backward()
        loss += part_loss.detach()
        for name, value in {**head.terms, **model.losses.terms}.items():
            terms[name] = terms.get(name, 0) + value / parts

    scaler.unscale_(optimizer)
    parameters = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or math.inf)
    skipped = 1.0 - (loss.isfinite() & norm.isfinite()).float()
    # As GradScaler tells an optimizer, but one verdict for backbone and centers, on all ranks.
    _tell(optimizer, grad_scale=None, found_inf=skipped)
    loss_scale = scaler.scale(torch.ones_like(loss))
    if not config.head.overlap:  # the verdict is known after the backbone's backward only
        _tell(head.optimizer, grad_scale=loss_scale, found_inf=skipped)
    optimizer.step()
    head.optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    for buffer, old in zip(statistics, before, strict=True):  # they saw the bad batch already
        buffer.copy_(torch.where(skipped > 0, old, buffer))
    return Step(loss, norm, skipped, loss_scale, terms)


def _tell(optimizer: Any, *, grad_scale: Tensor | None, found_inf: Tensor) -> None:
    """Both of torch's fused optimizers and ours read these two, on the device."""
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf


def _gradients_stay_local(model: Model, stay: bool) -> AbstractContextManager[None]:
    """DDP averages gradients once a step, in the backward of the last micro-batch."""
    if stay and isinstance(model.replica, DistributedDataParallel):
        local: AbstractContextManager[None] = model.replica.no_sync()
        return local
    return nullcontext()


def _data(config: Config) -> tuple[DataSet, Order, int]:
    """The training images, their order and the steps of the run."""
    try:
        data = config.data
        dataset = open_dataset(data.train, data.skip)
        order = Order(
            len(dataset),
            data.global_batch,
            config.run.seed,
            data.last_batch,
            arrangement(
                dataset,
                images_per_identity=data.images_per_identity,
                block=data.block,
                block_window=data.block_window,
            ),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.train: {error}") from error
    steps = config.run.steps
    if steps is None:
        assert config.run.epochs is not None
        steps = max(1, round(config.run.epochs * order.steps_per_epoch))
    if config.schedule.warmup_steps >= steps:
        raise ConfigError(
            f"schedule.warmup_steps = {config.schedule.warmup_steps}: must be fewer than the "
            f"{steps} steps of the run ({order.steps_per_epoch} steps an epoch)."
        )
    return dataset, order, steps


def _batches(
    config: Config, runtime: Runtime, dataset: DataSet, order: Order, step: int
) -> Batches:
    stream = Stream(
        dataset=dataset,
        order=order,
        augmentation=augmentation_of(config),
        image_size=config.data.image_size,
        rank=runtime.ranks.rank,
        world_size=runtime.ranks.size,
    )
    try:
        return open_batches(
            stream,
            step * config.data.global_batch,
            device=runtime.device,
            loader=config.data.loader,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def augmentation_of(config: Config) -> Augmentation:
    """Return the random changes that the settings ask for."""
    data = config.data
    return Augmentation(shift=data.shift, flip=data.flip, **data.augment.model_dump())


def _with_next(batches: Batches, *, want_next: bool) -> Iterator[tuple[Batch, Tensor | None]]:
    """Yield every batch and, if wanted, the identities of the one behind it."""
    batch = _next(batches)
    while True:
        ahead = _next(batches) if want_next else None
        yield batch, None if ahead is None else ahead[1]
        batch = _next(batches) if ahead is None else ahead


def _next(batches: Batches) -> Batch:
    try:
        return next(batches)
    except ValueError as error:
        raise DataError(str(error)) from error


def facts_of(config: Config, dataset: DataSet) -> dict[str, object]:
    """Return what must be the same for a run to go on from a checkpoint; all else may change."""
    return {
        checkpoint.CONFIG_HASH: config_hash(config),
        "pack": dataset.fingerprint,
        "run.seed": config.run.seed,
        "data.global_batch": config.data.global_batch,
        "data.last_batch": config.data.last_batch,
        "data.images_per_identity": config.data.images_per_identity,
        "data.block": config.data.block,
        "data.block_window": config.data.block_window,
        "data.image_size": config.data.image_size,
        "backbone.name": config.backbone.name,
        "backbone.embedding_dim": config.backbone.embedding_dim,
        "precision.compute": config.precision.compute,
        "optimizer.name": config.optimizer.name,
        "head.optimizer.name": config.head.optimizer.name,
        "head.optimizer.momentum_format": getattr(config.head.optimizer, "momentum_format", None),
        "head.optimizer.unsampled": getattr(config.head.optimizer, "unsampled", None),
        "head.sample_rate": config.head.sample_rate,
        "head.compute": config.head.compute,
        "head.center_format": config.head.center_format,
        "head.margin": config.head.margin.model_dump(mode="json"),
        "losses": config.losses.model_dump(mode="json"),
    }


def _due(step: int, every: int, total_steps: int) -> bool:
    return step == total_steps or (every > 0 and step % every == 0)
