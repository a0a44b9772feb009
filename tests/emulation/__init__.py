"""The .cu files compiled by g++ and run on the CPU; see include/cuda_runtime.h and emulation.cpp.

For another kernel: its .cu file is found by itself, its parameters go into bindings.cpp, its
problems and float64 solutions beside problem.py, its seeded defects into test_defects.py.
"""
