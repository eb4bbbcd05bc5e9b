"""Write the tables of README.md and docs/, of names from the package and of what was measured: python docs/generate.py"""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.catalogue import catalogue

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
SOURCE = re.compile(r" *\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")  # (authors, year, arXiv)
KINDS = {"Unstructured": "Unstructured", "2:4": "2:4", "NM": "2:4", "Block": "Groups of 16", "1x16": "Groups of 16"}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def render(text: str) -> str:
    """Return a page with every part between the marks written anew."""
    return PART.sub(lambda part: f"{part[1]}\n{OTHERS.get(part[2], lambda: table(part[2]))()}\n{part[3]}", text)


def names() -> str:
    """Return a list of all names, a line for each kind."""
    spelt = {kind: ", ".join(f"`{thing['name']}`" for thing in things) for kind, things in catalogue().items()}
    return "".join(f"- {kind}: {listed}\n" for kind, listed in spelt.items())


def table(kind: str) -> str:
    """Return one kind's table: how a spec writes it, what it needs, what it is, where it comes from."""
    rows = []
    for thing in catalogue()[kind]:
        found = SOURCE.search(thing["summary"])
        source = ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", found[1]) if found else ""
        needs = ", ".join(thing["needs"])
        patterns = ", ".join(thing["patterns"])
        rows.append([f"`{thing['signature']}`", needs, patterns, SOURCE.sub("", thing["summary"]).replace("``", "`"), source])
    return _lines([kind.removesuffix("s"), "needs", "patterns", "what it is", "source"], rows)


def measured() -> str:
    """Return a table for each pattern and sparsity, the best method first, of the rows in methods.json."""
    found = json.loads((ROOT / "docs" / "methods.json").read_text(encoding="utf-8"))
    said = dict.fromkeys(
        f"calibrated on {part['samples']} windows, perplexity over {part['windows']}, on {row['machine']}"
        for part in found["parts"].values()
        for row in part["rows"]
    )
    dense = found["dense"]
    answers = "".join(f", {task.removesuffix('_local')} {one['acc']:.1%}" for task, one in (dense["tasks"] or {}).items())
    tables = [f"### {title}\n\n{_group(rows, dense)}" for title, rows in _rows(found).items()]
    return "\n".join([f"Dense: {dense['perplexity']:.2f}{answers}; {'; '.join(said)}.\n", *tables])


def _rows(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return all rows by the title of their table, each told `how` it differs from its method alone; the best first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for part in found["parts"].values():
        for row in part["rows"]:
            kind = KINDS[row["pattern"].split("(")[0]]
            title = kind if ":" in kind else f"{kind}, {row['asked']:.0%}".replace("%", " %")
            how = [row["allocate"]] if row["allocate"] not in ("uniform", "None") else []
            how += ["permuted"] if "permute=True" in row["pattern"] else []
            groups.setdefault(title, []).append(row | {"how": ", ".join(how)})
    return {title: sorted(rows, key=lambda row: row["perplexity"] or math.inf) for title, rows in groups.items()}


def _group(rows: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    tasks = list(dense["tasks"] or {})
    named = [task.removesuffix("_local") for task in tasks]
    head = ["method", "how", "perplexity", "× dense", "spread", *named, "seconds", "passes", "peak memory", "decoding", "on"]
    usual = Counter(row["machine"] for row in rows).most_common(1)[0][0]
    lines = []
    for row in rows:
        finite = row["perplexity"] is not None
        lines.append(
            [
                f"`{row['method']}`",
                row["how"],
                _figure(row["perplexity"]) if finite else "not finite",
                _figure(row["perplexity"] / row["dense"]) if finite else "",
                f"{row['spread']:.2f} ({row['seeds']})" if row["spread"] is not None else "",
                *(f"{row['tasks'][task]:.1%}" if task in row["tasks"] else "" for task in tasks),
                f"{row['seconds']:.0f}",
                f"{row['seconds'] / row['pass']:.1f}" if row["pass"] else "",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"{row['speed']:.2f}x" if row["speed"] else "",
                row["machine"] if row["machine"] != usual else "",
            ]
        )
    return _lines(head, lines)


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def shrunk() -> str:
    """Return a table for each goal and calibration, the best method first, of the rows in shrunk.json."""
    found = json.loads((ROOT / "docs" / "shrunk.json").read_text(encoding="utf-8"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(found["rows"], key=lambda row: [row[key] for key in ("goal", "samples", "seqlen", "windows")]):
        goal = f"{row['goal']} as fast" if row["goal"].endswith("x") else f"{float(row['goal']) * 100:g} % removed"
        made = f"{row['samples']} windows of {row['seqlen']} tokens, perplexity over {row['windows']}"
        title = f"{goal}, calibrated on {made}, where the dense model has {row['dense']:.2f}"
        groups.setdefault(title, []).append(row)
    answers = "".join(f", {task.removesuffix('_local')} {one:.1%}" for task, one in found["dense"]["tasks"].items())
    dense = f"Dense: {found['rows'][0]['parameters'][0]:,} parameters{answers}.\n"
    return "\n".join([dense, *(_shrunk(title, rows, list(found["dense"]["tasks"])) for title, rows in groups.items())])


def _shrunk(title: str, rows: list[dict[str, Any]], tasks: list[str]) -> str:
    usual = Counter(row["machine"] for row in rows).most_common(1)[0][0]
    passes = " or ".join(dict.fromkeys(row["at"] for row in rows if row["at"]))
    named = [task.removesuffix("_local") for task in tasks]
    head = ["method", "parameters left", "of the blocks removed", "perplexity", "× dense", "spread", *named]
    lines = [
        [
            f"`{row['method']}`",
            f"{row['parameters'][1]:,}",
            f"{row['sparsity']:.4f}",
            _figure(row["perplexity"]) if row["perplexity"] is not None else "not finite",
            _figure(row["perplexity"] / row["dense"]) if row["perplexity"] is not None else "",
            f"{row['spread']:.2f} ({row['seeds']})" if row["spread"] is not None else "",
            *(f"{row['tasks'][task]:.1%}" if task in row["tasks"] else "" for task in tasks),
            f"{row['seconds']:.0f}" if row["seconds"] is not None else "",
            f"{row['ratio']:.2f}x" if row["ratio"] else "",
            f"{row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else "",
            row["machine"] if row["machine"] != usual else "",
        ]
        for row in sorted(rows, key=lambda row: row["perplexity"] or math.inf)
    ]
    head += ["seconds to shrink", f"a pass of {passes}, as fast", "peak memory", "on"]
    return f"{title}, on {usual}:\n\n{_lines(head, lines)}"


def orderings() -> str:
    """Return which orderings that are claimed hold here, of claims.toml and methods.json.

    Two whose means differ by less than the draws of either do are level.
    """
    wanted = tomllib.loads((ROOT / "docs" / "claims.toml").read_text(encoding="utf-8"))["orderings"]
    tables = _rows(json.loads((ROOT / "docs" / "methods.json").read_text(encoding="utf-8")))
    rows = []
    for one in wanted:
        there = [row for row in tables.get(one["at"], []) if row["perplexity"] is not None]
        below, above = (next((row for row in there if _name(row) == one[side]), None) for side in ("below", "above"))
        here, holds = "not measured", ""
        if below and above:
            low, high = below["perplexity"], above["perplexity"]
            here, holds = f"{low:,.2f} and {high:,.2f}", "yes" if low < high else "**no**"
            if abs(high - low) < max(below["spread"] or 0, above["spread"] or 0):
                holds = "level"
        rows.append([f"`{one['below']}` below `{one['above']}`", one["at"], one["source"], here, holds])
    return _lines(["claim", "at", "whose", "here", "holds"], rows)


def _name(row: dict[str, Any]) -> str:
    return ", ".join(filter(None, [row["method"], row["how"]]))


def claims(kind: str = "methods") -> str:
    """Return what each method costs, what its paper claims, and what is seen here, of one part of claims.toml."""
    found = tomllib.loads((ROOT / "docs" / "claims.toml").read_text(encoding="utf-8"))
    rows = [[f"`{name}`", one["cost"], one["claim"], one.get("here", "")] for name, one in found[kind].items()]
    return _lines([kind.removesuffix("s"), "cost", "the paper's claim", "here"], rows)


def _lines(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    used = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return "".join(f"| {' | '.join(_cell(line[column]) for column in used)} |\n" for line in (head, ["---"] * len(head), *rows))


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "–"


OTHERS = {
    "names": names,
    "measured": measured,
    "claims": claims,
    "orderings": orderings,
    "shrunk": shrunk,
    "claimed": lambda: claims("structures"),
}

if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := render(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
