"""The head on one rank against the fp64 oracle; tests/distributed has the same on several."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from partialfc import ArcFace, CosFace, RowAdamW, RowSGD
from partialfc.head.centers import fill_initial_
from partialfc.head.row_set import RowSet
from partialfc.head.rows.formats import decode
from partialfc.head.tiles import passes
from partialfc.head.tiles.products import scaled_products
from partialfc.head.tiles.torch_steps import project_
from tests.support import reference
from tests.support.heads import flat_head

PLAIN = RowSGD(lr=1.0, momentum=0.0, weight_decay=0.0)
"""The change of the centers is minus their gradient."""


def problem(batch=24, dim=32, identities=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(batch, dim, generator=generator) * 3
    labels = torch.randint(0, identities, (batch,), generator=generator)
    return embeddings, labels


def center_gradient(head, embeddings, identities):
    """Loss, gradient of the embeddings and of the centers, by one plain step."""
    embeddings = embeddings.clone().requires_grad_()
    before = head.centers.detach().clone()
    loss = head(embeddings, identities)
    loss.backward()
    head.optimizer.step()
    return loss.detach(), embeddings.grad, before - head.centers.detach()


def sampled_identities(head, identities):
    rows = head.sampler(head.optimizer.steps, identities).rows
    return torch.arange(len(head.centers)) if rows is None else rows.sort().values


@pytest.mark.parametrize("rate", [1e-9, 0.1, 1.0])
@pytest.mark.parametrize(
    "margin",
    [
        ArcFace(),
        ArcFace(gradient="exact"),
        ArcFace(scale=128),
        ArcFace(scale=16, inter_class_filter=0.1),
        ArcFace(scale=100, inter_class_filter=0.1, gradient="exact"),
        CosFace(scale=30, additive=0.35),
    ],
    ids=lambda m: (
        f"{type(m).__name__}-{m.scale}-{m.inter_class_filter}-{getattr(m, 'gradient', '')}"
    ),
)
def test_loss_and_gradients_equal_the_fp64_oracle(margin, rate):
    embeddings, labels = problem()
    head = flat_head(200, 32, margin, sample_rate=rate, optimizer=PLAIN)
    torch.nn.init.normal_(head.centers, generator=torch.Generator().manual_seed(1))
    truth = reference.gradients_of(
        embeddings,
        head.centers.detach(),
        labels,
        reference.positive_logit(margin),
        scale=margin.scale,
        sampled=sampled_identities(head, labels),
        inter_class_filter=margin.inter_class_filter,
    )
    for value, expected in zip(center_gradient(head, embeddings, labels), truth, strict=True):
        assert reference.relative_error(value, expected) < 1e-5


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of 128 rows in a head of 1000 identities."""
    monkeypatch.setitem(passes.TILE_BYTES, "cpu", 1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("rate", [0.6, 1.0])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("inter_class_filter", [None, 0.1])
def test_kept_exponentials_change_no_result(compute, rate, parts, inter_class_filter):
    """All tiles kept, the first few, or none and computed again: the same bits."""
    embeddings, labels = problem(identities=1000)
    margin = ArcFace(inter_class_filter=inter_class_filter)
    tile = 128 * 24 // parts * (4 if compute == "fp32" else 2)
    ends = []
    for budget, kept in ((0, 0), (2 * tile + 1, 2 * tile), (1 << 30, None)):
        head = flat_head(
            1000,
            32,
            margin,
            sample_rate=rate,
            optimizer=PLAIN,
            compute=compute,
            keep_mib=budget / 2**20,
        )
        before = head.centers.detach().clone()
        head.sample_step(labels)
        own = embeddings.clone().requires_grad_()
        for piece, identities in zip(own.chunk(parts), labels.chunk(parts), strict=True):
            (head(piece, identities) / parts).backward()
        if kept is not None:
            assert head.optimizer.kept_bytes == kept
        else:
            n = 1000 if rate == 1 else 600
            assert head.optimizer.kept_bytes == n * 24 * (4 if compute == "fp32" else 2)
        head.optimizer.step()
        ends.append((own.grad, before - head.centers.detach()))
    for other in ends[1:]:
        assert torch.equal(other[0], ends[0][0])
        assert torch.equal(other[1], ends[0][1])
    assert ends[0][1].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("margin", [ArcFace(), CosFace(scale=30), ArcFace(scale=16)], ids=str)
def test_bf16_is_no_worse_than_plain_bf16_code(margin):
    """Against fp64; the error of an ordinary program in bf16 is what may be lost."""
    ours, plain = [], []
    for seed in range(4):
        embeddings, labels = problem(identities=1000, seed=seed)
        head = flat_head(1000, 32, margin, optimizer=PLAIN, compute="bf16")
        centers = head.centers.detach().clone()
        truth = reference.gradients_of(
            embeddings, centers, labels, reference.positive_logit(margin), scale=margin.scale
        )
        for errors, found in (
            (ours, center_gradient(head, embeddings, labels)),
            (plain, reference.plain_gradients(embeddings, centers, labels, margin, torch.bfloat16)),
        ):
            errors.append(list(map(reference.relative_error, found, truth)))
    for mine, theirs in zip(*(torch.tensor(e).mean(0) for e in (ours, plain)), strict=True):
        assert mine <= 1.02 * theirs


def test_bf16_products_of_bf16_centers_are_as_exact_as_of_fp32_ones():
    """A logit that is rounded before and behind the reciprocal norm loses a third more."""
    errors = {"bf16": 0.0, "fp32": 0.0}
    for seed in range(8):
        embeddings, labels = problem(identities=1000, seed=seed)
        centers = 1.3 * torch.randn(1000, 32, generator=torch.Generator().manual_seed(seed))
        centers = centers.bfloat16().float()
        embeddings = embeddings + 1.5 * centers[labels]
        logit = reference.positive_logit(ArcFace(angular=0.1))
        truth, *_ = reference.gradients_of(embeddings, centers, labels, logit, scale=64)
        for center_format in errors:
            head = flat_head(
                1000, 32, ArcFace(angular=0.1), compute="bf16", center_format=center_format
            )
            head.centers.data.copy_(centers)
            loss = head(embeddings, labels).detach()
            errors[center_format] += float(reference.relative_error(loss, truth))
    assert errors["bf16"] <= 1.02 * errors["fp32"]


def test_an_identity_that_the_sample_was_not_fixed_for_is_refused():
    """It had the target of another row, and a loss of its own making."""
    head = flat_head(100, 8, ArcFace(), sample_rate=0.2)
    head.sample_step(torch.arange(12))
    head(torch.randn(3, 8), torch.tensor([11, 0, 5]))
    with pytest.raises(ValueError, match="identity 12 was not given to sample_step"):
        head(torch.randn(3, 8), torch.tensor([11, 12, 50]))


@pytest.mark.parametrize("center_format", ["bf16", "fp16", "fp8"])
def test_stored_bits_are_read_exactly(center_format):
    """The loss is that of the stored centers, whatever their scale is; gradients too.

    They stay: a row that moved would be rounded once more, between the look at it and the loss.
    """
    embeddings, labels = problem()
    settings = {"optimizer": RowSGD(unsampled="stay"), "center_format": center_format}
    margin = ArcFace(gradient="exact")
    head = flat_head(200, 32, margin, sample_rate=0.5, **settings)
    for _ in range(2):  # the second time with scales that are not one
        rows = decode(head.centers.detach(), head.optimizer.states().get("centers_scale"))
        truth = reference.gradients_of(
            embeddings,
            rows,
            labels,
            reference.positive_logit(margin),
            scale=margin.scale,
            sampled=sampled_identities(head, labels),
        )
        own = embeddings.clone().requires_grad_()
        loss = head(own, labels)
        loss.backward()
        assert reference.relative_error(loss.detach(), truth[0]) < 1e-5
        assert reference.relative_error(own.grad, truth[1]) < 1e-5
        head.optimizer.step()


@pytest.mark.parametrize("scale", [16.0, 64.0, 128.0])
@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_extreme_cosines_stay_exact(scale, cosine):
    """Every embedding on (or opposite to) its own center: no overflow, no loss of digits."""
    centers = torch.eye(8)
    labels = torch.arange(8)
    margin = CosFace(scale=scale, additive=0.2)
    head = flat_head(8, 8, margin, optimizer=PLAIN)
    head.centers.data.copy_(centers)
    loss, gradient, _ = center_gradient(head, cosine * centers, labels)
    truth, expected, _ = reference.gradients_of(
        cosine * centers, centers, labels, reference.positive_logit(margin), scale=scale
    )
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-30)


def test_loss_does_not_saturate():
    """arcface_torch reports at most 69.08 = -log(1e-30) for a sample."""
    head = flat_head(2, 2, CosFace(scale=128, additive=0.5))
    head.centers.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert head(torch.tensor([[-1.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(
        320, rel=1e-6
    )


def test_one_identity_has_no_loss_and_no_gradient():
    for scale in (64, 128):
        head = flat_head(1, 4, ArcFace(scale=scale), optimizer=PLAIN)
        loss, gradient, change = center_gradient(head, torch.randn(3, 4), torch.zeros(3).long())
        assert loss == 0
        assert not gradient.any()
        assert not change.any()


def test_only_sampled_rows_and_their_states_change():
    embeddings, labels = problem()
    head = flat_head(200, 32, ArcFace(), sample_rate=0.1)
    before = head.centers.detach().clone()
    sampled = sampled_identities(head, labels)
    loss = head(embeddings.requires_grad_(), labels)
    loss.backward()
    head.optimizer.step()
    changed = (head.centers != before).any(1).nonzero().squeeze(1)
    assert set(changed.tolist()) == set(sampled.tolist())
    moved = head.optimizer.state[head.centers]["momentum"].any(1).nonzero().squeeze(1)
    assert set(moved.tolist()) == set(sampled.tolist())


@pytest.mark.parametrize("rule", [RowSGD(lr=0.1), RowAdamW(lr=0.01)], ids=["sgd", "adamw"])
def test_accumulated_micro_batches_equal_one_batch(rule):
    """arcface_torch forgets the division; and with a fixed sample the negatives agree too."""
    embeddings, labels = problem(batch=48)
    heads = [flat_head(200, 32, ArcFace(), sample_rate=0.1, optimizer=rule) for _ in range(2)]
    for _ in range(3):
        whole = embeddings.clone().requires_grad_()
        heads[0](whole, labels).backward()
        parts = embeddings.clone().requires_grad_()
        heads[1].sample_step(labels)
        for piece in (slice(0, 16), slice(16, 32), slice(32, 48)):
            (heads[1](parts[piece], labels[piece]) / 3).backward()
        torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-7)
        for head in heads:
            head.optimizer.step()
        torch.testing.assert_close(heads[1].centers, heads[0].centers, rtol=1e-4, atol=1e-6)


def test_micro_batches_with_their_own_samples_add_up():
    """Without sample_step the rows of the micro-batches differ; each gets its own gradient."""
    embeddings, labels = problem(batch=32)
    head = flat_head(200, 32, ArcFace(), sample_rate=0.05, optimizer=PLAIN)
    before, total = head.centers.detach().clone(), torch.zeros(200, 32, dtype=torch.float64)
    for piece in (slice(0, 16), slice(16, 32)):
        _, _, gradient = reference.gradients_of(
            embeddings[piece],
            before,
            labels[piece],
            reference.positive_logit(head.margin),
            scale=64,
            sampled=sampled_identities(head, labels[piece]),
        )
        total += gradient
        head(embeddings[piece].clone().requires_grad_(), labels[piece]).backward()
    head.optimizer.step()
    assert reference.relative_error(before - head.centers.detach(), total) < 1e-5


def test_micro_batches_of_several_sizes_keep_tiles_of_several_sizes(monkeypatch):
    """Pass 2 has tiles of one size: exponentials of another are computed again."""
    monkeypatch.setitem(passes.TILE_BYTES, "cpu", 4 * (8 + 32) * 512)  # 512 rows of 8, 256 of 32
    embeddings, labels = problem(batch=40, identities=1000)
    ends = []
    for keep_mib in (0, None):
        head = flat_head(1000, 32, ArcFace(), optimizer=PLAIN, keep_mib=keep_mib)
        for piece in (slice(0, 8), slice(8, 40)):
            head(embeddings[piece].clone().requires_grad_(), labels[piece]).backward()
        head.optimizer.step()
        ends.append(head.centers.detach())
    assert torch.equal(*ends)


def test_weight_of_the_loss_reaches_the_centers():
    embeddings, labels = problem()
    changes = []
    for weight in (1.0, 0.25):
        head = flat_head(200, 32, ArcFace(), optimizer=PLAIN)
        before = head.centers.detach().clone()
        (head(embeddings.clone().requires_grad_(), labels) * weight).backward()
        head.optimizer.step()
        changes.append(before - head.centers.detach())
    torch.testing.assert_close(changes[1], changes[0] / 4, rtol=1e-4, atol=1e-8)


def test_centers_learn_when_the_embeddings_want_no_gradient():
    """Training the head on a frozen backbone."""
    embeddings, labels = problem()
    head = flat_head(200, 32, ArcFace())
    first = head(embeddings, labels)
    first.backward()
    head.optimizer.step()
    assert head(embeddings, labels) < first


@pytest.mark.parametrize("poison", ["embedding", "center", "center too long for fp32"])
def test_non_finite_loss_changes_nothing(poison):
    embeddings, labels = problem()
    head = flat_head(200, 32, ArcFace(), compute="bf16" if "too long" in poison else "fp32")
    head.optimizer.state[head.centers].update(head.optimizer.rule.new_states(head.centers))
    if poison == "embedding":
        embeddings[3, 5] = torch.nan
    elif poison == "center":
        head.centers.data[7, 0] = torch.inf
    else:
        head.centers.data[7] = 7e37  # finite, and has no finite length
    before = copy.deepcopy((head.centers.data, dict(head.optimizer.state[head.centers])))
    loss = head(embeddings.requires_grad_(), labels)
    assert not loss.isfinite()
    loss.backward()
    head.optimizer.step()
    assert torch.equal(head.centers.data.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(head.optimizer.state[head.centers]["momentum"], before[1]["momentum"])


@pytest.mark.parametrize("poisoned", [0, 1])
def test_one_non_finite_micro_batch_spoils_the_step(poisoned):
    embeddings, labels = problem()
    head = flat_head(200, 32, ArcFace())
    before = head.centers.detach().clone()
    for number, piece in enumerate((slice(0, 12), slice(12, 24))):
        part = embeddings[piece].clone()
        part[0, 0] = torch.inf if number == poisoned else 0.0
        head(part.requires_grad_(), labels[piece]).backward()
    head.optimizer.step()
    assert torch.equal(head.centers, before)


def test_grad_scaler_scale_and_found_inf_are_honoured():
    """GradScaler hands its scale to an optimizer that declares _step_supports_amp_scaling."""
    embeddings, labels = problem()
    changes = []
    for scaled in (False, True):
        head = flat_head(200, 32, ArcFace(), optimizer=PLAIN)
        weight = torch.nn.Parameter(torch.ones(32))
        backbone = torch.optim.SGD([weight], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        before = head.centers.detach().clone()
        scaler.scale(head(embeddings * weight, labels)).backward()
        scaler.step(backbone)
        scaler.step(head.optimizer)
        scaler.update()
        changes.append(before - head.centers.detach())
    assert changes[0].any()
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-4, atol=1e-8)
    before = head.centers.detach().clone()
    head(embeddings, labels).backward()
    head.optimizer.found_inf = torch.tensor(1.0)
    head.optimizer.step()
    assert torch.equal(head.centers, before)


def test_zero_grad_forgets_the_micro_batches():
    embeddings, labels = problem()
    head = flat_head(200, 32, ArcFace())
    before = head.centers.detach().clone()
    head(embeddings, labels).backward()
    head.optimizer.zero_grad()
    head.optimizer.step()
    assert torch.equal(head.centers, before)


@pytest.mark.parametrize("rule", [RowSGD(lr=0.1), RowAdamW(lr=0.01)], ids=["sgd", "adamw"])
def test_state_dicts_resume_bit_for_bit(rule):
    """And a scheduler of torch's works on the head's optimizer."""
    embeddings, labels = problem()

    def run(head, scheduler, steps):
        losses = []
        for _ in range(steps):
            loss = head(embeddings.clone().requires_grad_(), labels)
            loss.backward()
            head.optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses

    def new():
        head = flat_head(200, 32, ArcFace(), sample_rate=0.2, optimizer=rule)
        return head, torch.optim.lr_scheduler.LinearLR(head.optimizer, 1.0, 0.1, total_iters=8)

    straight, resumed = new(), new()
    expected = run(*straight, 8)
    assert run(*resumed, 4) == expected[:4]
    saved = [copy.deepcopy(part.state_dict()) for part in (*resumed, resumed[0].optimizer)]
    head, scheduler = new()
    for part, state in zip((head, scheduler, head.optimizer), saved, strict=True):
        part.load_state_dict(state)
    assert run(head, scheduler, 4) == expected[4:]
    assert torch.equal(head.centers, straight[0].centers)


def test_initial_centers_are_a_function_of_seed_and_identity():
    whole = flat_head(3000, 8, ArcFace(), seed=5).centers
    part = torch.empty(1100, 8)
    fill_initial_(part, range(1000, 2100), seed=5, device=part.device)
    assert torch.equal(part, whole[1000:2100])
    assert not torch.equal(flat_head(3000, 8, ArcFace(), seed=6).centers, whole)
    assert whole.std().item() == pytest.approx(0.01, rel=0.03)
    assert not torch.equal(whole[:1024], whole[1024:2048])


def test_low_precision_embeddings_get_their_own_dtype_back():
    embeddings, labels = problem()
    embeddings = embeddings.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = flat_head(200, 32, ArcFace())(embeddings, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert embeddings.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("embeddings", "identities", "message"),
    [
        (torch.randn(4, 31), torch.zeros(4).long(), r"embeddings must be \[batch, 32\]"),
        (torch.randn(4, 32), torch.zeros(3).long(), r"identities must be int64 \[4\]"),
        (torch.randn(4, 32), torch.zeros(4), r"identities must be int64 \[4\]"),
        (torch.randn(2, 32), torch.tensor([0, 200]), r"in \[0, 200\), got 200 at position 1"),
        (torch.randn(2, 32), torch.tensor([-1, 0]), r"in \[0, 200\), got -1 at position 0"),
    ],
)
def test_wrong_input_is_refused(embeddings, identities, message):
    with pytest.raises(ValueError, match=message):
        flat_head(200, 32, ArcFace())(embeddings, identities)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute": "fp8"}, "compute must be one of fp32, tf32, bf16, got 'fp8'"),
        ({"compute": "tf32"}, 'compute = "tf32": it needs a GPU, and the head is on cpu'),
        ({"center_format": "int8"}, "center_format must be one of .*fp16, fp8, got 'int8'"),
        ({"keep_mib": -1}, "keep_mib must be >= 0 and finite, got -1"),
        ({"overlap": True}, "overlap = true: it needs a GPU, and the head is on cpu"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        flat_head(200, 32, ArcFace(), **settings)


def test_inputs_are_not_changed():
    embeddings, labels = problem()
    kept = embeddings.clone(), labels.clone()
    flat_head(200, 32, ArcFace(), sample_rate=0.1)(embeddings.requires_grad_(), labels).backward()
    assert torch.equal(embeddings.detach(), kept[0])
    assert torch.equal(labels, kept[1])


def test_rows_of_any_length_give_the_gradients_of_their_directions():
    """The largest exponential over the shortest norm would leave fp32, and the sums with it."""
    embeddings, labels = problem(batch=8, identities=40)
    head = flat_head(40, 32, CosFace(additive=0.0), optimizer=PLAIN)
    head.centers.data.copy_(torch.nn.functional.normalize(head.centers.data))
    other = next(i for i in range(40) if i not in labels.tolist())
    head.centers.data[other] = torch.nn.functional.normalize(embeddings[0], dim=0)  # logit 64
    length = 10.0 ** torch.linspace(-9.5, 9.5, 40)
    length[other] = 2e-10
    head.centers.data.mul_(length.unsqueeze(1))
    truth = reference.gradients_of(
        embeddings, head.centers.detach(), labels, reference.positive_logit(head.margin), scale=64.0
    )
    wanted = embeddings.clone().requires_grad_()
    loss = head(wanted, labels)
    loss.backward()
    assert loss.item() == pytest.approx(float(truth[0]), rel=1e-6)
    assert reference.relative_error(wanted.grad, truth[1]) < 1e-5
    before = head.centers.detach()
    kept = head.optimizer._kept[0]
    for start, stop, gradient_TD, factor_T1 in passes.second_pass(
        before, RowSet.of(None), [kept], head.optimizer.workspace
    ):
        passes.positives(None, [kept]).add_(gradient_TD, start, factor_T1)
        project_(gradient_TD, before[start:stop], torch.empty_like(gradient_TD), factor_T1)
        for row, true in zip(gradient_TD, truth[2][start:stop], strict=True):
            assert reference.relative_error(row, true) < 1e-4


def test_a_graph_outlives_its_step_and_another_forward():
    """Exponentials lie in buffers of former steps: not in those that somebody still reads."""
    embeddings, labels = problem()
    twice, once = (flat_head(200, 32, ArcFace(), optimizer=PLAIN) for _ in range(2))

    def steps(head, between):
        for part in (slice(0, 12), slice(12, 24)):
            wanted = embeddings[part].clone().requires_grad_()
            loss = head(wanted, labels[part])
            between(head, part)
            loss.backward(retain_graph=True)
            head.optimizer.step()
        between(head, slice(0, 12))
        loss.backward()  # of a batch whose exponentials were given up
        head.optimizer.step()
        return head.centers.detach()

    def another_forward(head, part):
        head(embeddings[part].flip(0).requires_grad_(), labels[part])

    assert torch.equal(steps(twice, another_forward), steps(once, lambda *_: None))


def test_positive_at_zero_angle_gives_finite_exact_gradient():
    head = flat_head(4, 4, ArcFace(gradient="exact"), optimizer=PLAIN)
    head.centers.data.copy_(torch.eye(4))
    loss, gradient, change = center_gradient(head, torch.eye(4), torch.arange(4))
    assert math.isfinite(loss)
    assert gradient.isfinite().all()
    assert change.isfinite().all()


@pytest.mark.parametrize("batch", [16, 4096])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_tile_has_its_size_whatever_the_batch(batch, device):
    """A GPU's counted logits alone: of a batch of 16, a tile of centers took 4 GiB."""
    query = SimpleNamespace(shape=(batch, 512), device=torch.device(device))
    centers = range(10_000_000)
    start, stop = next(passes.tiles(query, centers, None))
    assert start == 0
    assert 4 * (batch + 512) * stop <= max(passes.TILE_BYTES[device], 4 * (batch + 512) * 128)
    assert stop < len(centers)


def test_products_of_16_bits_are_scaled_as_they_are_made(monkeypatch):
    """A pass over fp32 logits for the scale alone is a third of what a GPU's tile moves."""

    class There(torch.Tensor):
        is_cuda = True

    def addmm(unread, left, right, dtype, *, beta, alpha):
        assert beta == 0
        assert unread.untyped_storage().nbytes() <= 4
        return alpha * (left.to(dtype) @ right.to(dtype))

    key, query = torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(4, 2, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "addmm", addmm)
    found = scaled_products(key.as_subclass(There), query, 64.0)
    assert torch.equal(found.as_subclass(torch.Tensor), torch.full((3, 4), 128.0))
