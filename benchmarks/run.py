"""Every pruning job of docs/benchmarks.md, one process each, in turn: a table on standard output, JSON beside it.

    make bench CALIBRATION=valid.txt EVALUATION=test.txt
    python benchmarks/run.py --calibration valid.txt --evaluation test.txt --peer peer/bin/python

`--peer` is a Python that has llm-compressor (see llmcompressor.py): its jobs run in turn with ours, so that both meet the same
machine. Quality needs no quiet machine; for the costs nothing else may run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATTERNS = {"0.5": ["--pattern", "Unstructured", "--sparsity", "0.5"], "2:4": ["--pattern", "2:4"]}


def job(command: list[str], result: Path) -> dict:
    """Run one job, unless its result is there already."""
    if not result.exists():
        print("…", result.stem, file=sys.stderr, flush=True)
        subprocess.run([*command, "--json", str(result)], check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--windows", type=int, help="evaluation windows (default: 64, or 48 of the built-in text)")
    parser.add_argument("--peer", help="a Python with llm-compressor 0.14")
    parser.add_argument("--forwards", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for each job's JSON; what is there is kept")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    windows = args.windows or (48 if args.evaluation == "builtin" else 64)
    texts = ["--calibration", args.calibration, "--evaluation", args.evaluation]

    rows = []
    for pattern, spec in PATTERNS.items():
        for method in ("Magnitude", "Wanda", "SparseGPT"):
            timed = str(0 if method == "Magnitude" else args.forwards)
            ours = [sys.executable, str(HERE / "job.py"), "--method", method, *spec, *texts, "--windows", str(windows)]
            dense = ["--dense"] if (method, pattern) == ("Magnitude", "0.5") else []
            name = f"{method}-{pattern.replace(':', 'of')}"
            rows.append((pattern, job([*ours, "--forwards", timed, *dense], args.out / f"gossamer-{name}.json")))
            if args.peer and method != "Magnitude":
                theirs = [args.peer, str(HERE / "llmcompressor.py"), "--method", method.lower(), "--pattern", pattern, *texts]
                more = ["--evaluation-windows", str(windows), "--forwards", timed]
                rows.append((pattern, job([*theirs, *more], args.out / f"llmcompressor-{name}.json")))

    print(f"dense perplexity {rows[0][1]['dense_perplexity']:.2f}\n")
    print("| pattern | method | tool | perplexity | seconds | one forward | passes | peak over the model |")
    print("|---|---|---|---|---|---|---|---|")
    for pattern, r in rows:
        passes = "–" if r["passes"] is None else f"{r['passes']:.2f}"
        forward = "–" if r["forward_seconds"] is None else f"{r['forward_seconds']:.1f} s"
        memory = f"{r['peak_bytes_over_model'] / 1e9:+.2f} GB"
        cells = [pattern, r["method"], f"{r['tool']} {r['version']}", f"{r['perplexity']:.2f}", f"{r['seconds']:.1f}"]
        print("| " + " | ".join([*cells, forward, passes, memory]) + " |")


if __name__ == "__main__":
    main()
