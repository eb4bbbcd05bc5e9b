"""What the product of a tiled bitmask is tested and timed on."""

from gossamer.kernels._cases import Case

# Blocks are of 16 rows and 256 columns, a lane's part of eight columns in 32: sizes on, before and after these.
TESTED = (
    Case(1, 1, sparsity=0.0),
    Case(0, 5),
    Case(5, 0),
    Case(16, 256, sparsity=0.0),
    Case(15, 255),
    Case(17, 264, sparsity=0.9),
    Case(17, 80, sparsity=1.0),
    Case(130, 513, sparsity=0.5),
    Case(130, 513, sparsity=0.95),
    Case(33, 3000, sparsity=0.7),
)
TIMED = tuple(Case(*shape, sparsity=s) for shape in ((14336, 4096), (4096, 14336)) for s in (0.5, 0.7, 0.9))
