"""GradScaler with an optimizer for the backbone and that of the head, as torch's recipe has it."""

import pytest
import torch

from partialfc import ArcFace, RowSGD
from tests.support import reference
from tests.support.heads import flat_head
from tests.support.ranks import run_on_ranks

IDENTITIES, DIM, BATCH, PARTS, STEPS = 60, 8, 24, 3, 4
MARGIN = ArcFace(scale=16, gradient="exact")
CLIP = 0.05


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, DIM, generator=generator)
    return images, torch.randint(0, IDENTITIES, (BATCH,), generator=generator)


def backbone():
    torch.manual_seed(0)
    return torch.nn.Linear(DIM, DIM, bias=False)


def truth():
    """Weights and centers after all steps, unsharded and in fp64, with no loss scale anywhere."""
    weight = backbone().weight.detach().double()
    centers = flat_head(IDENTITIES, DIM, MARGIN).centers.detach().double()
    logit = reference.positive_logit(MARGIN)
    for step in range(STEPS):
        weight, centers = weight.requires_grad_(), centers.requires_grad_()
        images, labels = batch_of(step)
        parts = zip(images.double().chunk(PARTS), labels.chunk(PARTS), strict=True)
        losses = [
            reference.loss_of(part @ weight.T, centers, own, logit, scale=MARGIN.scale)
            for part, own in parts
        ]
        by_weight, by_centers = torch.autograd.grad(sum(losses) / PARTS, (weight, centers))
        assert by_weight.norm() > CLIP
        weight = (weight - by_weight * CLIP / by_weight.norm()).detach()
        centers = (centers - 0.5 * by_centers).detach()
    return weight, centers


def train_on_rank(rank, world_size, recipe):
    net = backbone()
    replica = torch.nn.parallel.DistributedDataParallel(net) if world_size > 1 else net
    rule = RowSGD(lr=0.5, momentum=0.0, weight_decay=0.0)
    head = flat_head(IDENTITIES, DIM, MARGIN, optimizer=rule)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    for step in range(STEPS):
        images, labels = batch_of(step)
        for part, own in zip(images.chunk(PARTS), labels.chunk(PARTS), strict=True):
            mine, ids = part.chunk(world_size)[rank], own.chunk(world_size)[rank]
            scaler.scale(head(replica(mine), ids) / PARTS).backward()
        scaler.unscale_(optimizer)
        clipped = [net.weight]
        if "unscale the centers" in recipe:
            scaler.unscale_(head.optimizer)
            clipped += head.optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(clipped, CLIP)
        scaler.step(optimizer)
        if "step alone" in recipe:
            head.optimizer.step()
        else:
            scaler.step(head.optimizer)
        scaler.update()
        optimizer.zero_grad()
        head.optimizer.zero_grad(set_to_none=step % 2 == 0)
    return net.weight.detach(), head.centers.detach()


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "recipe", ["unscale the centers", "unscale the centers, step alone", "leave it to step"]
)
def test_unscale_reaches_the_kept_micro_batches(recipe, world_size):
    """The scale stayed in them, and centers moved so many times too far; clipping is exact."""
    results = run_on_ranks(world_size, train_on_rank, recipe)
    weight, centers = truth()
    start = flat_head(IDENTITIES, DIM, MARGIN).centers.detach().double()
    found = torch.cat([result[1] for result in results])
    assert reference.relative_error(found - start, centers - start) < 1e-5
    for result in results:
        change = result[0].double() - backbone().weight.detach()
        assert reference.relative_error(change, weight - backbone().weight.detach()) < 1e-5


@pytest.mark.parametrize("how", ["None", "zero_"])
def test_a_loop_that_clears_gradients_by_hand_loses_no_loss_scale(how):
    """What hears of it was taken away, and centers moved so many times too far."""
    moved = []
    for scale in (1.0, 1000.0):
        rule = RowSGD(lr=0.5, momentum=0.0, weight_decay=0.0)
        head = flat_head(IDENTITIES, DIM, MARGIN, optimizer=rule)
        start = head.centers.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for parameter in head.optimizer.param_groups[0]["params"]:
            if how == "None":
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_()
                parameter.grad.zero_()
        scaler.scale(head(*batch_of(0))).backward()
        scaler.unscale_(head.optimizer)
        scaler.step(head.optimizer)
        moved.append(head.centers.detach() - start)
    assert reference.relative_error(moved[1], moved[0].double()) < 1e-5


def test_the_state_of_the_optimizer_has_the_centers_alone():
    """What hears of the scale is in no checkpoint, and states of before load."""
    head = flat_head(IDENTITIES, DIM, MARGIN)
    images, labels = batch_of(0)
    head(images, labels).backward()
    head.optimizer.step()
    state = head.optimizer.state_dict()
    assert state["param_groups"][0]["params"] == [0]
    assert list(state["state"]) == [0]
    head.optimizer.load_state_dict(state)
    assert head.optimizer.state_dict()["param_groups"] == state["param_groups"]
