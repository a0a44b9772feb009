"""The ops: one file each, with reference, kernel calls, fake kernels and derivatives."""
