"""The gradients of the parameters, summed over samples, groups and pixels.

No program adds to memory that another one adds to, so the same input gives the same bits.
What is summed over the batch lies in one matrix, `terms` [b, T], whose columns are added up once:

    0       residual gate, [c]
    c       gamma, [c]
    2 c     logits of the global gate, [c]: the gradient of its second bias
    3 c     logits of the channel gate, [c]: the gradient of its second bias
    4 c     weight of gn, [F, d]
    5 c     bias of gn without its part from the first term, [F, d]
    6 c     means of conv3x3(x), [F, d]
    7 c     second map, [F, d]: the sum over pixels, the same for the channels of a group
    8 c     kernel of the first term, [9, F, d]
    17 c    logits of the group controller, [K], then hidden units of the two gates, [r] each
"""

import triton
import triton.language as tl

__all__ = ["batch_sums", "conv1x1_gradient", "parameter_gradients"]


@triton.jit(do_not_specialize=["rows"])
def conv1x1_gradient(
    grad_before, pooled, products, rows,
    d: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of conv1x1 over the rows of a program: products [programs, d, d + 1].

    Both inputs are [b * (h + w) * F, d]; the last column is the gradient of the bias.
    """
    inner = tl.arange(0, DP)
    weight = tl.zeros([DP, DP], tl.float32)
    bias = tl.zeros([DP], tl.float32)
    for start in range(tl.program_id(0) * N, rows, tl.num_programs(0) * N):
        row = start + tl.arange(0, N)
        mask = (row < rows)[:, None] & (inner < d)[None, :]
        place = row[:, None] * d + inner[None, :]
        gradient = tl.load(grad_before + place, mask=mask, other=0.0)
        value = tl.load(pooled + place, mask=mask, other=0.0)
        weight = tl.dot(tl.trans(gradient), value, acc=weight, input_precision=PRECISION)
        bias += tl.sum(gradient, 0)
    to = products + tl.program_id(0) * d * (d + 1)
    exists = inner < d
    place = inner[:, None] * (d + 1) + inner[None, :]
    tl.store(to + place, weight, mask=exists[:, None] & exists[None, :])
    tl.store(to + inner * (d + 1) + d, bias, mask=exists)


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


@triton.jit(do_not_specialize=["parts"])
def parameter_gradients(
    products, totals, conv3x3_products, conv3x3_weight, conv3x3_bias, gn_bias, grads, parts,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, FP: tl.constexpr,
    CP: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    """Write row o of the gradients of the parameters that all fine groups share, for o < d.

    Args:
        products: What `conv1x1_gradient` wrote, [parts, d, d + 1].
        totals: The columns of `terms`, added up over the batch.
        conv3x3_products: The gradient of conv3x3 through its means, [d, d * 9].
        conv3x3_weight, conv3x3_bias, gn_bias: The parameters.
        grads: Where they go: conv1x1 [d, d] and [d], conv3x3 [d, d * 9] and [d], gn [d] and [d],
            gamma [1].
        parts: The number of programs that wrote `products`.
        C, F, d: Numbers of channels, groups, and channels of a group.
        D, FP, CP: d, F and C as powers of two.
        INPUT, TAP: The strides of an input channel and a kernel offset in conv3x3.
        GAMMA: Whether there is a channel gate.
    """
    o = tl.program_id(0)
    inner = tl.arange(0, D)
    exists = inner < d
    group = tl.arange(0, FP)
    group_mask = group < F

    PARTS: tl.constexpr = 16
    weight = tl.zeros([PARTS, D], tl.float32)
    bias = tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = products + (part * d + o) * (d + 1)
        there = (part < parts)[:, None] & exists[None, :]
        weight += tl.load(at[:, None] + inner[None, :], mask=there, other=0.0)
        bias += tl.load(at + d, mask=part < parts, other=0.0)
    tl.store(grads + o * d + inner, tl.sum(weight, 0), mask=exists)
    tl.store(grads + d * d + o, tl.sum(bias, 0))
    grads += d * d + d

    # The first term is a correlation with conv3x3, weighted with softmax(gn_bias).
    logits = tl.load(gn_bias + inner, mask=exists, other=float("-inf")).to(tl.float32)
    powers = tl.exp(logits - tl.max(logits, 0))
    constant = powers / tl.sum(powers, 0)
    own = tl.sum(tl.where(inner == o, constant, 0.0), 0)
    of_constant = tl.zeros([D], tl.float32)
    each = group[:, None] * d + inner[None, :]
    mask = group_mask[:, None] & exists[None, :]
    for k in range(9):
        tap = tl.sum(tl.load(totals + (8 + k) * C + each, mask=mask, other=0.0), 0)
        at = o * (9 * d) + inner * INPUT + k * TAP
        through_means = tl.load(conv3x3_products + at, mask=exists, other=0.0)
        tl.store(grads + at, through_means + own * tap, mask=exists)
        if o == 0:
            each_weight = (
                conv3x3_weight + inner[:, None] * (9 * d) + inner[None, :] * INPUT + k * TAP
            )
            weights = tl.load(each_weight, mask=exists[:, None] & exists[None, :], other=0.0)
            of_constant += tl.sum(weights.to(tl.float32) * tap[None, :], 1)
    grads += 9 * d * d

    first = tl.sum(tl.load(totals + 7 * C + group * d, mask=group_mask, other=0.0), 0)
    means = tl.sum(tl.load(totals + 6 * C + group * d + o, mask=group_mask, other=0.0), 0)
    tl.store(grads + o, means + own * first)
    scale = tl.sum(tl.load(totals + 4 * C + group * d + o, mask=group_mask, other=0.0), 0)
    tl.store(grads + d + o, scale)
    if o == 0:
        biases = tl.load(conv3x3_bias + inner, mask=exists, other=0.0).to(tl.float32)
        of_constant += first * biases
        of_constant = constant * (of_constant - tl.sum(constant * of_constant, 0))
        of_level = tl.sum(tl.load(totals + 5 * C + each, mask=mask, other=0.0), 0)
        tl.store(grads + 2 * d + inner, of_constant + of_level, mask=exists)
        if GAMMA:
            every = tl.arange(0, CP)
            gamma = tl.load(totals + C + every, mask=every < C, other=0.0)
            tl.store(grads + 3 * d, tl.sum(gamma, 0))
