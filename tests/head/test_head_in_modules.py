"""A head inside the modules, wrappers and copies that training loops of others are made of."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from partialfc import ArcFace, CurricularFace, Precision, RowSGD
from tests.support.heads import flat_head
from tests.support.ranks import run_on_ranks

IDENTITIES, DIM, BATCH = 101, 8, 12  # of an odd number one rank has one more


class Recognition(nn.Module):
    """Backbone and head in one module, as Lightning has them."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM))
        settings = {"margin": CurricularFace(scale=16), "sample_rate": 0.5, **settings}
        margin = settings.pop("margin")
        self.head = flat_head(IDENTITIES, DIM, margin, optimizer=RowSGD(lr=0.5), **settings)

    def forward(self, images, identities):
        return self.head(self.backbone(images), identities)


def batch_of(step, rank=0, world_size=1):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, DIM, generator=generator)
    identities = torch.randint(0, IDENTITIES, (BATCH,), generator=generator)
    return images.chunk(world_size)[rank], identities.chunk(world_size)[rank]


def train(forward, optimizers, rank=0, world_size=1, steps=5):
    losses = []
    for step in range(steps):
        loss = forward(*batch_of(step, rank, world_size))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def wrapped_on_rank(rank, world_size, wrap):
    module = Recognition()
    optimizers = torch.optim.SGD(module.parameters(), lr=0.1), module.head.optimizer
    if wrap == "the whole":
        forward = DistributedDataParallel(module.to("cpu"))
    elif wrap == "FSDP":
        forward = fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
        optimizers = torch.optim.SGD(module.parameters(), lr=0.1), module.head.optimizer
    else:
        replica = DistributedDataParallel(module.backbone)

        def forward(images, identities):
            return module.head(replica(images), identities)

    losses = train(forward, optimizers, rank, world_size)
    return losses, module.head.centers.detach(), len(module.head.owned)


@pytest.mark.distributed
def test_ddp_around_backbone_and_head_changes_no_bit():
    """It gave all ranks the centers of rank 0, and the loss never came down."""
    together = run_on_ranks(2, wrapped_on_rank, "the whole")
    apart = run_on_ranks(2, wrapped_on_rank, "the backbone")
    for one, other in zip(together, apart, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    assert together[0][2] != together[1][2]
    assert not torch.equal(together[0][1][: len(together[1][1])], together[1][1][: together[0][2]])


@pytest.mark.distributed
def test_fsdp_around_backbone_and_head_leaves_the_centers_alone():
    sharded = run_on_ranks(2, wrapped_on_rank, "FSDP")
    plain = run_on_ranks(2, wrapped_on_rank, "the backbone")
    for one, other in zip(sharded, plain, strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-6)


def spoiled_on_rank(rank, world_size, how):
    module = Recognition()
    if how == "broadcast":
        fewest = min(len(module.head.sharding.owned(rank)) for rank in range(world_size))
        dist.broadcast(module.state_dict()["head.centers"][:fewest], 0)
    elif how == "one seed":
        nn.init.normal_(module.head.centers, generator=torch.Generator().manual_seed(7))
    else:
        nn.init.zeros_(module.head.centers)
    try:
        module(*batch_of(0, rank, world_size))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["broadcast", "one seed", "nothing to tell apart"])
def test_centers_that_are_a_copy_of_another_ranks_are_refused_by_the_first_forward(how):
    messages = run_on_ranks(2, spoiled_on_rank, how)
    assert messages[0] == messages[1]
    assert ("those of rank 1 are a copy of those of rank 0" in messages[0]) == (how[0] in "bo")


def test_what_is_done_to_parameters_is_not_done_to_centers():
    """A cast would drop bits, and another optimizer would change rows that no step sampled."""
    module = Recognition()
    before = module.head.centers.detach().clone()
    assert not [name for name, _ in module.named_parameters() if "head" in name]
    module.bfloat16()
    assert torch.equal(module.head.centers, before)
    with pytest.raises(ValueError, match='construct it with device="meta"'):
        module.to("meta")


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_has_the_centers_under_their_name(assign):
    """Saved as any parameter, and loaded into the tensor that the optimizer changes."""
    one, other = Recognition(), Recognition(margin=CurricularFace(scale=16))
    module = one.head
    train(one, [module.optimizer])
    state = copy.deepcopy(one.state_dict())
    assert next(name for name in state if name.startswith("head.")) == "head.centers"
    assert one.state_dict(keep_vars=True)["head.centers"] is module.centers
    held = other.head.centers
    other.load_state_dict(state, assign=assign)
    assert other.head.centers is held
    assert torch.equal(held, module.centers)
    del state["head.centers"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"head\.centers"'):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        AveragedModel,
        lambda module: torch.save(module, io.BytesIO()),
        lambda module: copy.deepcopy(module.head),
        lambda module: copy.deepcopy(module.head.optimizer),
    ],
    ids=["deepcopy", "AveragedModel", "save", "deepcopy of the head", "of its optimizer"],
)
def test_a_copy_is_refused_where_it_is_made(copied):
    """It broke in its first forward, or would never have followed the centers."""
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\)"):
        copied(Recognition())


@pytest.mark.parametrize("what", ["head", "module", "step"])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_compiler_leaves_the_head_as_it_is(what, rate):
    """The sampler ended in an internal error of dynamo."""
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        module = Recognition(sample_rate=rate)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1), module.head.optimizer]

        def forward(images, identities, module=module):
            return module.head(module.backbone(images), identities)

        if compiled and what == "head":
            head = torch.compile(module.head, backend="eager")

            def forward(images, identities, module=module, head=head):
                return head(module.backbone(images), identities)

        elif compiled and what == "module":
            forward = torch.compile(module, backend="eager")
        whole = torch.compile(train, backend="eager") if compiled and what == "step" else train
        results.append((whole(forward, optimizers), module.head.centers.detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": "arcface"}, r"margin must be a Margin, as ArcFace\(\), got 'arcface'\."),
        ({"margin": ArcFace}, r"got the class ArcFace\. Write ArcFace\(\)\."),
        ({"margin": None}, r"margin must be a Margin, as ArcFace\(\), got None\."),
        ({"optimizer": torch.optim.SGD}, r"as RowSGD\(lr=0\.1\), got the class SGD\."),
        ({"optimizer": RowSGD}, r"got the class RowSGD\. Write RowSGD\(\)\."),
        ({"precision": "bf16"}, r'as Precision\(compute="bf16"\), got \'bf16\'\.'),
        ({"memory": Precision()}, r"memory must be a Memory, as .*, got Precision\("),
        ({"kernels": True}, r"kernels must be a Kernels, as Kernels\(fused=True\), got True\."),
    ],
    ids=str,
)
def test_an_argument_of_another_type_is_refused_with_what_is_wanted(settings, message):
    from partialfc import PartialFC

    with pytest.raises(TypeError, match=message):
        PartialFC(100, 16, **{"margin": ArcFace(), **settings})
