"""Triton kernels: what the attention backend `triton` and the kernels plugin `triton` are made of.

Modules of this package import triton at their top, so they are themselves imported only where one of those plugins is
used. `runtime.py` says whether Triton can run here, without importing it where it is missing.
"""
