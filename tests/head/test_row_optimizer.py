"""The row rules and formats against torch's dense optimizers and fp64 references."""

import copy
import math

import pytest
import torch
from torch import nn

from partialfc import ArcFace, CosFace, RowAdagrad, RowAdamW, RowSGD
from partialfc.head.plan import Machine, decide
from partialfc.head.rows.catch_up import Moves
from partialfc.head.rows.formats import decode, encode, noise
from partialfc.head.rows.rules import RowRule
from partialfc.head.tiles.positives import Positives
from partialfc.keyed import key
from tests.support import reference
from tests.support.heads import flat_head

STEPS = 200


def rate(step):
    return 0.05 * (1 + math.cos(step / 20)) + 0.001


def gradient_of(step, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).double()


def run_rule(rule: RowRule, start, sampled_at):
    """Apply the rule to the sampled rows of each step, in fp32."""
    rows, states = start.float().clone(), rule.new_states(start.float())
    group = {name: getattr(rule, name) for name in rule.__dataclass_fields__}
    for step in range(STEPS):
        group["lr"] = rate(step)
        index = sampled_at(step)
        gradient = gradient_of(step, start.shape)[index].float()
        old = {name: state[index] for name, state in states.items()}
        new_rows = rows[index]
        rule.update_(group, new_rows, gradient, old)
        rows[index] = new_rows
        for name, value in old.items():
            states[name][index] = value
    return rows, states


def run_torch(make, start):
    parameter = nn.Parameter(start.clone())
    optimizer = make([parameter])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate(step)
        parameter.grad = gradient_of(step, start.shape)
        optimizer.step()
    return parameter.detach()


START = torch.randn(6, 5, generator=torch.Generator().manual_seed(99)).double()
EVERY_ROW = torch.arange(6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_on_all_rows_is_torch_sgd(momentum):
    rule = RowSGD(momentum=momentum, weight_decay=5e-3)
    rows, _ = run_rule(rule, START, lambda step: EVERY_ROW)
    truth = run_torch(
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=momentum, weight_decay=5e-3), START
    )
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-5)


def test_adamw_on_all_rows_is_torch_adamw():
    rule = RowAdamW(betas=(0.8, 0.95), weight_decay=0.02)
    rows, _ = run_rule(rule, START, lambda step: EVERY_ROW)
    truth = run_torch(
        lambda p: torch.optim.AdamW(p, lr=1.0, betas=(0.8, 0.95), weight_decay=0.02), START
    )
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["rows", "gradient", "momentum"])
def test_rows_of_another_layout_are_refused(which):
    """torch's fused SGD takes them for contiguous ones, and says nothing."""
    layouts = {name: torch.zeros(5, 6) for name in ("rows", "gradient", "momentum")}
    layouts[which] = torch.zeros(6, 5).T
    group = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    with pytest.raises(AssertionError):
        RowSGD.update_(
            group, layouts["rows"], layouts["gradient"], {"momentum": layouts["momentum"]}
        )


def sampled_at(step):
    """Every row but at its own pace; row 5 never."""
    return torch.tensor([row for row in range(5) if step % (row + 1) == 0])


def test_lazy_sgd_moves_a_row_only_when_it_is_sampled():
    rule = RowSGD(momentum=0.9, weight_decay=5e-3)
    rows, states = run_rule(rule, START, sampled_at)
    truth, velocity = START.clone(), torch.zeros_like(START)
    for step in range(STEPS):
        for row in sampled_at(step).tolist():
            gradient = gradient_of(step, START.shape)[row] + 5e-3 * truth[row]
            velocity[row] = 0.9 * velocity[row] + gradient
            truth[row] -= rate(step) * velocity[row]
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states["momentum"].double(), velocity, rtol=1e-4, atol=1e-5)
    assert torch.equal(rows[5], START[5].float())


def test_adamw_corrects_a_row_by_its_own_number_of_updates():
    """Counting the run's steps instead would make the first update of a rare row far too small."""
    rule = RowAdamW(betas=(0.9, 0.999), weight_decay=0.02, eps=1e-8)
    rows, states = run_rule(rule, START, sampled_at)
    truth, first, second = START.clone(), torch.zeros_like(START), torch.zeros_like(START)
    updates = [0] * 6
    for step in range(STEPS):
        for row in sampled_at(step).tolist():
            gradient = gradient_of(step, START.shape)[row]
            updates[row] += 1
            first[row] = 0.9 * first[row] + 0.1 * gradient
            second[row] = 0.999 * second[row] + 0.001 * gradient**2
            mean = first[row] / (1 - 0.9 ** updates[row])
            root = (second[row] / (1 - 0.999 ** updates[row])).sqrt() + 1e-8
            truth[row] = truth[row] * (1 - rate(step) * 0.02) - rate(step) * mean / root
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-4)
    assert states["updates"].squeeze(1).tolist() == updates


def test_adagrad_divides_a_row_by_the_root_of_its_own_sum():
    rule = RowAdagrad(weight_decay=0.02, eps=1e-8)
    rows, states = run_rule(rule, START, sampled_at)
    truth, total = START.clone(), torch.zeros(6, dtype=torch.float64)
    for step in range(STEPS):
        for row in sampled_at(step).tolist():
            gradient = gradient_of(step, START.shape)[row] + 0.02 * truth[row]
            total[row] += gradient.square().mean()
            truth[row] -= rate(step) * gradient / (total[row].sqrt() + 1e-8)
    torch.testing.assert_close(rows.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states["square_sum"].squeeze(1).double(), total, rtol=1e-5, atol=0)


IDENTITIES, DIM, BATCH = 60, 16, 12
MARGIN = CosFace(scale=16, additive=0.2)


def heads_batch(step):
    generator = torch.Generator().manual_seed(1000 + step)
    embeddings = torch.randn(BATCH, DIM, generator=generator)
    return embeddings, torch.randint(0, IDENTITIES, (BATCH,), generator=generator)


def train_head(rule, *, rate_of, steps, **settings):
    """A head, and the same training of fp64 centers with a dense optimizer of torch's."""
    head = flat_head(IDENTITIES, DIM, MARGIN, sample_rate=0.4, optimizer=rule, **settings)
    centers = nn.Parameter(center_rows(head).double())
    dense = torch.optim.SGD(
        [centers], lr=1.0, momentum=rule.momentum, weight_decay=rule.weight_decay
    )
    losses = []
    for step in range(steps):
        embeddings, labels = heads_batch(step)
        head.optimizer.param_groups[0]["lr"] = dense.param_groups[0]["lr"] = rate_of(step)
        rows = head.sampler(step, labels).rows
        loss = head(embeddings, labels)
        loss.backward()
        head.optimizer.step()
        truth, _, centers.grad = reference.gradients_of(
            embeddings,
            centers.detach(),
            labels,
            reference.positive_logit(MARGIN),
            scale=MARGIN.scale,
            sampled=rows.sort().values,
        )
        losses.append((loss.item(), truth.item()))
        if rule.unsampled == "move":
            dense.step()
        else:
            lazy_step(dense, centers, rows)
    return head, centers.detach(), losses


def lazy_step(dense, centers, rows):
    """torch's step, undone for the rows that were not sampled."""
    others = torch.ones(IDENTITIES, dtype=torch.bool)
    others[rows] = False
    kept = centers.detach()[others].clone()
    velocity = dense.state[centers].get("momentum_buffer")
    old = torch.zeros_like(centers) if velocity is None else velocity.clone()
    dense.step()
    centers.data[others] = kept
    if "momentum_buffer" in dense.state[centers]:
        dense.state[centers]["momentum_buffer"][others] = old[others]


def center_rows(head):
    return decode(head.centers.detach(), head.optimizer.states().get("centers_scale"))


def slowly(step):
    return 0.02 * (1 + math.cos(step / 20)) + 0.001


@pytest.mark.parametrize("unsampled", [pytest.param("stay", marks=pytest.mark.slow), "move"])
@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_three_hundred_steps_on_sampled_rows_equal_dense_fp64(unsampled, momentum):
    """With "move" the truth is torch.optim.SGD on all rows at every step, as in arcface_torch."""
    rule = RowSGD(momentum=momentum, weight_decay=5e-3, unsampled=unsampled)
    head, truth, losses = train_head(rule, rate_of=slowly, steps=300)
    head.optimizer.catch_up(None)
    assert reference.relative_error(center_rows(head), truth) < 3e-6
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=3e-6)


def test_rows_that_move_differ_from_rows_that_stay():
    """Or the test above would prove nothing."""
    ends = [
        train_head(RowSGD(weight_decay=5e-3, unsampled=unsampled), rate_of=slowly, steps=40)[1]
        for unsampled in ("stay", "move")
    ]
    assert reference.relative_error(ends[0], ends[1]) > 0.02


def test_a_skipped_step_moves_no_unsampled_row():
    rule = RowSGD(weight_decay=0.5, unsampled="move")
    head, _, _ = train_head(rule, rate_of=slowly, steps=3)
    head.optimizer.catch_up(None)
    before = head.centers.detach().clone()
    embeddings, labels = heads_batch(3)
    embeddings[0] = torch.nan
    head(embeddings, labels).backward()
    head.optimizer.step()
    head.optimizer.catch_up(None)
    assert torch.equal(head.centers, before)


def test_moves_are_the_products_of_all_steps_however_many():
    """In blocks, a wrong one would be met by rows that were not sampled for very long only."""

    def rates(step):
        return {"lr": slowly(step), "momentum": 0.9 if step % 11 else 0.5, "weight_decay": 5e-3}

    steps = 2600
    moves, loaded = Moves(torch.device("cpu")), Moves(torch.device("cpu"))
    for step in range(steps):
        skip = torch.tensor(step % 5 == 0) if step % 10 else None
        moves.extend(rates(step), skip)
        if step == 1500:
            loaded.load(moves.products.clone())
        elif step > 1500:
            loaded.extend(rates(step), skip)
    assert torch.equal(loaded.products, moves.products), "a checkpoint goes on bit for bit"
    asked = torch.tensor([0, 1, 900, 1023, 1024, 1025, 2047, 2048, 2049, 2599, 2600])
    expected = []
    for first in asked.tolist():
        product = torch.eye(2, dtype=torch.float64)
        for step in range(first, steps):
            if step % 5 or step % 10 == 0:
                eta, mu, decay = rates(step).values()
                values = [[1 - eta * decay, -eta * mu], [decay, mu]]
                product = torch.tensor(values, dtype=torch.float64) @ product
        expected.append(product)
    torch.testing.assert_close(moves.since(asked), torch.stack(expected), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2, 2), torch.zeros(4, 2).double()], ids=str)
def test_moves_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=r"moves must be float64 \[steps \+ 1, 2, 2\]"):
        Moves(torch.device("cpu")).load(wrong)


def test_at_a_sample_rate_of_1_no_row_misses_anything_and_nothing_is_kept_of_it():
    """Neither a state nor an entry of the checkpoint, and the training of rows that stay."""
    ends = []
    for unsampled in ("move", "stay"):
        head = flat_head(IDENTITIES, DIM, MARGIN, optimizer=RowSGD(unsampled=unsampled))
        for step in range(3):
            head(*heads_batch(step)).backward()
            head.optimizer.step()
        assert set(head.optimizer.states()) == {"momentum"}
        assert not head.shared_state()
        ends.append(head)
    assert torch.equal(ends[0].centers, ends[1].centers)
    ends[0].optimizer.load_state_dict(ends[1].optimizer.state_dict())


@pytest.mark.parametrize("saved", ["stay", "move"])
def test_a_state_of_rows_that_stay_is_none_of_rows_that_move(saved):
    """It was loaded, and rows then did what the state said, not the rule."""
    heads = {
        unsampled: train_head(RowSGD(unsampled=unsampled), rate_of=slowly, steps=1)[0]
        for unsampled in ("stay", "move")
    }
    state = heads.pop(saved).optimizer.state_dict()
    (other,) = heads.values()
    with pytest.raises(ValueError, match=f"unsampled rows of this state {saved}, and here they"):
        other.optimizer.load_state_dict(state)


@pytest.mark.parametrize("unsampled", [pytest.param("stay", marks=pytest.mark.slow), "move"])
@pytest.mark.parametrize(
    ("center_format", "momentum_format", "tolerance"),
    [
        pytest.param("fp16", "fp32", 6e-3, marks=pytest.mark.slow),
        pytest.param("bf16", "fp32", 4e-2, marks=pytest.mark.slow),
        pytest.param("fp32", "bf16", 8e-3, marks=pytest.mark.slow),
        pytest.param("fp32", "int8", 2e-2, marks=pytest.mark.slow),
        ("fp16", "int8", 2e-2),
        pytest.param("fp8", "int8", 0.25, marks=pytest.mark.slow),
    ],
)
def test_few_bits_stay_near_fp64_over_hundreds_of_steps(
    center_format, momentum_format, tolerance, unsampled
):
    """A random walk of roundings ends at about sqrt(updates) spacings; a bias would pile up."""
    rule = RowSGD(weight_decay=5e-3, momentum_format=momentum_format, unsampled=unsampled)
    head, truth, losses = train_head(rule, rate_of=slowly, steps=300, center_format=center_format)
    head.optimizer.catch_up(None)
    assert head.centers.dtype is not torch.float32 or center_format == "fp32"
    assert reference.relative_error(center_rows(head), truth) < tolerance
    ours, theirs = (sum(column) for column in zip(*losses, strict=True))
    assert ours == pytest.approx(theirs, rel=3e-3 if center_format == "fp8" else 1e-3)


@pytest.mark.parametrize("into", ["bf16", "fp16"])
def test_tiny_updates_do_not_vanish(into):
    """Round-to-nearest would leave every row where it was: each update is 1/8 of a step."""
    step = {"bf16": 2.0**-8, "fp16": 2.0**-11}[into]
    row, identities = torch.full((64, 32), 1.5), torch.arange(64)
    for update in range(400):
        stored, scale = encode(row - step / 8, into, noise(key(0, "test", update), identities, 32))
        row = decode(stored, scale)
    assert (1.5 - row).mean().item() == pytest.approx(50 * step, rel=0.02)


@pytest.mark.parametrize("into", ["bf16", "fp16", "fp8", "int8"])
def test_rounding_is_unbiased_and_to_a_neighbour(into):
    rows = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 0.01
    rows[3], rows[4, 5] = 0, 3.0
    identities, total = torch.arange(50), torch.zeros(50, 30, dtype=torch.float64)
    draws = 2000
    for draw in range(draws):
        stored, scale = encode(rows, into, noise(key(0, "test", draw), identities, 30))
        value = decode(stored, scale)
        total += value
    largest = rows.abs().amax(1, keepdim=True)
    bits = {"bf16": 7, "fp16": 10, "fp8": 3}
    spacing = largest / 127 if into == "int8" else rows.abs() * 2.0 ** -bits[into]
    spacing += (2.0**-16 if into == "fp8" else 1e-9) * largest
    assert ((value - rows).abs() <= spacing * 1.001).all()
    assert ((total / draws - rows).abs() <= 5 * spacing / (2 * math.sqrt(draws))).all()
    assert not value[3].any()


def test_fp8_is_unbiased_down_to_its_smallest_elements():
    """Against fp64: both neighbours, each as often as its nearness says; from 2**8, which the
    largest may become, to elements that it holds as 0 or the smallest, 2**-9."""
    size = 2.0 ** torch.arange(0, -18, -0.25, dtype=torch.float64)
    row = (1.99 * size * torch.tensor([1, -1], dtype=torch.float64).repeat(36)).float()
    row_TD, number_T = torch.stack([row, row * 2.0**-90, row * 0]), torch.arange(3)
    draws = 1500
    scale = 2.0 ** torch.tensor([[-7.0], [-97.0]], dtype=torch.float64)
    unit_TD = row_TD[:2].double() / scale
    power_TD = 2.0 ** unit_TD.abs().log2().floor().clamp(min=-6)
    low_TD = (unit_TD * 8 / power_TD).floor()
    part_TD = unit_TD * 8 / power_TD - low_TD
    up_TD = torch.zeros_like(unit_TD)
    for draw in range(draws):
        stored_TD, scale_T1 = encode(row_TD, "fp8", noise(key(0, "test", draw), number_T, 72))
        assert torch.equal(scale_T1[:2].double(), scale)
        assert not decode(stored_TD, scale_T1)[2].any()
        gone_TD = stored_TD[:2].double() * 8 / power_TD - low_TD
        assert ((gone_TD == 0) | (gone_TD == 1)).all()
        up_TD += gone_TD
    assert part_TD.max() > 0.9
    assert stored_TD.float().abs().max() == 256
    deviation_TD = (part_TD * (1 - part_TD) / draws).sqrt()
    assert ((up_TD / draws - part_TD).abs() <= 5 * deviation_TD + 2.0**-16).all()


def test_what_fp8_holds_stays_and_what_is_not_finite_shows():
    """Else a row that nothing moves would wander, and a broken one would look like another."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    row_TD = every[every.abs() < 256].view(1, -1) * 2.0**-20  # no NaN, and none beyond a row's
    for draw in (0, 1, 1 << 15, 65535):
        drawn = torch.full(row_TD.shape, draw, dtype=torch.int32)
        stored_TD, scale_T1 = encode(row_TD, "fp8", drawn)
        assert torch.equal(decode(stored_TD, scale_T1), row_TD)
    for bad in (torch.inf, -torch.inf, torch.nan):
        stored_TD, scale_T1 = encode(torch.tensor([[1.0, bad]]), "fp8", drawn[:, :2])
        assert decode(stored_TD, scale_T1)[0, 1].isnan()


def test_fp8_rows_go_by_torch_where_triton_cannot_read_them():
    """Its compiler refuses e4m3 before Ada, in words that name no setting."""
    asked = {"dim": 512, "unit_centers": True, "centers_per_identity": 1, "binary": False}
    asked |= {"sgd": True, "compute": "bf16", "fused": False}
    machines = (((8, 0), False), ((8, 0), True), ((8, 9), True), ((9, 0), True))
    paths = [decide(Machine("cuda", True, gpu), **asked, fp8=fp8).path for gpu, fp8 in machines]
    assert paths == ["triton", "torch", "triton", "triton"]


def test_rounding_depends_on_the_identity_not_on_the_shard():
    """Else another number of ranks would train other centers."""
    whole = noise(5, torch.arange(100), 30)
    assert torch.equal(noise(5, torch.arange(40, 60), 30), whole[40:60])
    assert not torch.equal(noise(6, torch.arange(100), 30), whole)
    assert whole.min() >= 0
    assert whole.max() < 1 << 16
    assert whole.float().mean().item() == pytest.approx(32767.5, rel=0.02)


@pytest.mark.parametrize(
    "rule",
    [
        RowSGD(momentum_format="int8", unsampled="move"),
        RowSGD(momentum_format="bf16", unsampled="stay"),
        RowAdamW(lr=0.01),
        RowAdagrad(),
    ],
    ids=["sgd-int8-move", "sgd-bf16-stay", "adamw", "adagrad"],
)
@pytest.mark.parametrize("center_format", ["fp32", "bf16", "fp16", "fp8"])
def test_every_format_resumes_bit_for_bit_from_state_dicts(rule, center_format):
    """torch's load_state_dict casts states to the parameter's dtype; ours must not."""

    def new():
        return flat_head(
            IDENTITIES,
            DIM,
            ArcFace(scale=16),
            sample_rate=0.4,
            optimizer=rule,
            center_format=center_format,
        )

    def run(head, steps):
        for step in steps:
            embeddings, labels = heads_batch(step)
            head(embeddings, labels).backward()
            head.optimizer.step()

    straight, first, resumed = new(), new(), new()
    run(straight, range(20))
    run(first, range(10))
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    run(resumed, range(10, 20))
    rows = (head.centers.detach().view(torch.uint8) for head in (resumed, straight))
    assert torch.equal(*rows)
    ours, theirs = resumed.optimizer.states(), straight.optimizer.states()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


class _There(torch.Tensor):
    """A tensor of the host that says it is a GPU's."""

    is_cuda = True


def test_positives_that_a_gpu_adds_are_those_that_the_host_finds():
    """The host may not ask a GPU where a tile's positives begin: that waits for all of backward."""
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([3, -1, 9, 3, 0, 3, -1, 7, 9, 11])
    own = Positives.of(
        [target], [torch.rand(10, generator=generator)], [torch.rand(10, 4, generator=generator)]
    )
    factor = torch.rand(12, 1, generator=generator)
    for start, stop in ((0, 4), (4, 7), (7, 12)):
        here, there = torch.ones(stop - start, 4), torch.ones(stop - start, 4)
        own.add_(here, start, factor[start:stop])
        own.add_(there.as_subclass(_There), start, factor[start:stop])
        torch.testing.assert_close(there, here)
        assert here.ne(1).any() == (start != 4)
