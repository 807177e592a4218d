"""The reference of the op every greedy step needs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def argmax(logits: torch.Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Most likely token of each row of [rows, vocab] (the first of equal ones) and its logit; NaN counts as the
    largest."""
    if logits.device.type == "cpu":
        values = logits.numpy()  # shares memory; numpy's argmax is vectorised, 5 to 10 times torch's on CPU
        best = values.argmax(axis=1)
        return best, values[np.arange(len(best)), best]
    peaks, indices = logits.max(dim=1)
    return indices.cpu().numpy(), peaks.cpu().numpy()
