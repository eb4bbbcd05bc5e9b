"""What the product of n of every m is tested and timed on."""

from gossamer.kernels._cases import Case

# Positions of 1, 2, 4 and 8 bits, rows whose last byte of positions is full and is not.
TESTED = tuple(
    Case(*shape, pattern, None)
    for pattern, *shapes in (
        ("2:4", (1, 4), (0, 8), (3, 0), (130, 516)),
        ("1:2", (1, 2), (5, 18)),
        ("1:4", (9, 12)),
        ("3:7", (33, 7), (20, 511)),
        ("5:16", (6, 48), (70, 1296)),
        ("3:17", (5, 51)),
        ("200:256", (3, 512)),
    )
    for shape in shapes
)
TIMED = tuple(
    Case(*shape, pattern, None) for shape in ((4096, 4096), (11008, 4096), (4096, 11008)) for pattern in ("2:4", "1:4", "4:16")
)
