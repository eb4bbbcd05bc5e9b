"""One grammar: what is written is read back, and nothing but names, calls and literals is read."""

import inspect
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from torch import Tensor

from gossamer import scores, solvers
from gossamer.core import allocate, pattern, schedule
from gossamer.core.errors import GossamerError
from gossamer.core.score import Score
from gossamer.core.spec import Bound, parse, show, spec
from gossamer.core.stats import Stats


@spec
class Mine(Score):
    """A score from outside the library."""

    a: float = 1.0
    word: str = "x"

    def __call__(self, x: Tensor, stats: Stats) -> Tensor:
        return x.float() * self.a


def mine(tensors, sparsity, *, a=1.0):
    """An allocation from outside the library."""
    return dict.fromkeys(tensors, sparsity * a)


def plain(made):
    """Whether a class has a default for everything."""
    return all(f.default is not f.empty for f in inspect.signature(made).parameters.values())


NAMES = {
    **{name: getattr(scores, name) for name in scores.__all__},
    **{name: getattr(solvers, name) for name in solvers.__all__},
    **{name: getattr(allocate, name) for name in allocate.__all__},
    **{cls.__name__: cls for cls in (schedule.Constant, schedule.Linear, schedule.Cubic, schedule.Cosine)},
    **{cls.__name__: cls for cls in pattern.Pattern.__subclasses__() if cls.__module__.startswith("gossamer.")},
}

VALUES = [
    pattern.Unstructured(),
    pattern.Unstructured(per="row"),
    pattern.Unstructured(per="tensor"),
    pattern.NM(2, 4),
    pattern.NM(7, 16),
    pattern.Block(4, 1),
    pattern.Block(16, 16, pool="max"),
    pattern.Channel(0),
    pattern.Channel(1, pool="l2"),
    pattern.TopK(5),
    pattern.Threshold(-1e-3),
    scores.RIA(),
    scores.RIA(power=0.25),
    scores.Random(),
    scores.Random(7),
    solvers.SparseGPT(),
    solvers.SparseGPT(damp=0.02, block=64),
    solvers.ALPS(),
    solvers.ARMOR(block=32),
    solvers.GQSA(bits=3),
    solvers.Asymmetric(solvers.ALPS(steps=9), share=0.5),
    solvers.Parallel(solvers.NetTrim(eps=0.1)),
    solvers.SparseLLM(steps=3),
    pattern.NM(2, 4, permute=True),
    solvers.DSnoT(init=solvers.SparseGPT(damp=0.02), cycles=9),
    solvers.NetTrim(eps=0.1),
    solvers.OBERT(block=16),
    solvers.Mask(scores.Wanda()),
    solvers.Mask(scores.RIA(power=0.1)),
    solvers.Mask(Mine(a=2.0, word="it's a:b, (c)")),
    schedule.Constant(0.5),
    schedule.Linear(0.0, 0.5, steps=10),
    schedule.Cubic(0.0, 0.9, steps=100, begin=3),
    schedule.Cosine(0.3, 0.0, steps=7),
    allocate.uniform,
    allocate.erk,
    allocate.global_,
    allocate.owl,
    Bound(allocate.owl, (("outlier", 7.0), ("spread", 0.1))),
    Bound(allocate.global_, (("floor", 0.1),)),
    Bound(allocate.global_, (("least", 7),)),
    allocate.by(scores.RIA(power=0.1), allocate.owl),
    allocate.by(scores.Wanda(), Bound(allocate.global_, (("floor", 0.1),))),
    allocate.ecoflap,
    allocate.evolved,
    Bound(allocate.evolved, (("levels", 2), ("survivors", (4, 1)))),
    allocate.sap,
    allocate.searched,
    scores.SynFlow(rounds=3),
    scores.Sampled(scores.RIA(), seed=2),
    allocate.mapping({"*.q_proj": 0.5, "layers.0": 0.0}),
    Mine(),
    Mine(a=-2.5, word="a:b"),
    mine,
    Bound(mine, (("a", 0.5),)),
]
# A method that its name alone makes needs no line above.
VALUES += [made() for made in NAMES.values() if isinstance(made, type) and plain(made) and made not in map(type, VALUES)]


@pytest.mark.parametrize("value", VALUES, ids=show)
def test_what_is_written_is_read_back(value: object) -> None:
    text = show(value)
    assert parse(text, NAMES) == value
    assert show(parse(text, NAMES)) == text
    assert parse(f"  {text} ", NAMES) == value
    if not callable(value) or not hasattr(value, "__name__"):
        assert repr(value) == text


def test_every_name_was_tried() -> None:
    tried = {type(v).__name__ for v in VALUES} | {getattr(v, "__name__", "") for v in VALUES}
    assert set(NAMES) <= tried


def test_defaults_are_left_out() -> None:
    assert [show(v) for v in (scores.Wanda(), solvers.SparseGPT(damp=0.01), pattern.NM(2, 4), pattern.Block(4, 1))] == [
        "Wanda",
        "SparseGPT",
        "2:4",
        "4x1",
    ]
    assert show(solvers.SparseGPT(block=64)) == "SparseGPT(block=64)"
    assert show(allocate.owl) == "owl"
    assert show(Bound(allocate.owl, (("outlier", 7.0),))) == "owl(outlier=7.0)"
    assert show(Mine(a=2.0)) == f"{__name__}:Mine(a=2.0)"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Wanda()", scores.Wanda()),
        ("RIA(0.25)", scores.RIA(0.25)),
        ("NM(2, 4)", pattern.NM(2, 4)),
        ("NM(n=2, m=4)", pattern.NM(2, 4)),
        ("16x16", pattern.Block(16, 16)),
        ("Mask(score=Wanda)", solvers.Mask(scores.Wanda())),
        ("Mask(Wanda())", solvers.Mask(scores.Wanda())),
        ("owl()", allocate.owl),
        ("owl(spread=0.1, outlier=7.0)", Bound(allocate.owl, (("outlier", 7.0), ("spread", 0.1)))),
        ("Threshold(-1)", pattern.Threshold(-1)),
        ("Unstructured(per=None)", pattern.Unstructured()),
        (f"{__name__}:Mine", Mine()),
        (f"{__name__}:Mine(2.0)", Mine(2.0)),
        (f"Mask(score={__name__}:Mine(word='p.q:R'))", solvers.Mask(Mine(word="p.q:R"))),
    ],
)
def test_shorthands_and_calls(text: str, value: object) -> None:
    assert parse(text, NAMES) == value


def test_a_spec_is_frozen_and_equal_by_value() -> None:
    assert scores.RIA(0.5) == scores.RIA()
    assert hash(scores.RIA(0.5)) == hash(scores.RIA())
    assert scores.RIA(0.5) != scores.RIA(0.25)
    with pytest.raises(FrozenInstanceError):
        scores.RIA().power = 1.0  # type: ignore[misc]


def test_a_bound_function_declares_what_the_function_does() -> None:
    bound = parse("owl(spread=0.1)", NAMES)
    assert bound.needs == allocate.owl.needs == frozenset({"wanda"})
    with pytest.raises(AttributeError):
        _ = bound.nothing


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("Wnda", "Wanda"), ("wanda", "Wanda"), ("sparsegpt", "SparseGPT"), ("Mask(score=Magnitud)", "Magnitude"), ("ow", "owl")],
)
def test_an_unknown_name_gives_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(GossamerError, match=f"unknown method .*did you mean .*{nearest}"):
        parse(text, NAMES, "method")


def test_a_name_like_no_other_gives_them_all() -> None:
    with pytest.raises(GossamerError, match="known: " + ", ".join(sorted(scores.__all__))):
        parse("qqqqqq", {name: NAMES[name] for name in scores.__all__})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        "Wanda(",
        "__import__('os')",
        "__import__('os').system('true')",
        "os.system",
        "Wanda.needs",
        "Wanda().needs",
        "Wanda.__class__()",
        "lambda: 1",
        "(lambda: Wanda)()",
        "RIA(power=lambda: 1)",
        "Wanda or RIA",
        "RIA(power=1 + 1)",
        "RIA(power=2 ** 9)",
        "RIA(power=not 1)",
        "RIA(power=1 if 1 else 2)",
        "RIA(power=RIA().power)",
        "RIA(power=[1][0])",
        "RIA(power=[x for x in (1,)])",
        "RIA(power={[]: 1})",
        "RIA(power=f'{1}')",
        "RIA(power=(y := 1))",
        "RIA(power=[Wanda])",
        "[x for x in ()]",
        "RIA(*[1])",
        "RIA(**{'power': 1})",
        "Wanda; RIA",
        "Wanda\nRIA",
        "x = Wanda",
        "await Wanda",
        "1",
        "'Wanda'",
        "None",
        "[Wanda]",
        "Wanda()()",
        "2:4:8",
        "-2:4",
        "2:4x1",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(GossamerError):
        parse(text, NAMES)


@pytest.mark.parametrize("text", ["RIA(*[1])", "RIA(**{'power': 1})", "owl(**{'spread': 0.1})"])
def test_stars_have_no_place(text: str) -> None:
    with pytest.raises(GossamerError, match=r"\* and \*\* have no place"):
        parse(text, NAMES)


@pytest.mark.parametrize("text", ["os:mkdir({!r})", "RIA(power=os:mkdir({!r}))", "RIA(power=__import__('os').mkdir({!r}))"])
def test_a_function_is_never_called(text: str, tmp_path: Path) -> None:
    with pytest.raises(GossamerError):
        parse(text.format(str(tmp_path / "made")), NAMES)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Wanda(alpha=1)", r"unexpected keyword argument 'alpha'; its signature is \(\)"),
        ("SparseGPT(dampening=0.1)", r"'dampening'; its signature is \(damp: float = 0.01, block: int = 128\)"),
        ("NM(2)", "missing 1 required positional argument: 'm'"),
        ("NM(2, 4, 6)", "permute=...\\) is True or False, not 6"),
        ("NM(2, 4, True, 6)", "takes from 3 to 4 positional arguments but 5 were given"),
        ("owl(outliers=3)", "it takes outlier, spread, by name"),
        ("owl(3)", "it takes outlier, spread, by name"),
        ("uniform(floor=1)", "it takes no arguments, by name"),
        ("SparseGPT(damp=0)", "SparseGPT wants damp > 0"),
        ("SparseGPT(damp='x')", "cannot make"),
        ("4:4", "0 < n < m"),
        ("0x4", "positive height and width"),
        ("no.such.module:Thing", "cannot import the name no.such.module:Thing"),
        (f"{__name__}:Nothing", "cannot import"),
        (f"{__name__}:NAMES", "neither a class nor a function"),
        ("mapping", "missing 1 required positional argument: 'given'"),
    ],
)
def test_wrong_arguments_say_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(GossamerError, match=says):
        parse(text, NAMES)
