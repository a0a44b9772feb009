# make demo       train a conditional GAN on real handwritten digits and leave a picture
# make test       set everything up and run all tests
# make bench      the kernels against eager PyTorch and torch.compile
# make fuzz       a hundred thousand random calls of all ops, which must not end a process
# make gpu-check  all that takes an NVIDIA GPU: tests, compute-sanitizer, CUDA graphs, benchmarks;
#                 WHEEL=path checks a wheel, OUT=folder takes the results; installs nothing
# make wheel      a wheel that can be published, for every Python and all GPUs, in DIST
# make lint       formatting and static checks
#
# Each sets up what it needs: see .ci/prepare.py. TORCH is what pip installs where there is no
# suitable torch; PyPI's Linux build brings CUDA with it, pytorch.org says how to get another.

PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN ?= runs/demo
DIST ?= dist

ready = $$($(PYTHON) .ci/prepare.py --torch "$(TORCH)" $(1))

.PHONY: demo test bench fuzz gpu-check wheel lint clean

demo:
	@python=$(call ready,train) && \
	$$python -m gankernels train cdcgan --data digits --steps 2000 --set width=16 \
	  --set lr=1e-3 --set d_lr=1e-3 --out $(RUN) --resume && \
	$$python -m gankernels evaluate $(RUN) && \
	echo "samples: $(RUN)/samples.png"

test:
	@python=$(call ready,train test) && $$python -m pytest

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
	@python=$(call ready,test) && \
	$$python -m ruff check . && $$python -m ruff format --check . && \
	find csrc benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' | \
	xargs $$python -c "import clang_format; clang_format.clang_format()" --dry-run --Werror

clean:
	rm -rf build dist *.egg-info gankernels/libgankernels.so gankernels/_build.json \
	  tests/emulation/build
