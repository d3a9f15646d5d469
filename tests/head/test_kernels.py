"""The Triton kernels against fp64 truth and against the torch formats, byte by byte.

They run in a worker process: Triton's interpreter must be chosen before Triton is imported, and the
rest of the test process must not get it. Where there is a GPU they also run on it.

Shape suffixes: B = rows of the gathered batch, C = rows of a shard, D = embedding, n = sampled
rows, P = positives, T = rows of a tile.
"""

import importlib
import importlib.util
import json
from functools import cache

import pytest
import torch

from partialfc import ArcFace, RowSGD, Several, SubCenterArcFace
from partialfc.head.rows.catch_up import Moves
from partialfc.head.rows.formats import DTYPES, FIRST_SCALE, FORMATS, SCALED, decode, encode
from partialfc.keyed import key
from partialfc.margins import CurricularFace
from tests.support.heads import flat_head, small_tiles
from tests.support.kernels import (
    BENDS,
    bend_of,
    compiled_python,
    exponential_truth,
    kernel,
    pack,
    unpack,
)
from tests.support.places import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: NO Triton kernel is tested", allow_module_level=True)


KEYS = {"center_key": key(0, "centers"), "momentum_key": -key(1, "momentum")}
CENTERS = ["fp32", "bf16", "fp16", "fp8"]

FIRST_ROW = 2**33 + 5
"""Number in the whole head of the shard's first row: its lanes do not fit in 32 bits."""


def bits_of(tensor):
    """The stored bytes, so that -0 is not 0 and NaN is itself."""
    return tensor.contiguous().view(torch.uint8)


def bf16_error(launch):
    """Relative rounding error of a plain bf16 store: the interpreter truncates, a GPU does not."""
    return 2.0**-7 if launch.device == "cpu" else 2.0**-8 * 1.01


# --- unit_rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("centers", CENTERS)
@pytest.mark.parametrize("dim", [3, 50, 512])
@pytest.mark.parametrize("sampled", [True, False], ids=["rows", "all"])
def test_unit_rows_are_the_rows_over_their_norms(launch, sampled, dim, centers, unit):
    generator = torch.Generator().manual_seed(dim)
    centers_CD = (5 * torch.randn(11, dim, generator=generator)).to(DTYPES[centers])
    rows_n = torch.tensor([9, 2, 7, 0, 10, 5]) if sampled else None
    out_TD = torch.empty(3, dim, dtype=unit)
    _, after = launch(
        "unit_rows", centers_CD=centers_CD, rows_n=rows_n, start=2, stop=5, out_TD=out_TD
    )
    unit_TD = after["out_TD"]
    truth_TD = centers_CD[rows_n[2:5] if sampled else slice(2, 5)].double()
    norm_T1 = truth_TD.norm(dim=1, keepdim=True)
    error = 1e-6 if unit == torch.float32 else bf16_error(launch)
    torch.testing.assert_close(unit_TD.double(), truth_TD / norm_T1, rtol=error, atol=1e-7)
    assert torch.equal(bits_of(after["centers_CD"]), bits_of(centers_CD)), "the input was changed"


def test_a_row_without_direction_is_zero_and_one_not_finite_is_nan(launch):
    centers_CD = torch.ones(6, 20)
    centers_CD[0] = 0
    centers_CD[1] = 1e-11  # norm 4.5e-11
    centers_CD[2] = 1e-10  # norm 4.5e-10
    centers_CD[3, 7] = torch.nan
    centers_CD[4, 19] = -torch.inf
    out_TD = torch.empty(6, 20)
    _, after = launch(
        "unit_rows", centers_CD=centers_CD, rows_n=None, start=0, stop=6, out_TD=out_TD
    )
    unit_TD = after["out_TD"]
    assert not unit_TD[:2].any(), "no length, no direction"
    torch.testing.assert_close(unit_TD[[2, 5]], torch.full((2, 20), 20**-0.5))
    assert unit_TD[3:5].isnan().all(), "a row that is not finite must show in the loss"


@pytest.mark.parametrize("tile", [(4, 5), (3, 3)], ids=["one", "none"])
def test_unit_rows_of_a_tile_of_one_row_or_none(launch, tile):
    start, stop = tile
    centers_CD = torch.randn(5, 8)
    out_TD = torch.empty(stop - start, 8)
    _, after = launch(
        "unit_rows", centers_CD=centers_CD, rows_n=None, start=start, stop=stop, out_TD=out_TD
    )
    truth_TD = torch.nn.functional.normalize(centers_CD[start:stop], dim=1)
    torch.testing.assert_close(after["out_TD"], truth_TD)


def test_rows_beyond_2_31_elements_are_the_right_ones(launch):
    """An offset in 32 bits would read and write elsewhere, or kill the worker."""
    unit, row, other = unpack(launch.run(_far_rows, launch.device))
    assert torch.equal(unit, torch.full((1, 512), 512**-0.5, dtype=unit.dtype))
    assert torch.equal(row, torch.full((512,), 1.0, dtype=row.dtype)), "4 - 0.75 * 4"
    assert not other.any()


def _far_rows(device):
    """4 GiB of address space; only the pages of two rows are ever touched."""
    far = 2**22 + 3
    centers_CD = torch.empty(far + 1, 512, dtype=torch.bfloat16, device=device)
    centers_CD[far] = 4.0
    centers_CD[3] = 0  # where 32 bits would end
    rows_n = torch.tensor([far], device=device)
    unit_TD = torch.empty(1, 512, device=device)
    kernel("unit_rows")(centers_CD, rows_n, 0, 1, unit_TD)
    case = {**sgd_case(rows=1, dim=512), **KEYS, "first_row": 0, "skip": None}
    case = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    case.update(centers_CD=centers_CD, rows_n=rows_n, start=0, stop=1, momentum_CD=None)
    case.update(gradient_TD=torch.zeros(1, 512, device=device), lr=0.75, weight_decay=1.0)
    case["slope_P"].zero_()
    kernel("sgd_")(**case)
    return pack((unit_TD, centers_CD[far].clone(), centers_CD[3].clone()))


# --- exponentials ------------------------------------------------------------------------------


def exponential_case(rows=150, columns=140, logit=torch.float32):
    """Logits in ±20, positives in the tile, on its borders, and outside in every way."""
    generator = torch.Generator().manual_seed(rows + columns)
    logit_TB = (20 * (2 * torch.rand(rows, columns, generator=generator) - 1)).to(logit)
    column_B = torch.randint(-rows, 2 * rows, (columns,), generator=generator)
    outside = [-1, rows, 2**32, 2**40 + 1]
    edges = torch.tensor([0, rows - 1, *outside])
    column_B[: len(edges)] = edges[:columns]
    return logit_TB, column_B


@pytest.mark.parametrize("shape", [(150, 140), (1, 3), (129, 1), (16, 128)], ids=str)
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logit", [torch.float32, torch.bfloat16], ids=str)
def test_exponentials_and_their_sums(launch, logit, dtype, shifted, bend, shape):
    logit_TB, column_B = exponential_case(*shape, logit)
    shift_B = torch.linspace(-3, 5, shape[1]) if shifted else None
    bend = bend_of(bend, shape[1])
    before_B = torch.linspace(1, 2, shape[1])
    exp_TB, after = launch(
        "exponentials",
        logit_TB=logit_TB,
        column_KB=column_B.unsqueeze(0),
        bend=bend,
        shift_B=shift_B,
        sum_B=before_B,
        dtype=dtype,
    )
    truth_TB, sum_B = exponential_truth(logit_TB, column_B, bend, shift_B)
    assert exp_TB.dtype == dtype
    error = 1e-5 if dtype == torch.float32 else bf16_error(launch) + 1e-5
    torch.testing.assert_close(exp_TB.double(), truth_TB, rtol=error, atol=1e-12)
    torch.testing.assert_close(after["sum_B"].double(), before_B + sum_B, rtol=1e-5, atol=0)
    in_place = logit == dtype == torch.float32
    assert torch.equal(after["logit_TB"], exp_TB if in_place else logit_TB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bend", BENDS)
def test_several_positives_of_a_column_are_left_out(launch, bend, dtype):
    """One inside at the edge that others outside of the tile fall on: the last or the first row."""
    logit_TB, _ = exponential_case(rows=130, columns=40)
    generator = torch.Generator().manual_seed(3)
    column_KB = torch.randint(-130, 260, (5, 40), generator=generator)
    column_KB[:, 0] = torch.tensor([129, 500, 0, -1, -3])
    column_KB[:, 1] = torch.tensor([500, 129, -1, 0, 129])
    column_KB[:, 2] = -1
    exp_TB, after = launch(
        "exponentials",
        logit_TB=logit_TB,
        column_KB=column_KB,
        bend=bend_of(bend, 40),
        shift_B=None,
        sum_B=torch.zeros(40),
        dtype=dtype,
    )
    truth_TB, sum_B = exponential_truth(logit_TB, column_KB, bend_of(bend, 40), None)
    error = 1e-5 if dtype == torch.float32 else bf16_error(launch) + 1e-5
    torch.testing.assert_close(exp_TB.double(), truth_TB, rtol=error, atol=1e-12)
    torch.testing.assert_close(after["sum_B"].double(), sum_B, rtol=1e-5, atol=0)


def test_exponentials_without_sums_are_the_same(launch):
    logit_TB, column_B = exponential_case()
    case = {"logit_TB": logit_TB, "column_KB": column_B.unsqueeze(0), "shift_B": None}
    case["dtype"] = torch.float32
    case["bend"] = bend_of("curricular", 140)
    with_sums, _ = launch("exponentials", sum_B=torch.zeros(140), **case)
    without, _ = launch("exponentials", sum_B=None, **case)
    assert torch.equal(with_sums, without)


@pytest.mark.parametrize("bend", BENDS)
def test_a_nan_logit_shows_in_the_sum_of_its_column_only(launch, bend):
    logit_TB, column_B = exponential_case()
    logit_TB[77, 30] = torch.nan
    column_B[30] = 5
    logit_TB[4, 31] = torch.nan  # of a positive, which pass 1 replaces
    column_B[31] = 4
    exp_TB, after = launch(
        "exponentials",
        logit_TB=logit_TB,
        column_KB=column_B.unsqueeze(0),
        bend=bend_of(bend, 140),
        shift_B=None,
        sum_B=torch.zeros(140),
        dtype=torch.bfloat16,
    )
    assert after["sum_B"].isnan().nonzero().tolist() == [[30]]
    assert exp_TB.isnan().nonzero().tolist() == [[77, 30]]


# --- sgd_ --------------------------------------------------------------------------------------

MOMENTA = ["no", "fp32", "bf16", "int8"]


def stored_rows(value_CD, name):
    """Rows in a format, and their scales: some rows that the format holds exactly."""
    if name == "no":
        return None, None
    if name == "fp32":
        return value_CD.clone(), None
    return encode(value_CD, name, torch.full(value_CD.shape, 2**15 - 1, dtype=torch.int32))


def sgd_case(centers="bf16", momentum="no", embedding="fp32", dim=50, rows=7, sampled=True):
    """Arguments of a tile of ``rows`` rows; some have no positive, some have several."""
    generator = torch.Generator().manual_seed(dim + rows)
    held = 3 * rows + 2
    positives = 2 * rows

    def normal(*size):
        return torch.randn(*size, generator=generator)

    sizes_C1 = torch.logspace(-3, 3, held).unsqueeze(1)
    centers_CD, center_scale_C1 = stored_rows(normal(held, dim) * sizes_C1, centers)
    momentum_CD, momentum_scale_C1 = stored_rows(normal(held, dim) / sizes_C1, momentum)
    start = 3
    total = start + rows + 2
    place_P = torch.randint(0, total, (positives,), generator=generator)
    place_P[: rows // 2] = start + 1  # several of one row
    place_P[place_P == start + 2] = start + 1  # and a row of none
    count_n = place_P.bincount(minlength=total)
    return {
        "centers_CD": centers_CD,
        "center_scale_C1": center_scale_C1,
        "momentum_CD": momentum_CD,
        "momentum_scale_C1": momentum_scale_C1,
        "rows_n": torch.randperm(held, generator=generator)[:total] if sampled else None,
        "start": start,
        "stop": start + rows,
        "gradient_TD": normal(rows, dim),
        "first_N": torch.cat([torch.zeros(1, dtype=torch.int64), count_n.cumsum(0)]),
        "row_P": place_P.argsort(stable=True),
        "slope_P": normal(positives),
        "embedding_BD": normal(positives, dim).to(DTYPES[embedding]),
        "lr": 0.1,
        "weight_decay": 5e-4,
        "momentum": 0.9,
    }


def rows_of(case):
    if case["rows_n"] is None:
        return torch.arange(case["start"], case["stop"])
    return case["rows_n"][case["start"] : case["stop"]]


def sgd_truth(case, dtype):
    """New rows and momenta [T, D] in plain torch, not rounded."""
    row_T = rows_of(case)

    def stored(name, scale):
        value = case[name]
        if value is None:
            return None
        scale_T1 = None if case[scale] is None else case[scale][row_T]
        return decode(value[row_T], scale_T1).to(dtype)

    w_TD = stored("centers_CD", "center_scale_C1")
    old_TD = stored("momentum_CD", "momentum_scale_C1")
    g_TD = case["gradient_TD"].to(dtype)
    first = case["first_N"]
    for t, i in enumerate(range(case["start"], case["stop"])):
        for p in range(first[i], first[i + 1]):
            embedding_D = case["embedding_BD"][case["row_P"][p]]
            g_TD[t] += case["slope_P"][p].to(dtype) * embedding_D.to(dtype)
    norm_T1 = w_TD.norm(dim=1, keepdim=True)
    r_T1 = torch.where(norm_T1 > 1e-10, 1 / norm_T1, 0)
    unit_TD = w_TD * r_T1
    g_TD = (g_TD - unit_TD * (g_TD * unit_TD).sum(1, keepdim=True)) * r_T1
    v_TD = g_TD + case["weight_decay"] * w_TD
    if old_TD is not None:
        v_TD = case["momentum"] * old_TD + v_TD
    return w_TD - case["lr"] * v_TD, v_TD


def spec_noise(noise_key, row_T, dim):
    """The random bits in Python's integers, as the file format's specification has them."""
    lanes, mask = -(-dim // 4), 2**64 - 1
    rows = []
    for row in row_T.tolist():
        bits = []
        for d in range(dim):
            x = ((FIRST_ROW + row) * lanes + d // 4 + noise_key) & mask
            x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & mask
            x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & mask
            x ^= x >> 33
            bits.append((x >> (16 * (d % 4))) & 0xFFFF)
        rows.append(bits)
    return torch.tensor(rows, dtype=torch.int32)


def written(after, name):
    """Stored rows of the tile and their scales after a launch."""
    row_T = rows_of(after)
    scale_C1 = after[name.removesuffix("s_CD").removesuffix("_CD") + "_scale_C1"]
    return after[name][row_T], None if scale_C1 is None else scale_C1[row_T]


def expected(value_TD, stored_TD, noise_key, row_T):
    """The bytes that a format keeps of fp32 rows."""
    name = FORMATS[stored_TD.dtype]
    if name == "fp32":
        return value_TD, None
    return encode(value_TD, name, spec_noise(noise_key, row_T, value_TD.shape[1]))


def run_sgd(launch, case, skip=False):
    _, after = launch(
        "sgd_",
        **case,
        **KEYS,
        first_row=FIRST_ROW,
        skip=None if skip is None else torch.tensor(skip),
    )
    return after


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("centers", CENTERS)
def test_compact_rows_are_written_as_they_would_be_in_the_shard(launch, centers, momentum):
    """Rounded by their number in the shard, read and written by their place in the sample."""
    case = sgd_case(centers, momentum)
    rows_n = case["rows_n"]
    names = [name for name in case if name.endswith(("_CD", "_C1")) and case[name] is not None]
    compact = {**case, "compact": True} | {name: case[name][rows_n] for name in names}
    whole, after = run_sgd(launch, case), run_sgd(launch, compact)
    for name in names:
        assert torch.equal(bits_of(after[name]), bits_of(whole[name][rows_n])), name
        assert not torch.equal(bits_of(after[name]), bits_of(compact[name])), name


@pytest.mark.parametrize("dim", [5, 50, 512])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("centers", CENTERS)
def test_without_a_gradient_every_byte_is_that_of_the_formats(launch, centers, momentum, dim):
    """No sum matters then, so noise, rounding, scales and the order of operations show."""
    case = sgd_case(centers, momentum, dim=dim)
    case["gradient_TD"].zero_()
    case["slope_P"].zero_()
    after = run_sgd(launch, case)
    row_T = rows_of(case)
    for name, value_TD in zip(
        ("centers_CD", "momentum_CD"), sgd_truth(case, torch.float32), strict=True
    ):
        if case[name] is None:
            continue
        stored_TD, scale_T1 = written(after, name)
        noise_key = KEYS["center_key" if name == "centers_CD" else "momentum_key"]
        wanted_TD, wanted_T1 = expected(value_TD, stored_TD, noise_key, row_T)
        assert torch.equal(bits_of(stored_TD), bits_of(wanted_TD)), name
        if wanted_T1 is not None:
            assert torch.equal(bits_of(scale_T1), bits_of(wanted_T1)), f"scale of {name}"


def quantum(stored_TD, scale_T1):
    """Distance of the stored values' neighbours, upwards in magnitude."""
    name = FORMATS[stored_TD.dtype]
    if name == "fp32":
        return stored_TD.abs().double() * 2.0**-20 + 1e-7
    if name == "int8":
        return scale_T1.double().expand(stored_TD.shape)
    word = torch.int16 if stored_TD.itemsize == 2 else torch.uint8
    magnitude_TD = stored_TD.view(word) & (0x7FFF if word == torch.int16 else 0x7F)
    step_TD = (magnitude_TD + 1).view(stored_TD.dtype).double() - stored_TD.double().abs()
    return step_TD if scale_T1 is None else step_TD * scale_T1


@pytest.mark.parametrize("sampled", [True, False], ids=["rows", "all"])
@pytest.mark.parametrize("embedding", ["fp32", "bf16"])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("centers", CENTERS)
def test_sgd_is_that_of_fp64_to_one_step_of_the_format(
    launch, centers, momentum, embedding, sampled
):
    case = sgd_case(centers, momentum, embedding, sampled=sampled)
    after = run_sgd(launch, case, skip=None if sampled else False)
    row_T = rows_of(case)
    truths = zip(sgd_truth(case, torch.float64), sgd_truth(case, torch.float32), strict=True)
    for name, (truth_TD, plain_TD) in zip(("centers_CD", "momentum_CD"), truths, strict=True):
        if case[name] is None:
            continue
        stored_TD, scale_T1 = written(after, name)
        error_TD = (decode(stored_TD, scale_T1).double() - truth_TD).abs()
        largest_T1 = truth_TD.abs().amax(1, keepdim=True)
        assert (error_TD <= quantum(stored_TD, scale_T1) * 1.001 + largest_T1 * 1e-6).all(), name
        if FORMATS[stored_TD.dtype] != "fp32":
            noise_key = KEYS["center_key" if name == "centers_CD" else "momentum_key"]
            wanted_TD, _ = expected(plain_TD, stored_TD, noise_key, row_T)
            assert (stored_TD == wanted_TD).double().mean() > 0.98, name
        others_C = torch.ones(len(case[name]), dtype=torch.bool).index_fill_(0, row_T, False)
        others = bits_of(after[name][others_C]), bits_of(case[name][others_C])
        assert torch.equal(*others), "other rows changed"


def test_a_row_of_no_length_gets_no_gradient(launch):
    case = sgd_case("fp32", "fp32")
    row_T = rows_of(case)
    case["centers_CD"][row_T[1]] = 0
    case["centers_CD"][row_T[2]] = 1e-14
    after = run_sgd(launch, case)
    velocity_TD = after["momentum_CD"][row_T[1:3]]
    torch.testing.assert_close(velocity_TD, 0.9 * case["momentum_CD"][row_T[1:3]])


@pytest.mark.parametrize("momentum", ["fp32", "bf16"])
@pytest.mark.parametrize("centers", CENTERS)
def test_a_nan_row_stays_nan_and_harms_no_other(launch, centers, momentum):
    """The bits 0x7fffffff, a GPU's NaN, would carry into -0 when random bits are added."""
    if centers == "fp8" and launch.device == "cpu":
        pytest.skip("Triton's interpreter makes 256 of NaN when it stores fp8")
    case = sgd_case(centers, momentum, dim=64)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    case["gradient_TD"][3] = nan
    row_T = rows_of(case)
    after = run_sgd(launch, case)
    for name in ("centers_CD", "momentum_CD"):
        stored_TD = after[name][row_T]
        assert stored_TD[3].isnan().all(), name
        assert stored_TD[[0, 1, 2, 4, 5, 6]].float().isfinite().all(), name


@pytest.mark.parametrize(("centers", "momentum"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_a_nan_center_stays_nan(launch, centers, momentum):
    case = sgd_case(centers, momentum)
    row_T = rows_of(case)
    case["centers_CD"][row_T[0], 9] = torch.nan
    after = run_sgd(launch, case)
    assert after["centers_CD"][row_T[0]].isnan().all(), "the loss must show it"
    assert after["centers_CD"][row_T[1:]].isfinite().all()


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("centers", CENTERS)
def test_skip_leaves_every_byte(launch, centers, momentum):
    case = sgd_case(centers, momentum)
    case["gradient_TD"][0] = torch.nan
    after = run_sgd(launch, case, skip=True)
    for name in ("centers_CD", "center_scale_C1", "momentum_CD", "momentum_scale_C1"):
        if case[name] is not None:
            assert torch.equal(bits_of(after[name]), bits_of(case[name])), name
            changed = run_sgd(launch, sgd_case(centers, momentum))[name]
            if name.endswith("_CD"):
                assert not torch.equal(bits_of(changed), bits_of(case[name])), "nothing to skip"


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8", "int8"])
def test_rounding_is_unbiased_where_an_update_is_smaller_than_half_a_step(launch, name):
    """Rounding to the nearest would be off by the whole remainder in every element."""
    rows, dim = 64, 256
    case = sgd_case("fp32" if name == "int8" else name, "int8" if name == "int8" else "no")
    value_CD = torch.full((rows, dim), 1.25)
    remainder = 0.2
    if name == "int8":  # v = w: one element sets the scale, the others are 40.2 steps
        value_CD[:] = 40 + remainder
        value_CD[:, 0] = 127
        case.update(weight_decay=1.0, lr=0.0, momentum=0.0)
        step = 1.0
    else:  # w - lr w: 0.2 steps less than 1.25
        step = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp8": 2.0**-3}[name]
        case.update(weight_decay=1.0, lr=remainder * step / 1.25)
    centers_CD, scale_C1 = stored_rows(value_CD, FORMATS[case["centers_CD"].dtype])
    case.update(centers_CD=centers_CD, center_scale_C1=scale_C1)
    if name == "int8":
        case.update(momentum_CD=torch.zeros(rows, dim, dtype=torch.int8))
        case.update(momentum_scale_C1=torch.zeros(rows, 1))
    case.update(rows_n=None, start=0, stop=rows, gradient_TD=torch.zeros(rows, dim))
    case.update(embedding_BD=torch.zeros(1, dim), first_N=torch.zeros(rows + 1, dtype=torch.int64))
    after = run_sgd(launch, case)
    stored_TD, scale_T1 = written(after, "momentum_CD" if name == "int8" else "centers_CD")
    assert (scale_T1 is not None) == (name in SCALED)
    found_TD = decode(stored_TD, scale_T1)[:, 1:].double()
    wanted = 40 + remainder if name == "int8" else 1.25 - remainder * step
    assert len(found_TD.unique()) == 2, "both neighbours occur"
    deviation = step * (remainder * (1 - remainder) / found_TD.numel()) ** 0.5
    assert abs(found_TD.mean() - wanted) < 4 * deviation
    assert 4 * deviation < 0.1 * remainder * step, "a bias would show"


def test_int8_goes_up_where_remainder_and_random_bits_make_one(launch):
    """A quarter of the random bits' unit above and below the border: no nearer one is exact."""
    rows, dim = 4, 64
    case = sgd_case("fp32", "int8", dim=dim, sampled=False)
    noise_TD = spec_noise(KEYS["momentum_key"], torch.arange(rows), dim)
    beyond_TD = torch.arange(dim) % 2 == 0
    value_TD = 41 - (noise_TD + torch.where(beyond_TD, 0.25, 0.75)) / 65536
    value_TD[:, 0] = 127  # the scale is 1
    case.update(centers_CD=value_TD, weight_decay=1.0, lr=0.0, momentum=0.0)  # v = w
    case.update(gradient_TD=torch.zeros(rows, dim), start=0, stop=rows)
    case["slope_P"].zero_()
    after = run_sgd(launch, case)
    wanted_D = torch.where(beyond_TD, 41, 40).index_fill_(0, torch.tensor(0), 127)
    assert torch.equal(after["momentum_CD"][:rows], wanted_D.to(torch.int8).expand(rows, dim))
    assert (after["momentum_scale_C1"][:rows] == 1).all()


# --- catch_up_ ---------------------------------------------------------------------------------


@cache
def moves_of(steps):
    moves = Moves(torch.device("cpu"))
    for step in range(steps):
        rates = {"lr": 0.1 / (1 + step % 7), "momentum": 0.9, "weight_decay": 5e-4}
        moves.extend(rates, skip=None)
    return moves


def catch_up_case(centers, momentum, dim=50, rows=9, steps=2500):
    """Rows at steps of every block, some of which have missed nothing; and the moves."""
    case, moves = sgd_case(centers, momentum, dim=dim, rows=rows), moves_of(steps)
    held = len(case["centers_CD"])
    at_step = torch.linspace(0, steps, held).int()
    at_step[torch.arange(0, held, 5)] = steps  # nothing missed
    at_step[case["rows_n"][:3]] = torch.tensor([steps - 1, steps - 2, 1023]).int()
    names = ("centers_CD", "center_scale_C1", "momentum_CD", "momentum_scale_C1", "rows_n")
    return {
        **{name: case[name] for name in names},
        "at_step_C1": at_step.unsqueeze(1),
        "product_t22": moves.products.clone(),
        "block": moves.block,
        **KEYS,
        "first_row": FIRST_ROW,
    }, moves


def caught_up(case, moves):
    """Everything that is stored, after what the rows have missed, in torch without any kernel."""
    result = {name: value for name, value in case.items() if name.endswith(("_CD", "_C1"))}
    result = {name: None if value is None else value.clone() for name, value in result.items()}
    row_T = torch.arange(len(case["at_step_C1"])) if case["rows_n"] is None else case["rows_n"]
    row_T = row_T[case["at_step_C1"][row_T, 0] < moves.steps]
    product_T22 = moves.since(case["at_step_C1"][row_T, 0].long()).float()
    old = {}
    for name in ("center", "momentum"):
        stored_CD, scale_C1 = (result[n] for n in (stored_name(name), f"{name}_scale_C1"))
        if stored_CD is not None:
            old[name] = decode(stored_CD[row_T], None if scale_C1 is None else scale_C1[row_T])
    for i, name in enumerate(old):
        new_TD = product_T22[:, i, :1] * old["center"]
        if "momentum" in old:
            new_TD = product_T22[:, i, 1:] * old["momentum"] + new_TD
        stored_CD, scale_C1 = (result[n] for n in (stored_name(name), f"{name}_scale_C1"))
        stored_CD[row_T], scale_T1 = expected(new_TD, stored_CD, KEYS[f"{name}_key"], row_T)
        if scale_T1 is not None:
            scale_C1[row_T] = scale_T1
    result["at_step_C1"][row_T] = moves.steps
    return result


def stored_name(name):
    return {"center": "centers_CD", "momentum": "momentum_CD"}[name]


@pytest.mark.parametrize(
    ("dim", "sampled"),
    [(5, True), (50, False), (512, True)],
    ids=["5-rows", "50-all", "512-rows"],
)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("centers", CENTERS)
def test_what_a_row_has_missed_is_written_byte_by_byte_as_torch_does(
    launch, centers, momentum, dim, sampled
):
    """Products over blocks, rounding, scales, rows that missed nothing, rows of nobody."""
    case, moves = catch_up_case(centers, momentum, dim)
    if not sampled:
        case["rows_n"] = None
    wanted = caught_up(case, moves)
    _, after = launch("catch_up_", **case)
    for name, value in wanted.items():
        if value is not None:
            assert torch.equal(bits_of(after[name]), bits_of(value)), name
            assert not torch.equal(bits_of(after[name]), bits_of(case[name])), name
    _, twice = launch("catch_up_", **after)
    for name, value in wanted.items():
        if value is not None:
            assert torch.equal(bits_of(twice[name]), bits_of(value)), "a row moved twice"


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("centers", CENTERS)
def test_compact_rows_catch_up_as_they_would_in_the_shard(launch, centers, momentum):
    """Rounded by their number in the shard, read and written by their place in the sample."""
    case, _ = catch_up_case(centers, momentum)
    names = [name for name in case if name.endswith(("_CD", "_C1")) and case[name] is not None]
    compact = {**case, "compact": True} | {name: case[name][case["rows_n"]] for name in names}
    _, whole = launch("catch_up_", **case)
    _, after = launch("catch_up_", **compact)
    for name in names:
        assert torch.equal(bits_of(after[name]), bits_of(whole[name][case["rows_n"]])), name
        assert not torch.equal(bits_of(after[name]), bits_of(compact[name])), name


# --- the head, through the kernels -------------------------------------------------------------


def _trained(device, forced, margin, compute, center_format, rule, most=1):
    """Three steps over several tiles: losses, the last gradient, centers and momentum."""
    with small_tiles(kernels=forced, rows=16):
        head = flat_head(
            100,
            20,
            margin,
            sample_rate=0.4,
            optimizer=rule,
            compute=compute,
            center_format=center_format,
            positives=None if most == 1 else Several(most=most),
            device=device,
        )
        start = (
            torch.randn(len(head.centers), 20, generator=torch.Generator().manual_seed(5)) * 0.01
        )
        head.centers.data.copy_(start / FIRST_SCALE.get(head.centers.dtype, 1))
        losses = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            embeddings = torch.randn(24, 20, generator=generator).to(device).requires_grad_()
            size = (24,) if most == 1 else (24, most)
            labels = torch.randint(0 if most == 1 else -1, 60, size, generator=generator)
            if not forced and most == 1:  # as kernels do, or it would round once less
                head.optimizer.catch_up(head.sample(labels.to(device)).rows)
            loss = head(embeddings, labels.to(device))
            loss.backward()
            head.optimizer.step()
            losses.append(loss.item())
    states = head.optimizer.states()
    rows = decode(head.centers.detach(), states.get("centers_scale")).cpu()
    velocity = states.get("momentum")
    if velocity is not None:
        velocity = decode(velocity, states.get("momentum_scale")).cpu()
    return losses, embeddings.grad.cpu(), rows, velocity


@pytest.mark.parametrize(
    ("center_format", "momentum_format"),
    [
        ("fp16", "int8"),
        pytest.param("fp8", "int8", marks=pytest.mark.slow),
        pytest.param("fp32", "fp32", marks=pytest.mark.slow),
        pytest.param("bf16", "bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("margin", "unsampled"),
    [
        (ArcFace(), "move"),
        (ArcFace(scale=128, inter_class_filter=0.1), "stay"),
        (CurricularFace(), "move"),
    ],
    ids=str,
)
def test_a_head_on_kernels_trains_as_one_on_torch(
    launch, margin, unsampled, center_format, momentum_format
):
    """Everything that connects them: samples, tiles, positives, keys of the rounding."""
    rule = RowSGD(lr=0.1, momentum_format=momentum_format, unsampled=unsampled)
    arguments = (margin, "fp32", center_format, rule)
    there, here = (
        launch.run(_trained, launch.device, True, *arguments),
        _trained("cpu", False, *arguments),
    )
    plain = center_format == "fp32"
    assert there[0] == pytest.approx(here[0], rel=1e-5 if plain else 1e-3)
    for mine, theirs in zip(there[1:], here[1:], strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert error < (1e-4 if plain else 2e-2)


@pytest.mark.parametrize(
    "margin", [ArcFace(), ArcFace(scale=128, inter_class_filter=0.1), SubCenterArcFace()], ids=str
)
def test_several_positives_on_kernels_train_as_on_torch(launch, margin):
    arguments = (margin, "fp32", "fp32", RowSGD(lr=0.1), 3)
    there, here = (
        launch.run(_trained, launch.device, True, *arguments),
        _trained("cpu", False, *arguments),
    )
    assert there[0] == pytest.approx(here[0], rel=1e-5)
    for mine, theirs in zip(there[1:], here[1:], strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-4


# --- compiled for Hopper, without a GPU --------------------------------------------------------


@pytest.mark.slow
def test_unit_rows_compile_for_hopper_without_spills_and_round_to_nearest(tmp_path):
    """The interpreter runs what the compiler refuses, and truncates where a GPU must not."""
    out = tmp_path / "kernels.json"
    done = compiled_python(
        "tools/bench/compile_kernels.py", "--only", "unit_rows", "--json", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["kernels"]
    assert len(rows) == 17
    for row in rows:
        assert row["spill_bytes"] == 0
        assert row["bf16_rounding"] == (["rn"] if row["unit"] == "bf16" else []), row


@pytest.mark.slow
def test_a_new_learning_rate_key_step_or_tile_compiles_nothing_and_rows_have_no_fma():
    script = """
import sys
import torch
from tools.bench import compile_kernels
from tests.head.test_kernels import catch_up_case, sgd_case
from tests.support.kernels import catch_up_, sgd_
from partialfc.head.tiles.triton_steps import exponentials
compiled = compile_kernels.compile_only()
for i in (1, 16, 2**40):
    case = sgd_case("fp16", "int8", rows=min(i, 16))
    case.update(lr=i, weight_decay=float(i), momentum=1 / i, start=i, stop=i + 1)
    sgd_(**case, center_key=i, momentum_key=-i, first_row=i, skip=torch.tensor(False))
print(len(set(map(id, compiled))), len(compiled), compiled[0].asm["ptx"].count("fma.rn.f32"))
compiled.clear()
for i in (1, 16, 33):
    logit_TB = torch.zeros(i, 64)
    exponentials(logit_TB, torch.zeros(1, 64, dtype=torch.int64), bend=None, shift_B=None,
                 sum_B=None, dtype=torch.bfloat16)
print(len(set(map(id, compiled))), len(compiled))
compiled.clear()
for steps in (1, 16, 1040):
    catch_up_(**{**catch_up_case("fp16", "int8", steps=steps)[0], "center_key": steps})
print(len(set(map(id, compiled))), len(compiled), compiled[0].asm["ptx"].count("fma.rn"))
"""
    done = compiled_python("-c", script)
    counted = ["1", "3", "0", "1", "3", "1", "3", "0"]
    assert done.stdout.split() == counted, done.stdout + done.stderr


@pytest.mark.parametrize(("target", "spills"), [(80, 0), (90, 0), (100, 168), (103, 168)])
def test_the_record_is_of_every_kernel_without_atomics_or_fused_rounding(target, spills):
    """And of compilers that a first step waits for less than 20 seconds."""
    record = json.loads((ROOT / f"tools/bench/results/kernels_sm{target}.json").read_text())
    rows = record["kernels"]
    kernels = {"unit_rows", "exponentials", "sgd_", "catch_up_", "pull_", "update_"}
    assert {row["kernel"] for row in rows} == kernels
    assert all(row["spill_bytes"] <= spills for row in rows)
    assert not any(row["atomics"] for row in rows), "sums would depend on the order of blocks"
    of_rows = [row for row in rows if row["kernel"] in ("sgd_", "catch_up_")]
    assert not any(row["fma"] for row in of_rows), "bytes would differ"
    seconds = {}
    for row in rows:  # the slowest variant of each, and of the fused ones with and without kept
        which = row["kernel"], row.get("kept")
        seconds[which] = max(seconds.get(which, 0), row["compile_seconds"])
    apart = sum(seconds[name, None] for name in ("unit_rows", "catch_up_"))
    plain = apart + 2 * seconds["exponentials", None] + seconds["sgd_", None]  # one for each pass
    fused = apart + sum(one for (_, kept), one in seconds.items() if kept)
    assert max(plain, fused) < 20
    if target == 90:
        page = (ROOT / "partialfc/head/kernels.md").read_text()
        assert f"{fused:.1f} s and {plain:.1f} s at most for sm_90" in page
