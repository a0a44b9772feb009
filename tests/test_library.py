"""Information about the build, and the choice between kernels and plain PyTorch."""

import re
import shutil
import types
import warnings
from pathlib import Path

import pytest
import torch

import gankernels as gk
from gankernels import _library, allocator

PACKAGE = Path(gk.__file__).parent


def test_build_info():
    info = gk.build_info()
    assert set(info) == {
        "version", "torch", "built_with_torch", "compiler", "cpu_instruction_sets",
        "cpu_capability", "cuda", "cuda_architectures", "cuda_in_use", "cuda_off_because",
        "backend", "kernels_off_because",
    }  # fmt: skip
    assert info["version"] == gk.__version__
    assert info["torch"] == torch.__version__
    assert info["kernels_off_because"] is None
    assert info["cpu_instruction_sets"] == ["baseline", "avx2", "avx512"]
    assert info["cpu_capability"] in ("default", "avx2", "avx512")
    assert info["cuda_in_use"] is (info["cuda_off_because"] is None)
    assert bool(info["cuda"]) is bool(info["cuda_architectures"])
    assert info["compiler"]
    assert info["built_with_torch"]


def test_capability_is_no_better_than_pytorchs():
    order = ["default", "avx2", "avx512"]
    theirs = torch.backends.cpu.get_cpu_capability().lower()
    if theirs in order:
        assert order.index(gk.build_info()["cpu_capability"]) <= order.index(theirs)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"cuda": None}, "this build has no CUDA kernels; install the CUDA toolkit"),
        ({"cuda": "13.0"}, "CPU-only build|no usable NVIDIA GPU"),
    ],
)
def test_why_cuda_kernels_are_off(monkeypatch, record, reason):
    monkeypatch.setattr(_library, "_record", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = gk.build_info()
    assert info["cuda_in_use"] is False
    assert any(part in info["cuda_off_because"] for part in reason.split("|"))


def test_driver_is_named_where_the_toolkit_needs_a_new_one(monkeypatch):
    monkeypatch.setattr(_library, "_record", {"cuda": "13.0"})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA 13 needs driver 580" in gk.build_info()["cuda_off_because"]
    monkeypatch.setattr(_library, "_record", {"cuda": "12.6"})
    assert "driver" not in gk.build_info()["cuda_off_because"]


def test_use_backend():
    assert gk.build_info()["backend"] == "auto"
    with gk.use_backend("reference"):
        assert gk.build_info()["backend"] == "reference"
        with gk.use_backend("auto"):
            assert gk.build_info()["backend"] == "auto"
        assert gk.build_info()["backend"] == "reference"
    assert gk.build_info()["backend"] == "auto"
    gk.use_backend("reference")
    assert gk.build_info()["backend"] == "reference"
    gk.use_backend("auto")


def test_use_backend_entered_again():
    context = gk.use_backend("reference")
    for _ in range(2):
        with context:
            assert gk.build_info()["backend"] == "reference"
            with gk.use_backend("auto"), context:
                assert gk.build_info()["backend"] == "reference"
            with context:
                pass
            assert gk.build_info()["backend"] == "reference"
        assert gk.build_info()["backend"] == "auto"


def test_use_backend_that_ends_in_another_order():
    """As in generators, and in threads."""

    def choosing(name):
        with gk.use_backend(name):
            yield gk.build_info()["backend"]

    first, second = choosing("reference"), choosing("auto")
    assert [next(first), next(second)] == ["reference", "auto"]
    first.close()
    assert gk.build_info()["backend"] == "auto"
    second.close()
    assert gk.build_info()["backend"] == "auto"
    with gk.use_backend("reference"):
        first, second = choosing("auto"), choosing("reference")
        next(first), next(second)
        first.close(), second.close()
        assert gk.build_info()["backend"] == "reference"
    assert gk.build_info()["backend"] == "auto"


def test_use_backend_is_undone_by_an_exception():
    with pytest.raises(KeyError), gk.use_backend("reference"):
        raise KeyError
    assert gk.build_info()["backend"] == "auto"


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"name must be one of \('auto', 'reference'\), got 'cuda'"
    ):
        gk.use_backend("cuda")
    assert gk.build_info()["backend"] == "auto"


# ---- devices without kernels ---------------------------------------------------------------------

OP = "batch_norm_leaky_relu"


@pytest.fixture
def fresh(monkeypatch):
    """As if nothing had been asked yet."""
    monkeypatch.setattr(_library, "_served", set())
    monkeypatch.setattr(_library, "_warned", set())


def tensor_on(device):
    """Stands for a tensor on a device that this machine lacks."""
    return types.SimpleNamespace(device=torch.device(device))


def test_cpu_and_meta_have_kernels(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _library.has_kernel(torch.ones(1), OP)
        assert _library.has_kernel(torch.ones(1, device="meta"), OP)
        with gk.use_backend("reference"):
            assert not _library.has_kernel(torch.ones(1), OP)


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_warns_once_on_a_device_without_kernels(fresh, kind):
    with pytest.warns(UserWarning, match=f"there are kernels for cpu and cuda, none for {kind}"):
        assert not _library.has_kernel(tensor_on(kind), OP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _library.has_kernel(tensor_on(kind), OP)


def test_warns_on_cuda_where_the_build_has_no_cuda(fresh, monkeypatch):
    monkeypatch.setattr(_library, "_record", {"cuda": None})
    monkeypatch.setattr(_library, "_registered", lambda op, kind: False)
    with pytest.warns(
        UserWarning, match=r"plain PyTorch on cuda.*reinstall with GANKERNELS_CUDA=1"
    ):
        assert not _library.has_kernel(tensor_on("cuda"), OP)


# ---- a driver or GPU that cannot run the kernels -------------------------------------------------


@pytest.fixture
def gpu(fresh, monkeypatch):
    """`gpu(driver, capability, **record)`: as if this machine had such a GPU, and such a build."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "_registered", lambda op, kind: True)

    def machine(driver, capability, cuda="13.0", built=("sm_80", "sm_90", "compute_90")):
        record = {"cuda": cuda, "cuda_architectures": list(built)}
        monkeypatch.setattr(_library, "_record", record)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return machine


OLD_DRIVER = (
    r"built with CUDA 13.0, which needs a driver of CUDA 13 \(580 or newer\), and this machine's "
    r"is of CUDA 12.8; update the driver or reinstall with a toolkit of CUDA 12"
)
OTHER_GPU = (
    r"this GPU has compute capability 7.5, and the kernels are built for sm_80, sm_90, compute_90; "
    r"reinstall with TORCH_CUDA_ARCH_LIST=7.5"
)


@pytest.mark.parametrize(
    ("driver", "capability", "reason"),
    [(12080, (9, 0), OLD_DRIVER), (13000, (7, 5), OTHER_GPU), (12080, (7, 5), OLD_DRIVER)],
)
def test_what_cannot_run_the_kernels_falls_back_with_one_warning(gpu, driver, capability, reason):
    gpu(driver, capability)
    with pytest.warns(UserWarning, match=f"^{OP} runs as plain PyTorch on cuda: .*{reason}$"):
        assert not _library.has_kernel(tensor_on("cuda:0"), OP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _library.has_kernel(tensor_on("cuda:0"), OP)
        assert _library.has_kernel(torch.ones(1), OP)
    info = gk.build_info()
    assert info["cuda_in_use"] is False
    assert re.search(reason, info["cuda_off_because"])


@pytest.mark.parametrize(
    ("driver", "cuda", "runs"),
    [
        (13000, "13.0", True), (13020, "13.0", True), (13000, "13.2", True), (14000, "13.0", True),
        (12090, "13.0", False), (12020, "12.8", True), (11080, "12.0", False),
        (13000, "12.8", True),
    ],
)  # fmt: skip
def test_drivers(gpu, driver, cuda, runs):
    gpu(driver, (9, 0), cuda)
    assert gk.build_info()["cuda_in_use"] is runs


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_89", (8, 6), False),
        ("sm_80", (9, 0), False), ("sm_90", (8, 0), False), ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False), ("sm_100f", (10, 3), True), ("sm_100", (11, 0), False),
        ("compute_90", (12, 0), True), ("compute_120", (11, 0), False),
        ("compute_90", (8, 9), False), ("compute_90a", (10, 0), False),
    ],
)  # fmt: skip
def test_architectures(gpu, built, capability, runs):
    gpu(13000, capability, built=(built,))
    info = gk.build_info()
    assert info["cuda_in_use"] is runs
    assert (info["cuda_off_because"] is None) is runs


def test_gpus_are_told_apart(gpu, monkeypatch):
    gpu(13000, (9, 0))
    capabilities = {0: (9, 0), 1: (7, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    assert _library.has_kernel(tensor_on("cuda:0"), OP)
    with pytest.warns(UserWarning, match="compute capability 7.0"):
        assert not _library.has_kernel(tensor_on("cuda:1"), OP)
    assert _library.has_kernel(tensor_on("cuda:0"), OP)


def test_rocm(gpu, monkeypatch):
    gpu(13000, (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "is built for ROCm, the kernels for CUDA" in gk.build_info()["cuda_off_because"]


def test_no_warning_where_the_reference_was_asked_for(fresh):
    with warnings.catch_warnings(), gk.use_backend("reference"):
        warnings.simplefilter("error")
        assert not _library.has_kernel(tensor_on("xpu"), OP)


# ---- a package that is not compiled --------------------------------------------------------------

WITHOUT_KERNELS = """if True:
    import warnings
    import torch, gankernels as gk
    import torch.nn.functional as F
    info = gk.build_info()
    print(info["kernels_off_because"])
    assert info["cpu_capability"] is None and info["cuda_in_use"] is False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer, norm = gk.nn.BatchNormLeakyReLU2d(3), torch.nn.BatchNorm2d(3)
        for _ in range(3):
            x = torch.randn(4, 3, 5, 5, requires_grad=True)
            y = layer(x)
            torch.testing.assert_close(y, F.leaky_relu(norm(x), 0.2))
            (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            grad.square().sum().backward()
        torch.testing.assert_close(layer.state_dict(), norm.state_dict())
    print(*(w.message for w in caught), sep="\\n")
"""


def copy_without_library(folder):
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, folder / "gankernels", ignore=ignored)


def test_without_a_library_pytorch_computes_and_one_warning_says_how_to_build(tmp_path, python):
    copy_without_library(tmp_path)
    result = python("-c", WITHOUT_KERNELS, env={"PYTHONPATH": tmp_path}, cwd=tmp_path)
    reason, warning = result.stdout.splitlines()
    assert "the kernels are not compiled" in reason
    assert "pip install ." in reason
    assert "plain PyTorch on cpu" in warning
    assert reason in warning


def test_a_library_that_cannot_be_loaded_says_why(tmp_path, python):
    copy_without_library(tmp_path)
    (tmp_path / "gankernels" / "libgankernels.so").write_text("no library")
    result = python("-c", WITHOUT_KERNELS, env={"PYTHONPATH": tmp_path}, cwd=tmp_path)
    reason, warning = result.stdout.splitlines()
    assert f"cannot be loaded into torch {torch.__version__}" in reason
    assert "libgankernels.so" in reason
    assert reason in warning


# ---- memory --------------------------------------------------------------------------------------


def test_tune_allocator(python):
    """A large block lies in the heap afterwards, where it is kept, and not before."""
    script = """if True:
        import ctypes, gankernels
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]

        def lies_in_heap():
            block = libc.malloc(ctypes.c_size_t(64 << 20))
            maps = [line.split() for line in open("/proc/self/maps") if "[heap]" in line]
            ends = [[int(x, 16) for x in m[0].split("-")] for m in maps]
            libc.free(block)
            return any(a <= block < b for a, b in ends)

        print(lies_in_heap(), gankernels.tune_allocator(), lies_in_heap(), lies_in_heap())
    """
    clean = {f"MALLOC_{n}_": "" for n in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")}
    assert python("-c", script, env=clean).stdout.split() == ["False", "True", "True", "True"]


def test_tune_allocator_without_glibc(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert gk.tune_allocator() is False
