"""The package's version, in a separate file: the build reads it without importing torch."""

__version__ = "0.1.0"
