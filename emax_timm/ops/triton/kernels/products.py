"""Products of small matrices, and the gates that are made of them.

They are in float32: the libraries' products for these shapes take two or three launches each.
"""

import triton
import triton.language as tl

from .output import output_factors

__all__ = ["channel_gate_gradient", "gate_products", "product"]


@triton.jit
def _tile(
    a, b, tile, M, N, K, a_row, a_column, b_row, b_column,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute a tile of a [M, K] @ b [K, N]; returns it with its rows and columns."""
    across = tl.cdiv(N, BN)
    row = (tile // across) * BM + tl.arange(0, BM)
    column = (tile % across) * BN + tl.arange(0, BN)
    result = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        left = tl.load(
            a + row[:, None] * a_row + inner[None, :] * a_column,
            mask=(row < M)[:, None] & (inner < K)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + inner[:, None] * b_row + column[None, :] * b_column,
            mask=(inner < K)[:, None] & (column < N)[None, :],
            other=0.0,
        )
        result = tl.dot(left, right, acc=result, input_precision=PRECISION)
    return result, row, column


@triton.jit(do_not_specialize=["M", "K"])
def product(
    a, b, bias, mask, out, M, N, K, a_row, a_column, b_row, b_column, out_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a [M, K] @ b [K, N] + bias [N], after a relu or where mask [M, N] is positive."""
    result, row, column = _tile(
        a, b, tl.program_id(0), M, N, K, a_row, a_column, b_row, b_column, BM, BN, BK, PRECISION
    )
    inside = (row < M)[:, None] & (column < N)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if RELU:
        result = tl.maximum(result, 0.0)
    if mask is not None:
        shown = tl.load(mask + row[:, None] * N + column[None, :], mask=inside, other=0.0)
        result = tl.where(shown > 0, result, 0.0)
    tl.store(out + row[:, None] * out_row + column[None, :], result, mask=inside)


@triton.jit(do_not_specialize=["samples"])
def gate_products(
    grad_logits, grad_hidden, means, hidden, reduce, grad_expand, grad_reduce, grad_means,
    samples, T, C: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the three products that go back through a squeeze-and-excite gate.

    The gradients of its second weight [c, r], of its first [r, c], and of its means [b, c], to
    which ADD adds. The first two inputs are columns of the terms, whose rows are T apart.
    """
    program = tl.program_id(0)
    of_expand = tl.cdiv(C, BM) * tl.cdiv(R, BN)
    of_reduce = tl.cdiv(R, BM) * tl.cdiv(C, BN)
    if program < of_expand:
        result, row, column = _tile(
            grad_logits, hidden, program, C, R, samples, 1, T, R, 1, BM, BN, BK, PRECISION
        )
        inside = (row < C)[:, None] & (column < R)[None, :]
        tl.store(grad_expand + row[:, None] * R + column[None, :], result, mask=inside)
    elif program < of_expand + of_reduce:
        result, row, column = _tile(
            grad_hidden, means, program - of_expand, R, C, samples, 1, T, C, 1, BM, BN, BK,
            PRECISION,
        )  # fmt: skip
        inside = (row < R)[:, None] & (column < C)[None, :]
        tl.store(grad_reduce + row[:, None] * C + column[None, :], result, mask=inside)
    else:
        result, row, column = _tile(
            grad_hidden, reduce, program - of_expand - of_reduce, samples, C, R, T, 1, C, 1, BM,
            BN, BK, PRECISION,
        )  # fmt: skip
        inside = (row < samples)[:, None] & (column < C)[None, :]
        to = grad_means + row[:, None] * C + column[None, :]
        if ADD:
            result += tl.load(to, mask=inside, other=0.0)
        tl.store(to, result, mask=inside)


@triton.jit
def channel_gate_gradient(
    grad_offset, grad_fused, vectors, channel_logits, global_logits, gamma, residual_gate,
    grad_mean, terms, T, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of gamma, of the logits of the channel gate, and of the mean of x."""
    sample = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    place = sample * C + channel
    scale, _, _, branch, attention = output_factors(
        channel_logits, global_logits, gamma, residual_gate, sample, channel, mask, C
    )
    of_branch = tl.load(grad_offset + place, mask=mask, other=0.0) * scale
    of_mean = 0.0 * branch
    if grad_fused is not None:
        of_fused = tl.load(grad_fused + place, mask=mask, other=0.0)
        of_branch += of_fused * tl.load(vectors + place, mask=mask, other=0.0)
        of_mean = of_fused * branch
    to = terms + sample * T + channel
    tl.store(to + C, of_branch * attention, mask=mask)
    of_logits = of_branch * tl.load(gamma).to(tl.float32) * attention * (1.0 - attention)
    tl.store(to + 3 * C, of_logits, mask=mask)
    tl.store(grad_mean + place, of_mean, mask=mask)
