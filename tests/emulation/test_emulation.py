"""The emulation of CUDA itself: its results, and the errors that it must detect."""

import numpy as np
import pytest

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "shared_bytes"), [("reverse_static", 0), ("reverse_dynamic", 256)]
)
def test_shared_memory(emulated, kernel, shared_bytes, seed):
    emulated.set_seed(seed)
    x = np.arange(192, dtype=np.float32)
    y = np.full_like(x, np.nan)
    emulated.take_launches()
    emulated.self_test(
        kernel, {"in": x}, {"out": y}, blocks=3, threads=64, shared_bytes=shared_bytes
    )
    np.testing.assert_array_equal(y.reshape(3, 64), x.reshape(3, 64)[:, ::-1])
    ((name, device, blocks, threads),) = emulated.take_launches()
    assert name == f"gankernels::cuda::{kernel}(float const*, float*)"
    assert (device, blocks, threads) == (0, 3, 64)


def test_a_missing_barrier_gives_nan_and_depends_on_the_seed(emulated):
    x = np.arange(64, dtype=np.float32)
    unwritten = set()
    for seed in SEEDS:
        emulated.set_seed(seed)
        y = np.zeros_like(x)
        emulated.self_test("reverse_without_barrier", {"in": x}, {"out": y}, threads=64)
        assert np.isnan(y).any()
        unwritten.add(tuple(np.flatnonzero(np.isnan(y))))
    assert len(unwritten) > 1


def test_a_block_finds_nothing_of_another_in_shared_memory(emulated):
    x = np.ones(5, dtype=np.float32)
    y = np.zeros_like(x)
    emulated.self_test("read_uninitialized", {"in": x}, {"out": y}, blocks=5, threads=32)
    assert np.isnan(y).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_functions(emulated, seed):
    emulated.set_seed(seed)
    x = np.arange(64, dtype=np.float32) + 100
    y = np.full((64, 8), np.nan, dtype=np.float32)
    emulated.self_test("warp_functions", {"in": x}, {"out": y}, threads=64)
    thread = np.arange(64)
    warp, lane = thread // 32 * 32, thread % 32
    np.testing.assert_array_equal(y[:, 0], x[warp + 3])
    np.testing.assert_array_equal(y[:, 1], x[thread // 8 * 8 + 1])
    np.testing.assert_array_equal(y[:, 2], x[np.where(lane + 5 < 32, thread + 5, thread)])
    np.testing.assert_array_equal(y[:, 3], x[np.where(lane % 16 >= 5, thread - 5, thread)])
    np.testing.assert_array_equal(y[:, 4], x[warp + (lane ^ 6)])
    np.testing.assert_array_equal(y[:, 5], 0x7F)
    np.testing.assert_array_equal(y[:, 6], 1)
    np.testing.assert_array_equal(y[:, 7], 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_part_of_a_warp_may_shuffle(emulated, seed):
    emulated.set_seed(seed)
    x = np.arange(32, dtype=np.float32)
    y = np.full_like(x, np.nan)
    emulated.self_test("half_warp_shuffle", {"in": x}, {"out": y}, threads=32)
    lane = np.arange(32)
    np.testing.assert_array_equal(y, np.where(lane < 16, x[lane ^ 1], x))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "threads", "shared_bytes", "message"),
    [
        ("barrier_in_branch", 32, 0, r"barrier at line \d+ reached by 5 of 32 threads"),
        ("two_barriers", 32, 0, r"threads wait at lines \d+ and \d+"),
        ("shuffle_with_absent_lanes", 32, 0, r"lanes of mask 0xffffffff that never come"),
        ("shuffle_from_outside_mask", 32, 0, "shuffle from a lane outside the mask"),
        ("shuffle_outside_own_mask", 32, 0, "called by a lane outside its mask"),
        ("half_warp_shuffle", 8, 0, "mask names lanes beyond the block"),
        ("two_shuffles", 32, 0, r"lanes of mask 0xffffffff that never come"),
        ("two_votes", 32, 0, r"lanes of mask 0xffffffff that never come"),
        ("vote_outside_own_mask", 32, 0, "called by a lane outside its mask"),
        ("warp_barrier_with_absent_lanes", 32, 0, r"lanes of mask 0xffffffff that never come"),
        ("shuffle_of_odd_width", 32, 0, "shuffle of invalid width"),
        ("misaligned_store", 1, 0, "misaligned store"),
        ("misaligned_load_of_global", 1, 0, "misaligned load"),
        ("misaligned_vector_load", 1, 0, "misaligned load"),
        ("misaligned_vector_store", 1, 0, "misaligned store"),
    ],
)
def test_errors_name_kernel_and_block(emulated, kernel, threads, shared_bytes, message, seed):
    emulated.set_seed(seed)
    x, y = np.zeros((2, 64), dtype=np.float32)
    expected = rf"{message}.* in block \([012], 0, 0\) of gankernels::cuda::{kernel}\("
    with pytest.raises(RuntimeError, match=expected):
        emulated.self_test(
            kernel, {"in": x}, {"out": y}, blocks=3, threads=threads, shared_bytes=shared_bytes
        )


OF_GLOBAL_MEMORY = ("ldg", "ldca", "ldcg", "ldcs", "ldlu", "ldcv", "stwb", "stcg", "stcs", "stwt")


@pytest.mark.parametrize("function", OF_GLOBAL_MEMORY)
def test_what_is_of_global_memory_is_refused_elsewhere(emulated, function):
    x, y = np.zeros((2, 64), dtype=np.float32)
    emulated.self_test(f"{function}_of_global", {"in": x}, {"out": y}, threads=1)
    assert y[1] == (2 if function.startswith("st") else 1)
    for name, space in (
        ("shared", "shared memory"), ("local", "local memory"), ("the_host", "memory of the host")
    ):  # fmt: skip
        kernel = f"{function}_of_{name}"
        expected = (
            rf"^__{function}, which is of global memory, of {space} by thread 0 in block "
            rf"\(0, 0, 0\) of gankernels::cuda::{kernel}\(.*\), at line \d+ of self_test\.cu$"
        )
        with pytest.raises(RuntimeError, match=expected):
            emulated.self_test(kernel, {"in": x}, {"out": y}, threads=1)


def test_writes_outside_of_what_was_asked_for(emulated):
    x, y = np.zeros((2, 64), dtype=np.float32)
    with pytest.raises(RuntimeError, match="write outside buffer 'out', at byte 256 of 256"):
        emulated.self_test("write_after_end", {"in": x}, {"out": y}, threads=64)
    with pytest.raises(RuntimeError, match="beyond dynamic shared memory, at byte 252"):
        emulated.self_test("reverse_dynamic", {"in": x}, {"out": y}, threads=64, shared_bytes=252)


@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes"), [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, 1 << 20)]
)
def test_impossible_launches(emulated, blocks, threads, shared_bytes):
    x, y = np.zeros((2, 64), dtype=np.float32)
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        emulated.self_test(
            "reverse_dynamic",
            {"in": x},
            {"out": y},
            blocks=blocks,
            threads=threads,
            shared_bytes=shared_bytes,
        )
