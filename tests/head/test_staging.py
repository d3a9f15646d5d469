"""Rows in host memory: every step, state and checkpoint is that of rows on the device, bit for bit.

On a CPU the host's memory is a second one (or a mapped file) and the staged rows are copies, so all
of the moving is real; what a GPU adds is a stream, see tests/gpu.
"""

import copy
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch

from partialfc import ArcFace, SubCenterArcFace
from partialfc.head.rows import optimizer as row_optimizer
from partialfc.head.rows.staging import Staging, host_tensor, row_tensor
from tests.support.heads import flat_head
from tests.support.staging import HOST, IDENTITIES, RULES, assert_equal, batches, head_of, trained

HOSTED = (("centers", "host"), ("states", "host"))


@functools.cache
def trained_on_device(rule):
    return trained(head_of(*RULES[rule], None), prefetch=False)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("where", ["states", "centers", "both", "files"])
@pytest.mark.parametrize("rule", RULES)
def test_every_step_is_that_of_rows_on_the_device(rule, where, prefetch, tmp_path):
    """A row that two steps in a row sample, read before it was written back."""
    placement = {
        "states": {"states_in": "host"},
        "centers": {"centers_in": "host"},
        "both": HOST,
        "files": {**HOST, "host_folder": tmp_path / "rows"},
    }[where]
    found = trained(head_of(*RULES[rule], placement), prefetch=prefetch)
    assert_equal(found, trained_on_device(rule))
    assert not list(tmp_path.rglob("*_*")), "a mapped file has no name left"


@pytest.mark.parametrize("fixed", [True, False])
def test_micro_batches_with_one_sample_and_with_several(fixed):
    """Without sample_step the update needs the union of the samples."""
    rule = RULES["sgd fp16 int8"]
    settings = {"parts": 3, "fixed": fixed, "prefetch": fixed}
    expected = trained(head_of(*rule, None), **settings)
    assert_equal(trained(head_of(*rule, HOST), **settings), expected)


@pytest.mark.parametrize("rule", ["sgd move", "sgd move fp8 int8"])
@pytest.mark.parametrize("where", ["states", "centers", "both"])
def test_all_rows_catch_up_where_they_lie(rule, where, monkeypatch):
    """What an export writes: rows that no step has visited for long, in pieces."""
    monkeypatch.setattr(row_optimizer, "_STAGED_ROWS", 64)
    wanted, found = results = [], []
    placement = {f"{n}_in": w if where in (n, "both") else "device" for n, w in HOSTED}
    for given, result in zip((None, placement), results, strict=True):
        head = head_of(*RULES[rule], given)
        trained(head, given=batches(9))
        head.optimizer.catch_up(None)
        result += [head.centers.detach().clone(), *head.optimizer.states().values()]
        result.append(trained(head, given=batches(12)[9:])[1])
    assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))


def test_a_wrong_prefetch_changes_nothing():
    """The next batch was another one, as after the end of an epoch that was cut."""
    given = batches()
    expected = trained(head_of(*RULES["sgd"], None), given=given)
    head = head_of(*RULES["sgd"], HOST)
    real = head.prefetch
    head.prefetch = lambda identities: real((identities + 1) % IDENTITIES)
    assert_equal(trained(head, given=given), expected)


def test_sub_centers_and_losses_on_centers():
    margin = SubCenterArcFace(scale=16, sub_centers=3)
    results = []
    for placement in (None, HOST):
        head = head_of(*RULES["sgd"], placement, margin=margin)
        head.center_weight = head.inter_class_weight = 0.5
        results.append(trained(head))
    assert_equal(results[1], results[0])


def test_evaluation_between_steps_changes_nothing():
    """A forward pass without gradients opens rows and takes no step."""
    results = []
    for placement in (None, HOST):
        head = head_of(*RULES["sgd"], placement)
        first = trained(head, given=batches(10))
        with torch.no_grad():
            head(*batches(3)[2])
        results.append((first, trained(head, given=batches(12)[10:])))
    assert_equal(results[1][0], results[0][0])
    assert_equal(results[1][1], results[0][1])


def test_rows_that_inference_mode_has_opened_can_be_trained():
    """The rows of a step that was fixed are the same for both; losses on centers do without
    autograd."""
    results = []
    for placement in (None, HOST):
        head = head_of(*RULES["sgd"], placement)
        head.center_weight = head.inter_class_weight = 0.5
        embeddings, labels = batches(1)[0]
        head.sample_step(labels)
        with torch.inference_mode():
            seen = head(embeddings, labels)
        loss = head(embeddings.requires_grad_(), labels)
        loss.backward()
        head.optimizer.step()
        head.optimizer.settle()
        assert seen.item() == loss.item()
        results.append(([loss.item()], head.centers.detach(), dict(head.optimizer.states())))
    assert_equal(*results)


@pytest.mark.parametrize("where", [HOST, {"centers_in": "host"}], ids=["both", "centers"])
def test_rows_that_an_evaluation_moved_are_not_older_in_the_next_step(where):
    """They were gathered for it before; with the step that they are at on the device, they missed
    what had moved them."""
    results = []
    for placement in (None, where):
        head = head_of(*RULES["sgd move"], placement)
        given = batches(8)
        trained(head, given=given[:5])
        head.prefetch(given[6][1])
        with torch.no_grad():
            head(*given[6])
        results.append(trained(head, given=given[5:], prefetch=False))
    assert_equal(results[1], results[0])


def test_state_dicts_move_between_placements():
    """The state is complete at any time, and loading goes where the rows lie."""
    straight = head_of(*RULES["sgd fp16 int8"], HOST)
    trained(straight, given=batches(10))
    saved = copy.deepcopy((straight.state_dict(), straight.optimizer.state_dict()))
    expected = trained(straight, given=batches(20)[10:])
    for placement in (None, {"states_in": "host"}, HOST):
        head = head_of(*RULES["sgd fp16 int8"], placement)
        trained(head, given=batches(3))
        head.load_state_dict(saved[0])
        head.optimizer.load_state_dict(saved[1])
        assert_equal(trained(head, given=batches(20)[10:]), expected)


def test_a_row_that_cannot_be_written_stops_the_run():
    """What goes wrong on the thread is raised, not lost."""
    tensors = {"centers": torch.zeros(8, 2)}
    staging = Staging(tensors, frozenset(tensors), torch.device("cpu"))
    staging.open(0, torch.tensor([1, 2]))
    staging._tensors["centers"] = torch.zeros(2, 2)
    with pytest.raises((IndexError, RuntimeError)):
        staging.settle()


def test_several_prefetches_for_one_step_are_not_older_than_the_step():
    """Micro-batches with samples of their own, each prefetched: the second is behind an update."""
    results = []
    for ahead in (False, True):
        head, given = head_of(*RULES["sgd"], HOST), batches(12)
        for now, then in itertools.zip_longest(given, given[1:]):
            for part in range(2):
                if ahead and then is not None:
                    head.prefetch(then[1].chunk(2)[part])
            for part in range(2):
                own = now[0].chunk(2)[part].clone().requires_grad_()
                (head(own, now[1].chunk(2)[part]) / 2).backward()
            head.optimizer.step()
        head.optimizer.settle()
        results.append(head.centers.detach().clone())
    assert torch.equal(*results)


def test_a_prefetch_again_for_a_step_that_was_taken_is_not_used():
    head, other = head_of(*RULES["sgd"], HOST), head_of(*RULES["sgd"], HOST)
    given = batches(4)
    for step, (embeddings, labels) in enumerate(given):
        if step + 1 < len(given):
            for _ in range(2):
                head.prefetch(given[step + 1][1])
        for one in (head, other):
            own = embeddings.clone().requires_grad_()
            one(own, labels)
            one(own, labels).backward()
            one.optimizer.step()
    head.optimizer.settle()
    other.optimizer.settle()
    assert torch.equal(head.centers, other.centers)


def test_loading_centers_leaves_nothing_of_the_old_ones_on_its_way():
    """Rows that are open, gathered ahead or carried over belong to what was replaced."""
    good = head_of(*RULES["sgd"], None)
    trained(good, given=batches(5))
    saved = copy.deepcopy(good.state_dict())
    results = []
    for placement in (None, HOST):
        head = head_of(*RULES["sgd"], placement)
        given = batches(6)
        trained(head, given=given[:3], prefetch=False)
        with torch.no_grad():
            head(*given[3])
        head.prefetch(given[4][1])
        head.load_state_dict(saved)
        results.append(trained(head, given=given[4:]))
    assert_equal(results[1], results[0])


def test_an_optimizer_state_from_before_the_first_step_empties_that_of_rows_in_host_memory():
    fresh = copy.deepcopy(head_of(*RULES["sgd fp16 int8"], None).optimizer.state_dict())
    results = []
    for placement in (None, HOST):
        head = head_of(*RULES["sgd fp16 int8"], placement)
        trained(head, given=batches(3))
        head.optimizer.load_state_dict(fresh)
        results.append(trained(head, given=batches(6)[3:]))
    assert_equal(results[1], results[0])


def test_host_tensors_in_files_are_zero_and_leave_no_name(tmp_path):
    tensor = host_tensor("rows", (1000, 128), torch.float16, tmp_path / "folder", pinned=False)
    tensor[999] = 1
    assert tensor[999].sum() == 128
    assert not tensor[:999].any()
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("blocked", [False, True])
def test_a_folder_that_cannot_hold_the_rows_is_refused(tmp_path, blocked):
    """A mapped page that has no block on the disk is SIGBUS, not an exception."""
    folder = tmp_path / "rows"
    if blocked:
        folder.write_text("a file")
    with pytest.raises(ValueError, match=r"host_folder = .*: [\d,]{20,} bytes of rows cannot"):
        host_tensor("rows", (2**50, 128), torch.float32, folder, pinned=False)
    assert blocked or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate": 1.0}, "sample_rate = 1.0: with rows in host memory"),
    ],
)
def test_what_host_memory_cannot_do_is_refused(settings, message):
    settings = {"sample_rate": 0.5, **settings}
    with pytest.raises(ValueError, match=message):
        flat_head(10, 4, ArcFace(), states_in="host", **settings)


def huge_pages_wanted() -> bool:
    """Whether this kernel gives them to whoever asks."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not huge_pages_wanted(), reason="a kernel without huge pages")
def test_many_rows_lie_in_huge_pages_from_the_start():
    """Shared memory gets none of them here, and a step that finds its pages takes half as long."""
    rows = row_tensor((1 << 15, 512), torch.float32, torch.device("cpu"))
    first, last = rows.data_ptr(), rows.data_ptr() + rows.nbytes
    resident = huge = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(bound, 16) for bound in bounds.groups())
            inside = start < last and stop > first
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) << 10
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) << 10
    assert resident >= rows.nbytes, "pages are missing: a later step finds no memory for them"
    assert huge >= rows.nbytes // 2
    assert not rows.any()
