"""What the product of tiles on 4-bit grids is tested and timed on."""

from gossamer.kernels._cases import Case

TESTED = (
    Case(1, 16, "1x16", 0.0),
    Case(0, 16, "1x16"),
    Case(4, 0, "1x16"),
    Case(33, 528, "1x16", 0.5),
    Case(130, 1040, "1x16", 0.9),
    Case(300, 2048, "1x32", 0.6),  # some stretches of tiles end within a row
    Case(3, 20000, "1x16", 0.3),  # rows longer than a stretch
    Case(33, 51, "3x3", 0.3),
    Case(128, 513, "4x1", 0.7),
    Case(12, 65, "2x5", 0.5),
    Case(7, 9, "7x9", 0.0),
    Case(8, 16, "2x2", 1.0),
)
TIMED = tuple(Case(*shape, "1x16", s) for shape in ((4096, 4096), (11008, 4096), (4096, 11008)) for s in (0.5, 0.9))
