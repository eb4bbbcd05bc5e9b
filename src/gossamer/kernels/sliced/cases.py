"""What the product of sliced rows is tested and timed on."""

from gossamer.kernels._cases import Case

# Slices are of 32 rows, blocks of 8 entries, chunks of 4 blocks: sizes on, before and after these, short gaps and long ones.
TESTED = (
    Case(1, 1, sparsity=0.0),
    Case(0, 5),
    Case(5, 0),
    Case(31, 64),
    Case(32, 65, sparsity=0.0),
    Case(33, 40, sparsity=0.9),
    Case(17, 80, sparsity=1.0),
    Case(130, 513, sparsity=0.5),
    Case(130, 513, sparsity=0.95),
    Case(40, 3000, sparsity=0.995),
)
TIMED = tuple(Case(*shape, sparsity=s) for shape in ((4096, 4096), (11008, 4096), (4096, 11008)) for s in (0.7, 0.9, 0.95))
