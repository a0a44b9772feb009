"""The .cu files compiled by g++ and run on the CPU; see include/cuda_runtime.h and emulation.cpp.

For another kernel: its .cu file is found by itself, the fields of its parameters go into
bindings.cpp, its problems and float64 solutions into a test file of its own, on top of harness.py,
and problems that catch its mutants into test_mutants.py.
"""
