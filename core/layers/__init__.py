"""Tensor-parallel-aware building blocks of models. A layer is given all it needs; there is no global state."""
