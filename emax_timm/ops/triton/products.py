"""Matrix products of small matrices, with what comes before and after them in the same launch.

They are in float32: the libraries' products for these shapes take two or three launches each.
"""

import triton
import triton.language as tl

__all__ = ["batch_sums", "gate_products", "product"]


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


@triton.jit(do_not_specialize=["samples"])
def batch_sums(
    terms, means, totals, grad_controller, samples, T,
    C: tl.constexpr, K: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the columns of the terms [b, T] over the batch; and the products with the controller.

    The gradient of the controller's weight [K, c] is a sum over the batch as well: of the gradients
    of its logits times the means of x.
    """
    blocks = tl.cdiv(T, BLOCK)
    program = tl.program_id(0)
    inner = tl.arange(0, BLOCK)
    sums = tl.zeros([B, BLOCK], tl.float32)
    if program < blocks:
        column = program * BLOCK + inner
        for start in range(0, samples, B):
            sample = start + tl.arange(0, B)
            mask = (sample < samples)[:, None] & (column < T)[None, :]
            place = terms + sample[:, None] * T + column[None, :]
            sums += tl.load(place, mask=mask, other=0.0)
        tl.store(totals + column, tl.sum(sums, 0), mask=column < T)
    elif grad_controller is not None:
        candidate = (program - blocks) % K
        channel = ((program - blocks) // K) * BLOCK + inner
        for start in range(0, samples, B):
            sample = start + tl.arange(0, B)
            exists = (sample < samples)[:, None]
            mask = exists & (channel < C)[None, :]
            value = tl.load(means + sample[:, None] * C + channel[None, :], mask=mask, other=0.0)
            factor = terms + sample[:, None] * T + 17 * C + candidate
            sums += value * tl.load(factor, mask=exists, other=0.0)
        tl.store(grad_controller + candidate * C + channel, tl.sum(sums, 0), mask=channel < C)
