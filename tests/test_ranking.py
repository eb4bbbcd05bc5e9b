"""Runs of a comparison put together by seed, and ranked."""

from typing import Any

from gossamer.ranking import ranked, rows_of


def run(
    method: str, perplexity: float | None, *, pattern: str = "2:4", sparsity: float | None = 0.5, **more: Any
) -> dict[str, Any]:
    return {
        "recipe": {"method": method, "pattern": pattern, "sparsity": sparsity, "allocate": more.pop("allocate", "uniform")},
        "totals": {"sparsity": sparsity, "bytes_dense": 10, "bytes_bitmask": 6},
        "evaluation": {"perplexity": perplexity, "tasks": more.pop("tasks", {})},
        "seconds": {"total": more.pop("seconds", 1.0)},
        "peak_bytes": {"resident": more.pop("peak", 5)},
        **more,
    }


def test_seeds_stand_together_and_the_best_comes_first() -> None:
    runs = [
        run("Wanda", 30.0, seconds=3.0),
        run("Wanda", 34.0, seconds=1.0),
        run("SparseGPT", 20.0),
        run("Wanda", 35.0, seconds=2.0),
    ]
    best, second = ranked({"runs": runs})
    assert (best["method"], best["place"], best["spread"], best["seeds"]) == ("SparseGPT", 1, None, 1)
    assert (second["method"], second["place"], second["perplexity"], second["spread"], second["seeds"]) == (
        "Wanda",
        2,
        33.0,
        5.0,
        3,
    )
    assert second["seconds"] == 2.0


def test_what_is_not_finite_goes_last_and_spoils_the_mean() -> None:
    runs = [run("A", None), run("B", 900.0), run("B", None), run("C", 1e6)]
    assert [row["method"] for row in ranked({"runs": runs})] == ["C", "A", "B"]
    assert ranked({"runs": runs})[2]["perplexity"] is None


def test_places_are_those_within_a_pattern_and_a_sparsity() -> None:
    by_row, by_tensor = "Unstructured(per='row')", "Unstructured(per='tensor')"
    runs = [run("A", 5.0), run("A", 9.0, pattern=by_row, sparsity=0.7), run("B", 8.0, pattern=by_tensor, sparsity=0.7)]
    runs += [run("B", 4.0, pattern=by_tensor, sparsity=0.5), run("A", 7.0, pattern=by_row, sparsity=0.7, allocate="owl")]
    found = [(row["method"], row["pattern"], row["asked"], row["place"]) for row in ranked({"runs": runs})]
    assert found == [
        ("A", "2:4", 0.5, 1),
        ("A", by_row, 0.7, 1),  # by owl
        ("B", by_tensor, 0.7, 2),
        ("A", by_row, 0.7, 3),
        ("B", by_tensor, 0.5, 1),
    ]
    assert [row["perplexity"] for row in rows_of({"runs": runs})] == [5.0, 9.0, 8.0, 4.0, 7.0], "in their own order"


def test_accuracies_are_averaged_over_the_seeds_that_have_them() -> None:
    runs = [run("A", 1.0, tasks={"piqa": {"acc": 0.5}, "arc": {"acc": 0.2}}), run("A", 1.0, tasks={"piqa": {"acc": 0.7}})]
    assert ranked({"runs": runs})[0]["tasks"] == {"piqa": 0.6}
    assert ranked({"runs": [*runs, run("A", 2.0)]})[0]["tasks"] == {"piqa": 0.6}
    assert ranked({"runs": [run("A", 1.0, peak=7), run("A", 1.0, peak=6)]})[0]["peak_bytes"] == 7
