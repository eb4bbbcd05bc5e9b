"""Write the tables of names into README.md and docs/ from what the package offers: python docs/generate.py"""

import re
from pathlib import Path

from gossamer.catalogue import catalogue

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- /generated -->)", re.DOTALL)
SOURCE = re.compile(r" *\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")  # (authors, year, arXiv)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def render(text: str) -> str:
    """Return a page with every part between the marks written anew."""
    return PART.sub(lambda part: f"{part[1]}\n{names() if part[2] == 'names' else table(part[2])}\n{part[3]}", text)


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
        rows.append([f"`{thing['signature']}`", needs, SOURCE.sub("", thing["summary"]).replace("``", "`"), source])
    head = [kind.removesuffix("s"), "needs", "what it is", "source"]
    used = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(line[column]) for column in used)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "–"


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := render(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
