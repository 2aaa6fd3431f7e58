"""What decides by sizes alone: how a gradient is formed, and which lengths have kernels."""

from tcur_kernels.operators import cost


def test_lengths_with_cuda_kernels_of_their_own():
    """Up to the longest codelet, and products of two that 4 divides."""
    longest = cost.LONGEST_OUTER
    assert all(map(cost.has_tubes, range(1, longest + 1)))
    assert [cost.has_tubes(n3) for n3 in (48, 96, longest + 1, 2 * longest - 1)] == [
        True, True, (longest + 1) % 4 == 0 and cost.has_codelets(longest + 1), False
    ]  # fmt: skip
    assert not cost.has_tubes(4 * 997)  # without codelets


def test_gradients_choose_their_way():
    sizes = {"n1": 768, "n2": 768, "n3": 48, "rank": 8, "at_once": False}
    assert cost.choose_gradient(10**6, **sizes) == "z"  # rho = 1
    assert cost.choose_gradient(10**6, **{**sizes, "rank": 12}) == "dense"  # rho < 1
    assert cost.choose_gradient(100, **{**sizes, "rank": 12}) == "z"
    assert cost.choose_gradient(100, **{**sizes, "rank": 16}) == "x"  # z would be no smaller
    sizes["at_once"] = True  # G is no longer projected layer by layer: it pays for fewer tokens
    assert cost.choose_gradient(10**6, **sizes) == "z"
    assert cost.choose_gradient(200, **{**sizes, "rank": 12}) == "dense"
    assert cost.choose_gradient(100, **{**sizes, "rank": 12}) == "z"
    assert cost.choose_gradient(100, **{**sizes, "rank": 16}) == "dense"
    assert cost.choose_gradient(60, **{**sizes, "rank": 16}) == "x"
