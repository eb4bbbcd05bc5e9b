"""The fingerprint of a weight's zeros: an adapter is saved with it, and is refused on other zeros."""

import hashlib

import numpy
import torch
from torch import Tensor


def fingerprint(w: Tensor) -> Tensor:
    """Return the count of a weight's non-zero entries and a hash of where they are: int64, shape (2,), on W's device.

    >>> fingerprint(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))[0]
    tensor(2)
    """
    kept = (w.detach() != 0).cpu().numpy()
    digest = hashlib.blake2b(numpy.packbits(kept).tobytes(), digest_size=8).digest()
    counted = [int(kept.sum()), int.from_bytes(digest, "little", signed=True)]
    return torch.tensor(counted, dtype=torch.int64, device=w.device)
