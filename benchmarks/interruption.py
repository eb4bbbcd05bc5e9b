"""Kill `gossamer prune` at random moments until it has finished, and compare every byte with a run left alone.

    python benchmarks/interruption.py --trials 5

SmolLM2 by SparseGPT at 2:4. In each trial SIGKILL comes at a random moment of what a run left alone takes, and the same command
is started again, until it has finished before the next one.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights and counts; report.json holds times and is left out."""
    kept = [f for f in sorted(folder.iterdir()) if f.name != "report.json"]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--samples", default="8")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    how = ["--method", "SparseGPT", "--pattern", "2:4", "--data", "builtin", "--samples", args.samples]
    with tempfile.TemporaryDirectory() as folder:

        def command(out: Path) -> list[str]:
            return [sys.executable, "-m", "gossamer", "prune", "smollm2", *how, "--out", str(out), "--quiet"]

        alone = Path(folder, "alone")
        started = time.perf_counter()
        subprocess.run(command(alone), check=True)
        whole = time.perf_counter() - started
        print(f"left alone: {whole:.1f} s", flush=True)
        for trial in range(args.trials):
            killed = Path(folder, f"killed-{trial}")
            partial, kills, started = killed.with_name(f".{killed.name}.partial"), 0, time.perf_counter()
            while True:
                running = subprocess.Popen(command(killed))
                try:
                    status = running.wait(wait := moments.uniform(0, whole))
                    break
                except subprocess.TimeoutExpired:
                    running.kill()
                    running.wait()
                    kills += 1
                    done = len(list(partial.glob("block-*.safetensors"))) if partial.exists() else 0
                    print(f"  killed after {wait:.1f} s: {done} of 30 blocks finished, output there: {killed.exists()}")
            assert status == 0, f"exit status {status}"
            assert digests(alone) == digests(killed), "the killed run's files differ"
            seconds = time.perf_counter() - started
            print(
                f"trial {trial + 1}: {kills} kills, {seconds:.1f} s in all, {len(digests(alone))} files bit-identical",
                flush=True,
            )


if __name__ == "__main__":
    main()
