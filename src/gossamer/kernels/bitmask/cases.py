"""What the product of a bitmask is tested and timed on."""

from gossamer.kernels._cases import Case

# Rows come in threes and fours, columns in words of 16 and 32 and in blocks of 512 to 2048: sizes on, before and after these.
TESTED = (
    Case(1, 1, sparsity=0.0),
    Case(0, 5),
    Case(5, 0),
    Case(4, 16, sparsity=0.9),
    Case(3, 31),
    Case(9, 33, sparsity=0.2),
    Case(64, 96, sparsity=0.0),
    Case(17, 80, sparsity=1.0),
    Case(130, 513, sparsity=0.5),
    Case(130, 513, sparsity=0.9),
    Case(70, 1300, sparsity=0.7),
    Case(45, 2089, sparsity=0.9),
    Case(3, 66001, sparsity=0.95),
)
TIMED = tuple(Case(*shape, sparsity=s) for shape in ((4096, 4096), (11008, 4096), (4096, 11008)) for s in (0.5, 0.7, 0.9))
