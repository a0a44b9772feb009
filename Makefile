# make demo       train a conditional GAN on real handwritten digits and write a picture
# make test       set everything up and run all tests
# make oldest     run the tests of data, training and the command line with the oldest dependencies
# make bench      compare the kernels with eager PyTorch and torch.compile
# make fuzz       make a hundred thousand random calls of all ops, none of which may end a process
# make gpu-check  run everything that needs an NVIDIA GPU: tests, compute-sanitizer, CUDA graphs,
#                 benchmarks; WHEEL=path tests a wheel, OUT=folder sets where results go; installs
#                 nothing
# make wheel      build a wheel that can be published, for every Python and all GPUs, in DIST
# make lint       check formatting and types, and run the linters
# make ptx-lint   check what nvcc makes of the kernels for every GPU: address spaces, spills
# make docs       build the documentation as a website, in site/
#
# Each target sets up what it needs: see .ci/prepare.py. TORCH is what pip installs if there is no
# suitable torch; torch from PyPI includes CUDA on Linux, pytorch.org shows how to get another build.

PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN ?= runs/demo
DIST ?= dist

ready = $$($(PYTHON) .ci/prepare.py --torch "$(TORCH)" $(1))

.PHONY: demo test oldest bench fuzz gpu-check wheel lint ptx-lint docs clean

demo:
	@python=$(call ready,train) && \
	$$python -m gankernels train cdcgan --data digits --steps 2000 --set width=16 \
	  --set lr=1e-3 --set d_lr=1e-3 --out $(RUN) --resume && \
	$$python -m gankernels evaluate $(RUN) && \
	echo "samples: $(RUN)/samples.png"

test:
	@python=$(call ready,train test) && \
	OMP_NUM_THREADS=1 $$python -m pytest -n auto --dist worksteal

# The library fits every Python and every torch; so does the one built in place.
oldest:
	@python=$(call ready,test) && oldest=$$($$python .ci/oldest.py "$(TORCH)") && \
	$$oldest -m pytest tests/data tests/games tests/metrics tests/networks tests/train \
	  tests/test_cli.py tests/test_html.py

bench:
	@python=$(call ready,test) && export PYTHONPATH=. && \
	$$python benchmarks/batch_norm_leaky_relu.py --compiled && \
	$$python benchmarks/minibatch_discrimination.py --memory && \
	$$python benchmarks/minibatch_stddev.py && \
	$$python benchmarks/gradient_penalty.py && \
	$$python benchmarks/adam.py && \
	$$python benchmarks/memory.py

fuzz:
	@python=$(call ready,test) && $$python tests/ops/fuzz.py --calls 100000 --public 20000

# Not by way of `ready`: the machine with the GPU may have no network to install anything from.
gpu-check:
	@$(PYTHON) benchmarks/gpu_check.py $(if $(WHEEL),--wheel "$(WHEEL)") $(if $(OUT),--out "$(OUT)")

# torch's own libraries are found in torch, not packed along. Nothing is left to patch, only to tag:
# manylinux with the oldest glibc that the build needs, so build on an old system.
wheel:
	@python=$(call ready,test) && rm -rf build/lib* build/wheel && \
	$$python -m pip wheel . --no-deps --no-build-isolation --no-index --wheel-dir build/wheel && \
	$$python -m auditwheel repair --patcher none --exclude 'libtorch*' --wheel-dir "$(DIST)" \
	  build/wheel/*.whl

lint:
	@python=$(call ready,--no-kernels test) && \
	$$python -m ruff check . && $$python -m ruff format --check . && $$python -m mypy && \
	find csrc benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' | \
	xargs $$python -c "import clang_format; clang_format.clang_format()" --dry-run --Werror

ptx-lint:
	@python=$(call ready,test) && \
	env -u TORCH_CUDA_ARCH_LIST GANKERNELS_CUDA=1 $$python setup.py --quiet build_ext \
	  --build-temp build/every_gpu --build-lib build/every_gpu/lib && \
	$$python tests/packaging/ptx_lint.py build/every_gpu

# --strict makes a broken link or reference an error. The variable hides an advertisement.
docs:
	@python=$(call ready,--no-kernels docs) && NO_MKDOCS_2_WARNING=1 $$python -m mkdocs build --strict --quiet && \
	echo "documentation: site/index.html"

clean:
	rm -rf build dist site *.egg-info gankernels/libgankernels.so gankernels/_build.json \
	  tests/emulation/build
