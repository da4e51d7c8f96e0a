"""The package's version, apart from __init__.py so that building a wheel does not import PyTorch."""

__version__ = "0.1.0"
