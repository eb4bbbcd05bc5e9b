"""Which jobs a comparison is made of: methods × patterns × sparsities, read and checked before the first one starts."""

from collections.abc import Sequence

from gossamer.core.errors import GossamerError
from gossamer.core.score import Score
from gossamer.scores import Wanda
from gossamer.sites._job import METHODS, Job, pattern_of
from gossamer.solvers import Mask

EVERY = "all"


def jobs_of(
    methods: Sequence[str], patterns: Sequence[str], sparsities: Sequence[float], allocate: str = "uniform"
) -> list[Job]:
    """Read all combinations of methods, patterns and sparsities; a pattern that fixes its own sparsity is there once.

    Args:
        methods: specs; "all" stands for every method that is defined for the pattern, as its name alone makes it, those that
            build on a score with Wanda's.

    Raises:
        GossamerError: there is none, or one that cannot be.

    >>> [str(job.pattern) for job in jobs_of(["Wanda"], ["2:4", "Unstructured"], [0.5, 0.7])]
    ['2:4', "Unstructured(per='row')", "Unstructured(per='row')"]
    """
    if not methods or not patterns:
        raise GossamerError("compare wants at least one method and one pattern, several separated by ';'")
    jobs: list[Job] = []
    for pattern in patterns:
        takes = pattern_of(pattern).takes_sparsity
        if takes and not sparsities:
            raise GossamerError(f"the pattern {pattern} needs a sparsity, for example --sparsity 0.5")
        for sparsity in sparsities if takes else (None,):
            share = allocate if takes else "uniform"
            for method in methods:
                chosen = every(pattern) if method == EVERY else [method]
                jobs += [Job.of(one, pattern, sparsity, share) for one in chosen]
    return list(dict.fromkeys(jobs))


def every(pattern: str) -> list[str]:
    """Return the specs of all methods that are defined for a pattern."""
    found = []
    for method in METHODS.values():
        if method is Mask:  # a score alone
            continue
        try:
            made = method()
        except TypeError:
            made = method(Wanda())
        if isinstance(made, Score) or isinstance(pattern_of(pattern), made.patterns):
            found.append(repr(made))
    return found
