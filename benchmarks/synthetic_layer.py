"""What SparseGPT's weight update buys on one layer with correlated inputs: relative squared output error by method.

    python benchmarks/synthetic_layer.py

A 512×512 Gaussian layer; inputs X = Z A with a decaying spectrum, 4096 rows. Error = ‖W X − Ŵ X‖² / ‖W X‖².
"""

import torch

from gossamer import NM, Magnitude, Mask, SparseGPT, Stats, Unstructured, Wanda


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(512, 512, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(512, 512, generator=generator))
    spectrum = torch.logspace(0, -2, 512)
    x = torch.randn(4096, 512, generator=generator) * spectrum @ basis
    stats = Stats(512, gram=True)
    stats.add(x)
    wanted = w @ x.T

    def error(weights: torch.Tensor) -> float:
        return float((wanted - weights @ x.T).square().sum() / wanted.square().sum())

    print("| pattern | magnitude | Wanda | SparseGPT's mask, no update | SparseGPT | its gain over its own mask |")
    print("|---|---|---|---|---|---|")
    for pattern, sparsity in ((Unstructured(), 0.5), (NM(2, 4), None)):
        rows = Unstructured("row") if sparsity else pattern
        repaired, mask = SparseGPT()(w, stats, pattern, sparsity)
        alone, full = error(w * mask), error(repaired)
        magnitude = error(Mask(Magnitude())(w, stats, pattern, sparsity)[0])
        wanda = error(Mask(Wanda())(w, stats, rows, sparsity)[0])
        name = "50 %" if sparsity else str(pattern)
        print(f"| {name} | {magnitude:.4f} | {wanda:.4f} | {alone:.4f} | {full:.4f} | {alone / full:.1f}x |")


if __name__ == "__main__":
    main()
