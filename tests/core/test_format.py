"""The pieces that formats share: packing of bits, runs, and the checks of what is packed and read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import GossamerError
from gossamer.core.format import checked, pack_bits, sized, starts, unpack_bits, want


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 1 << 20))
def test_bits_come_back_and_stand_where_they_should(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_bits(packed, columns), mask)
    for r, row in enumerate(mask.tolist()):
        assert int.from_bytes(packed[r].tolist(), "little") == sum(1 << j for j, kept in enumerate(row) if kept)


def test_bits_of_a_mask_in_another_memory_order() -> None:
    mask = torch.rand(9, 13) < 0.5
    assert torch.equal(pack_bits(mask.T), pack_bits(mask.T.contiguous()))


def test_runs_begin_where_the_ones_before_end() -> None:
    found = starts(torch.tensor([2, 0, 3]))
    assert found.tolist() == [0, 2, 2, 5]
    assert found.dtype == torch.int64
    assert starts(torch.tensor([], dtype=torch.int64)).tolist() == [0]
    assert int(starts(torch.full((3,), 2**30, dtype=torch.int32))[-1]) == 3 * 2**30


def test_only_whole_floats_are_packed() -> None:
    for dtype in (torch.float64, torch.int8, torch.bool):
        with pytest.raises(GossamerError, match="supported are bfloat16, float16, float32"):
            checked(torch.zeros(2, 2, dtype=dtype), None)
    with pytest.raises(GossamerError, match=r"a matrix \(out, in\), not shape \(2, 2, 2\)"):
        checked(torch.zeros(2, 2, 2), None)


def test_a_mask_has_to_fit() -> None:
    dense = torch.eye(2)
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 2), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(GossamerError, match=r"the mask must be bool of shape \(2, 2\)"):
            checked(dense, mask)
    with pytest.raises(GossamerError, match="2 entries outside the mask are not zero"):
        checked(dense, torch.zeros(2, 2, dtype=torch.bool))
    checked(torch.tensor([[-0.0, 1.0]]), torch.tensor([[False, True]]))  # what multiplying by a mask leaves of a negative entry


def test_without_a_mask_whatever_is_not_zero_is_kept() -> None:
    dense = torch.tensor([[0.0, -0.0, float("nan"), 1e-45, 2.0]])
    assert checked(dense, None)[1].tolist() == [[False, False, True, True, True]]


@pytest.mark.parametrize("shape", [(-1, 2), (2, -1), (2,), (2, 2, 2), (2.0, 2), ("2", 2)])
def test_a_shape_is_two_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(GossamerError, match=r"shape must be \(out, in\)"):
        sized(shape)


def test_a_shape_of_a_file_is_taken() -> None:
    assert sized([3, 0]) == (3, 0)


def test_a_stored_tensor_is_there_and_fits() -> None:
    tensors = {"a": torch.zeros(2, 3, dtype=torch.int32)}
    assert want(tensors, "a", (2, None), (torch.int32, torch.int64)) is tensors["a"]
    with pytest.raises(GossamerError, match="no tensor 'b'"):
        want(tensors, "b", (2, 3), (torch.int32,))
    for shape in ((2, 4), (2,), (2, 3, 1)):
        with pytest.raises(GossamerError, match=r"must be \w+ int32, not 2x3 int32"):
            want(tensors, "a", shape, (torch.int32,))
    with pytest.raises(GossamerError, match="must be 2xany uint8 or int64, not 2x3 int32"):
        want(tensors, "a", (2, None), (torch.uint8, torch.int64))
    assert want({"a": torch.zeros(3, 2).T}, "a", (2, 3), (torch.float32,)).is_contiguous()
