"""The order of a tiled bitmask, which its format, its kernels and its reference share.

Tiles are those of the tensor cores' product m16n8k16: lane 4g + t of a warp holds entries of rows g and g + 8. Here they are
in columns 8t to 8t + 7 of each 32, which makes two such products; so a lane has whole bytes of the mask, and eight inputs in a
row.
"""

import torch
from torch import Tensor

ROWS = 16  # of a block
COLUMNS = 256
LANES = 32
SHARE = ROWS * COLUMNS // LANES  # entries of a block that a lane has
PIECE = 1 << 13  # blocks whose places are looked for together: there are several integers for each entry meanwhile


def blocks(shape: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks there are one below the other and side by side."""
    return -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)


def arranged(matrix: Tensor) -> Tensor:
    """Return a matrix block by block and lane by lane, (blocks, 32, 128), what is beyond its edges filled with zeros."""
    down, across = blocks((matrix.shape[0], matrix.shape[1]))
    whole = torch.nn.functional.pad(matrix, (0, across * COLUMNS - matrix.shape[1], 0, down * ROWS - matrix.shape[0]))
    # rows: half, g; columns: 32 of them, t, one of eight
    apart = whole.view(down, 2, ROWS // 2, across, COLUMNS // 32, 4, 8)
    return apart.permute(0, 3, 2, 5, 4, 1, 6).reshape(down * across, LANES, SHARE)


def restored(lanes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `arranged`."""
    down, across = blocks(shape)
    apart = lanes.view(down, across, ROWS // 2, 4, COLUMNS // 32, 2, 8)
    whole = apart.permute(0, 5, 2, 1, 4, 3, 6).reshape(down * ROWS, across * COLUMNS)
    return whole[: shape[0], : shape[1]].contiguous()


def begins(mask: Tensor, entries: int) -> Tensor:
    """Return the word at which each block begins and the last one ends, int64 (blocks + 1,).

    A lane's kept entries lie one or two to a word, in the order of its bits; words lie level by level: the first of every lane
    that has one, then the second.

    Args:
        mask: (blocks, 32, 128), as `arranged` makes it.
        entries: of a word: 2 of 16 bits, or 1 of 32.
    """
    return torch.nn.functional.pad((-(-mask.sum(-1) // entries)).sum(1).cumsum(0), (1, 0))


def places(mask: Tensor, entries: int) -> Tensor:
    """Return where each kept entry lies among the entries of all words, int64 (kept,)."""
    count = -(-mask.sum(-1) // entries)  # words of a lane
    levels = max(int(count.max()), 1) if len(count) else 1
    there = count[:, None, :] > torch.arange(levels, device=mask.device)[:, None]  # (blocks, levels, 32)
    before = (there.flatten(1).cumsum(1, dtype=torch.int32) - 1).view_as(there).transpose(1, 2)
    rank = (mask.cumsum(-1, dtype=torch.int32) - 1).clamp_min_(0)
    word = before.gather(2, (rank // entries).long())[mask] + begins(mask, entries)[:-1].repeat_interleave(mask.sum((1, 2)))
    return word * entries + (rank % entries)[mask]
