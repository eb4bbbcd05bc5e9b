"""Each method's W' by its paper's equation, entry by entry; its gradients by dense autograd of that equation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.adapters._linear import Adapter, Recomputed
from gossamer.adapters._mask import fingerprint
from gossamer.core.errors import GossamerError
from gossamer.hf import LoRAPruneConfig, MaskLoRAConfig, PSTConfig, ScaleLoRAConfig, SPPConfig

OUT, IN, R = 6, 8, 3
CONFIGS: dict[str, Any] = {
    "MaskLoRA": MaskLoRAConfig(r=R, alpha=4.5),
    "ScaleLoRA": ScaleLoRAConfig(r=R),
    "SPP": SPPConfig(r=R, alpha=4.5),
    "PST": PSTConfig(r=R, steps=10, pattern="2:4", beta=0.7, alpha1=0.3, alpha2=1.2),
}


def base(dtype: torch.dtype = torch.float64, out: int = OUT) -> Tensor:
    w = torch.randn(out, IN, dtype=dtype, generator=torch.Generator().manual_seed(0))
    w[torch.arange(out)[:, None], torch.arange(IN).view(2, 4)[:, :2].flatten()] = 0  # 2:4
    return w


def moved(name: str, w: Tensor, config: Any = None) -> Adapter:
    """Return an adapter with nothing left of its start."""
    torch.manual_seed(1)
    config = config or CONFIGS[name]
    adapter = config.adapter(config, w).to(w.dtype)
    for parameter in adapter.parameters():
        parameter.data.normal_()
    if name == "PST":
        adapter.step += 10
    return adapter


def by_hand(name: str, w: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Return W' as the paper writes it, by dense matrices."""
    if name == "MaskLoRA":
        return w + 4.5 / R * (w != 0) * (p["B"] @ p["A"])
    if name == "ScaleLoRA":
        return w * (p["B"] @ p["A"])
    if name == "SPP":
        return w + 4.5 / R * w * p["alpha"].repeat_interleave(OUT // R, 0) * p["beta"]
    full = w + 0.7 * p["U"] @ p["V"]
    score = full.abs() + 0.3 * p["A"] @ p["B"] + 1.2 * (p["R"][:, None] + p["C"][None, :])
    top = score.view(OUT, -1, 4).topk(2, dim=-1).indices
    mask = torch.zeros_like(score).view(OUT, -1, 4).scatter_(-1, top, 1).view(OUT, IN)
    return full * (mask + score - score.detach())  # straight through


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_equation_and_its_gradients(name: str, bias: bool) -> None:
    w, adapter = base(), moved(name, base())
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    b = torch.randn(OUT, dtype=torch.float64, requires_grad=True) if bias else None
    named = dict(adapter.named_parameters())
    wanted = F.linear(x, by_hand(name, w, named), b)
    inputs = [x, *named.values(), *([b] if bias else [])]
    dy = torch.randn_like(wanted)
    by_autograd = torch.autograd.grad(wanted, inputs, dy)
    product = adapter(x, w, b)
    torch.testing.assert_close(product, wanted)
    torch.testing.assert_close(torch.autograd.grad(product, inputs, dy), by_autograd)


@pytest.mark.parametrize("name", ["MaskLoRA", "ScaleLoRA", "SPP"])
def test_gradcheck(name: str) -> None:
    w, adapter = base(), moved(name, base())
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in adapter.parameters()]

    def product(x: Tensor, *parameters: Tensor) -> Tensor:
        return Recomputed.apply(x, w, None, type(adapter), len(parameters), *parameters, *adapter.constants(w))

    assert torch.autograd.gradcheck(product, (x, *parameters))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_the_weights_size_is_saved(name: str) -> None:
    w, adapter, saved = base(), moved(name, base()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(torch.randn(5, IN, dtype=torch.float64, requires_grad=True), w, None)
    large = [t for t in saved if t.shape == w.shape and t.data_ptr() != w.data_ptr()]
    assert [t.dtype for t in large] == ([torch.bool] if name == "PST" else [])  # PST's mask, a byte an entry


@pytest.mark.parametrize("name", [*CONFIGS, "LoRAPrune"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_the_start_w_is_w_to_the_bit(name: str, dtype: torch.dtype) -> None:
    w = base(dtype)
    config = CONFIGS.get(name) or LoRAPruneConfig(r=R)
    adapter = config.adapter(config, w)
    assert torch.equal(adapter.effective(w), w)


def test_scalelora_uses_its_rank() -> None:
    w = base()
    adapter = CONFIGS["ScaleLoRA"].adapter(CONFIGS["ScaleLoRA"], w).double()
    for _ in range(3):
        adapter(torch.randn(9, IN, dtype=torch.float64), w, None).square().sum().backward()
        for p in adapter.parameters():
            p.data -= 0.01 * p.grad
            p.grad = None
    assert torch.linalg.matrix_rank(adapter.B @ adapter.A) == R  # from 1/√r everywhere it would stay at one


def test_spp_shares_its_rows_where_the_rank_does_not_divide() -> None:
    config = SPPConfig(r=4, alpha=4)
    w = base(out=7).masked_fill(base(out=7) == 0, 1.0)
    adapter = moved("SPP", w, config)
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    torch.testing.assert_close(adapter.effective(w), w + w * adapter.alpha[rows] * adapter.beta)
    with pytest.raises(GossamerError, match="r is at most their number, 7, not 8"):
        SPPConfig(r=8).adapter(SPPConfig(r=8), w)


def test_lora_prune_is_lora_until_it_is_merged() -> None:
    config = LoRAPruneConfig(r=R, alpha=6)
    w = base()
    adapter = moved("LoRAPrune", w, config)
    x, update = torch.randn(5, IN, dtype=torch.float64), 2 * adapter.B @ adapter.A
    torch.testing.assert_close(adapter(x, w, None), F.linear(x, w + update))
    torch.testing.assert_close(adapter.merged(w), w + (w != 0) * update)


@pytest.mark.parametrize(("pattern", "sparsity"), [("Unstructured", 0.5), ("2:4", None), ("2x2", 0.5), ("Channel(0)", 0.5)])
def test_pst_becomes_sparse_by_its_schedule(pattern: str, sparsity: float | None) -> None:
    config = PSTConfig(r=R, steps=20, pattern=pattern, sparsity=sparsity, warmup=0.1, cooldown=0.4)
    w = torch.randn(8, 8)
    adapter = config.adapter(config, w)
    zeros = []
    for step in range(21):
        assert int(adapter.step) == step
        zeros.append(float((adapter.effective(w) == 0).float().mean()))
        adapter.advance()
    assert zeros == sorted(zeros)
    assert zeros[:3] == [0, 0, 0]
    assert zeros[12:] == [0.5] * 9
    unit = {"2x2": 1 / 16, "Channel(0)": 1 / 8}.get(pattern, 1 / 64)  # what lives or dies together, as part of the weight
    assert zeros[7] == pytest.approx(0.5 * 0.875, abs=unit)
    assert torch.equal(adapter.merged(w) == 0, adapter.effective(w) == 0)


def test_autocast_and_inputs_of_other_dtypes() -> None:
    for w in (base(torch.float32), base(torch.bfloat16)):
        adapter = moved("MaskLoRA", w).float()
        x = torch.randn(4, IN, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = adapter(x, w, torch.ones(OUT))
        product.sum().backward()
        wanted = F.linear(x.detach(), adapter.effective(w.float())) + 1
        assert product.dtype == torch.bfloat16
        torch.testing.assert_close(product.float(), wanted, atol=0.3, rtol=0.05)
        assert {p.grad.dtype for p in (x, *adapter.parameters())} == {torch.float32}
    with pytest.raises(RuntimeError, match="dtype"):
        adapter(torch.randn(4, IN), base(torch.bfloat16), None)


def test_a_weight_that_trains_too_has_its_gradient() -> None:
    w, adapter = base().requires_grad_(), moved("MaskLoRA", base())
    adapter(torch.ones(2, IN, dtype=torch.float64), w, None).sum().backward()
    assert torch.equal(w.grad, 2.0 * (w.detach() != 0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch.compile does so itself
@pytest.mark.parametrize("name", ["MaskLoRA", "ScaleLoRA", "SPP"])
def test_compiled_whole(name: str) -> None:
    w, adapter = base(torch.float32), moved(name, base(torch.float32))
    x = torch.randn(5, IN, requires_grad=True)
    plain = torch.autograd.grad(adapter(x, w, None).square().sum(), [x, *adapter.parameters()])
    run: Callable[..., Tensor] = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(run(x, w, None).square().sum(), [x, *adapter.parameters()]), plain)


def test_the_fingerprint_is_of_the_zeros_alone() -> None:
    w = base()
    assert torch.equal(fingerprint(w), fingerprint(w * 3))
    assert torch.equal(fingerprint(w), fingerprint(w.t().contiguous().t()))  # however it is stored
    other = w.clone()
    other[0, 0], other[0, 2] = w[0, 2], 0
    assert fingerprint(other)[0] == fingerprint(w)[0]
    assert not torch.equal(fingerprint(other), fingerprint(w))
