"""The lint of nvcc's output: it finds planted mistakes, and none in our kernels."""

import shutil
import subprocess
import sys
from pathlib import Path

import ptx_lint
import pytest

import gankernels as gk

ROOT = Path(__file__).parent.parent.parent

# A global pointer in %rd2, the address of `tile`, which is shared, in %r1, a number in %f1.
PTX = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry kernel(
\t.param .u64 kernel_param_0
)
{{
\t.shared .align 16 .b8 tile[2048];
\tld.param.u64 %rd1, [kernel_param_0];
\tcvta.to.global.u64 %rd2, %rd1;
\tmov.u32 %r1, tile;
\tld.global.f32 %f1, [%rd2+4];
\tst.shared.f32 [%r1], %f1;
{body}
\tret;
}}
"""


def findings(body):
    kernels, found = ptx_lint.lint_ptx(PTX.format(body=body))
    assert kernels == {"kernel"}
    assert {kernel for kernel, _ in found} <= {"kernel"}
    return [what for _, what in found]


CVTA = "cvta.shared.u64 %rd3, %rd9;\n"
GENERIC = "cvta.shared.u64: an address of shared memory made generic"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("@%p1 st.global.v2.f32 [%rd2], {%f1, %f1};", []),
        ("ld.shared.v4.f32 {%f2, %f3, %f4, %f5}, [%r1+16];", []),
        (CVTA, [GENERIC]),
        (
            CVTA + "st.global.wb.v4.u32 [%rd3], {%r2, %r3, %r4, %r5};",
            [GENERIC, "st.global.wb.v4.u32 of an address in shared memory"],
        ),
        (
            CVTA + "mul.wide.u32 %rd4, %r2, 4;\nadd.s64 %rd5, %rd3, %rd4;\nmov.b64 %rd6, %rd5;\n"
            "@!%p1 ld.global.nc.f32 %f2, [%rd6+-8];",
            [GENERIC, "ld.global.nc.f32 of an address in shared memory"],
        ),
        (
            "mov.u64 %rd3, tile;\nred.global.add.f32 [%rd3], %f1;",
            ["red.global.add.f32 of an address in shared memory"],
        ),
        # What is loaded from shared memory is no address, and what is converted back is no generic.
        (CVTA + "ld.shared.u64 %rd4, [%rd3];\nst.global.u64 [%rd4], %rd3;", [GENERIC]),
        (CVTA + "cvta.to.shared.u64 %rd4, %rd3;\nst.shared.f32 [%rd4], %f1;", [GENERIC]),
        ("ld.f32 %f2, [%rd1];", ["ld.f32: a generic access"]),
        ("@%p2 st.v4.f32 [%rd1], {%f1, %f1, %f1, %f1};", ["st.v4.f32: a generic access"]),
        ("ld.volatile.f32 %f2, [%rd1];", ["ld.volatile.f32: a generic access"]),
        ("atom.add.f32 %f2, [%rd1], %f1;", ["atom.add.f32: a generic access"]),
        ("st.local.f32 [%rd1], %f1;", ["st.local.f32: local memory"]),
        (
            "cvta.local.u64 %rd3, %rd9;",
            ["cvta.local.u64: an address of local memory made generic"],
        ),
        ("call.uni f, (param0);", ["call of f, (param0)"]),
    ],
)
def test_ptx(body, expected):
    assert findings(body) == expected


SPILLING = """
#include "cuda/vector.h"
namespace gankernels::cuda {
__global__ void wrong_space(const float* in, float* out) {
  __shared__ __align__(16) float tile[256];
  store<4>(tile + 4 * threadIdx.x, load<4>(in + 4 * threadIdx.x));
  __syncthreads();
  out[threadIdx.x] = tile[255 - threadIdx.x];
}
__global__ void spilling(const float* in, float* out, int n) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = in[i * n + threadIdx.x];
  for (int i = 0; i < n; ++i) values[i % 64] += values[(i * 7 + 1) % 64];
  for (int i = 0; i < 64; ++i) out[i * n + threadIdx.x] = values[i];
}
}
"""


@pytest.fixture
def nvcc():
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return found


def test_what_nvcc_makes_of_wrong_kernels(nvcc, tmp_path):
    """The whole way, from a store of the wrong kind and an array that fits no registers."""
    source = tmp_path / "wrong.cu"
    source.write_text(SPILLING)
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-I", ROOT / "csrc" / "kernels", "-cubin"]
    command += ["--keep", "--keep-dir", tmp_path, "-o", tmp_path / "wrong.cubin", source]
    subprocess.run(command, check=True, capture_output=True)
    counts, found = ptx_lint.lint(tmp_path)
    assert counts == {"wrong, PTX of sm_90": 2, "wrong, code of sm_90": 2}
    lines = "\n".join(ptx_lint.readable(found))
    assert "PTX of sm_90: wrong_space: st.global.wb.v4.u32 of an address in shared memory" in lines
    assert "code of sm_90: spilling: a stack of 256 bytes" in lines
    script = Path(ptx_lint.__file__)
    result = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert result.returncode == 1
    assert "spilling: a stack of" in result.stdout


@pytest.mark.skipif(gk.build_info()["cuda"] is None, reason="the build has no CUDA kernels")
def test_kernels_are_clean():
    """As the build in place has left them: for the architectures of that build."""
    counts, found = ptx_lint.lint(next(ROOT.glob("build/temp*")))
    assert ptx_lint.readable(found) == []
    files = {path.stem for path in (ROOT / "csrc" / "kernels" / "cuda").glob("*.cu")}
    assert {name.split(",")[0] for name in counts} == files
    assert all(count > 10 for count in counts.values())


def test_an_empty_folder_is_no_pass(tmp_path):
    script = Path(ptx_lint.__file__)
    assert subprocess.run([sys.executable, script, tmp_path]).returncode == 1
