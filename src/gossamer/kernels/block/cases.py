"""What the product of tiles is tested and timed on."""

from gossamer.kernels._cases import Case

TESTED = (
    Case(4, 1, "4x1", 0.0),
    Case(0, 8, "4x1"),
    Case(4, 0, "4x1"),
    Case(128, 513, "4x1", 0.7),
    Case(6, 64, "2x8"),
    Case(130, 520, "2x8", 0.9),
    Case(33, 51, "3x3", 0.3),
    Case(5, 96, "1x32"),
    Case(32, 64, "16x16", 0.75),
    Case(7, 9, "7x9", 0.0),
    Case(8, 16, "2x2", 1.0),
)
TIMED = tuple(
    Case(*shape, pattern, s)
    for shape in ((4096, 4096), (11008, 4096), (4096, 11008))
    for pattern in ("4x1", "1x16", "16x16")
    for s in (0.5, 0.9)
)
