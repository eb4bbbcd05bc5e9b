"""The sizes of a sliced layout, which its format, its kernels and its reference share."""

ROWS = 32  # rows side by side: a warp's lanes
STEP = 8  # entries of a block: what a lane loads at a time, 16 bytes of 16-bit values
CHUNK = 4  # blocks from one base to the next: a row can be entered at each
