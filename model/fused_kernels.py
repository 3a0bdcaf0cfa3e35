"""Triton kernels for `StackedHourglass` in training: the same function, less memory traffic.

A kernel computes a batch norm, the following ReLU and 1x1 convolution in one pass over memory, and
the statistics of its output for the next batch norm. The normalised activations are not stored; the
backward kernels recompute them. A channels-last (N, C, H, W) tensor is a row-major (M, C) matrix
with M = N * H * W. Axes: M row (a pixel of a person), Q row at half the height and width, I input
channel, O output channel, C channel, P program.

In the kernels z = scale * x + shift is the batch norm of x, with scale = gamma / std and
shift = beta - scale * mean; a = relu(z); y = a @ weight.T + bias + skip. `dz` is the gradient of
the loss with respect to z, and so on. The gradient of a batch norm is that of Ioffe and Szegedy
(2015), section 3: dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)), xhat = (x - mean) / std.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from triton.language import constexpr

from model.hourglass import BatchNorm, Hourglass

FeatureMap = tuple[Tensor, Tensor | None]
"""A feature map, and its statistics if they are known."""
Weights = dict[nn.Conv2d, Tensor]
"""The weight of each convolution, in the type in which it computes."""
MULTIPROCESSORS = constexpr(132)
"""Of an H100 or H200. Each runs 8 warps: one program of 8, or two of 4."""
LEAST_ROWS = 128
"""Minimum rows of a program that sums gradients; below, adding up these sums should take longer."""


@triton.constexpr_function
def _block(channels: int) -> int:
    """The next power of two, at least 16, which tl.dot needs."""
    return max(16, 1 << (channels - 1).bit_length())


# Parts of kernels


@triton.jit
def _tile(matrix, rows, columns, M, C: constexpr):
    """Pointers to some rows and columns of an (M, C) matrix, and whether each exists."""
    pointers = matrix + tl.cast(rows, tl.int64)[:, None] * C + columns[None, :]
    return pointers, (rows < M)[:, None] & (columns < C)[None, :]


@triton.jit
def _load(matrix, rows, columns, M, C: constexpr):
    """A tile; 0 where the matrix has no value."""
    pointers, exists = _tile(matrix, rows, columns, M, C)
    return tl.load(pointers, exists, other=0.0)


@triton.jit
def _store(matrix, values, rows, columns, M, C: constexpr):
    pointers, exists = _tile(matrix, rows, columns, M, C)
    tl.store(pointers, values.to(matrix.dtype.element_ty), exists)


@triton.jit
def _load_line(table, line: constexpr, channels, C: constexpr):
    """Some channels of one line of a (lines, C) table, as a row of a tile; 0 beyond C."""
    return tl.load(table + line * C + channels, channels < C, other=0.0)[None, :]


@triton.jit
def _store_pair(table_2C, first, second, channels, C: constexpr):
    tl.store(table_2C + channels, first, channels < C)
    tl.store(table_2C + C + channels, second, channels < C)


@triton.jit
def _corner(rows, W):
    """The first of 2 x 2 rows of a map of twice the height and width. W: width."""
    return rows // W * 4 * W + rows % W * 2


@triton.jit
def _half(rows, W):
    """Rows of a map of half the height and width. W: width."""
    return rows // (2 * W) * (W // 2) + rows % W // 2


@triton.jit
def _maximum(a, b):
    """NaN if a or b is NaN: tl.maximum alone drops NaN, and a bad batch had a finite loss."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pool(x_MC, argmax_QC, rows, channels, Q, W, C: constexpr):
    """Maximum of 2 x 2 pixels; stores which of them it is (0 to 3). W: width of the result."""
    corner = _corner(rows, W)
    largest = _load(x_MC, corner, channels, 4 * Q, C).to(tl.float32)
    argmax = tl.zeros_like(largest)
    for pixel in tl.static_range(1, 4):
        other = corner + pixel // 2 * 2 * W + pixel % 2
        x = _load(x_MC, other, channels, 4 * Q, C).to(tl.float32)
        argmax = tl.where(x > largest, pixel, argmax)
        largest = _maximum(x, largest)
    _store(argmax_QC, argmax, rows, channels, Q, C)
    return largest


@triton.jit
def _pool_gradient(dpooled_QC, argmax_QC, rows, channels, M, W, C: constexpr):
    """Gradient of the input of `_pool`: 0 but for the largest pixels. W: width of that input."""
    dpooled = _load(dpooled_QC, _half(rows, W), channels, M // 4, C).to(tl.float32)
    argmax = _load(argmax_QC, _half(rows, W), channels, M // 4, C)
    pixel = rows // W % 2 * 2 + rows % 2
    return tl.where(argmax == pixel[:, None], dpooled, 0.0)


@triton.jit
def _merge(means, squares, counts):
    """Mean, sum of squared deviations from it, and count of the groups along axis 0.

    squares: of each group, from its own mean. Chan, Golub and LeVeque (1979).
    """
    count = tl.sum(counts, 0)
    mean = tl.sum(means * counts, 0) / tl.maximum(count, 1.0)
    deviations = means - mean[None, :]
    return mean, tl.sum(squares + deviations * deviations * counts, 0), count


# Kernels. Program (i, j) has block i of the channels, and every P-th tile of rows from tile j on.


@triton.jit
def _normalisation(statistics_P3C, tensors, M, P, eps, momentum, C: constexpr):
    """Merge the statistics of P programs into mean, 1 / std, scale and shift; update the running
    mean and variance."""
    gamma_C, beta_C, mean_C, var_C, norm_4C = tensors
    channels = tl.program_id(0) * 16 + tl.arange(0, 16)
    exists, programs = channels < C, tl.arange(0, triton.next_power_of_2(2 * MULTIPROCESSORS))
    means = _load(statistics_P3C, programs * 3, channels, 3 * P, C)
    squares = _load(statistics_P3C, programs * 3 + 1, channels, 3 * P, C)
    counts = _load(statistics_P3C, programs * 3 + 2, channels, 3 * P, C)
    mean, square, _ = _merge(means, squares, counts)
    inverse_std = 1 / tl.sqrt(square / M + eps)
    scale = tl.load(gamma_C + channels, exists, other=0.0) * inverse_std
    shift = tl.load(beta_C + channels, exists, other=0.0) - scale * mean
    _store_pair(norm_4C, mean, inverse_std, channels, C)
    _store_pair(norm_4C + 2 * C, scale, shift, channels, C)
    old_mean = tl.load(mean_C + channels, exists, other=0.0)
    old_var = tl.load(var_C + channels, exists, other=0.0)
    unbiased = square / tl.maximum(M - 1, 1)
    tl.store(mean_C + channels, old_mean + momentum * (mean - old_mean), exists)
    tl.store(var_C + channels, old_var + momentum * (unbiased - old_var), exists)


@triton.jit
def _norm_relu_conv(
    tensors, M, W, IN: constexpr, OUT: constexpr, BLOCK_M: constexpr, BLOCK_OUT: constexpr
):
    """y = conv(relu(norm(x))) + skip + upsampled low, and its statistics. W: width of y.

    Parts that are None are left out; without y, only the statistics are stored. If `argmax` is
    given, x is max-pooled first (`_pool`).
    """
    x_MI, norm_4I, weight_OI, bias_O, skip_MO, low_QO, argmax_MI, y_MO, stats_P3O = tensors
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inputs = outputs
    dtype: constexpr = x_MI.dtype.element_ty
    if weight_OI is not None:
        inputs = tl.arange(0, _block(IN))
        weight = _load(weight_OI, outputs, inputs, OUT, IN)
    if norm_4I is not None:
        scale, shift = _load_line(norm_4I, 2, inputs, IN), _load_line(norm_4I, 3, inputs, IN)
    if bias_O is not None:
        bias = _load_line(bias_O, 0, outputs, OUT)
    # Statistics of each element of the tile; sums over its rows in each step would cost more.
    means = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    squares, number = tl.zeros_like(means), 0.0
    first, step = tl.program_id(1) * BLOCK_M, tl.num_programs(1) * BLOCK_M
    for row in tl.range(first, M, step, num_stages=3):
        rows = row + tl.arange(0, BLOCK_M)
        if argmax_MI is None:
            y = _load(x_MI, rows, inputs, M, IN).to(tl.float32)
        else:
            y = _pool(x_MI, argmax_MI, rows, inputs, M, W, IN)
        if norm_4I is not None:
            y = _maximum(y * scale + shift, 0.0)
        if weight_OI is not None:
            # As y @ weight.T, several warps would normalise the same rows for their own channels.
            y = tl.trans(tl.dot(weight, tl.trans(y.to(dtype))))
        if bias_O is not None:
            y += bias
        if skip_MO is not None:
            y += _load(skip_MO, rows, outputs, M, OUT).to(tl.float32)
        if low_QO is not None:
            y += _load(low_QO, _half(rows, W), outputs, M // 4, OUT).to(tl.float32)
        if y_MO is not None:
            _store(y_MO, y, rows, outputs, M, OUT)
        stored = y.to(dtype).to(tl.float32)
        number += 1.0  # Welford (1962)
        deviations = tl.where((rows < M)[:, None], stored - means, 0.0)
        means += deviations * (1 / number)
        squares += deviations * (stored - means)
    counts = (M - first - tl.arange(0, BLOCK_M) + step - 1) // step
    mean, square, count = _merge(means, squares, counts.to(tl.float32)[:, None])
    stats = stats_P3O + tl.program_id(1) * 3 * OUT
    _store_pair(stats, mean, square, outputs, OUT)
    tl.store(stats + 2 * OUT + outputs, tl.zeros_like(mean) + count, outputs < OUT)


@triton.jit
def _gradient_sums(
    tensors,
    sums_PS,
    M,
    IN: constexpr,
    OUT: constexpr,
    S: constexpr,
    BLOCK_M: constexpr,
    BLOCK_IN: constexpr,
):
    """Sums over a program's rows: dz (the gradient of beta) and dz * xhat (that of gamma), each
    (I,), and the gradients of bias (O,) and weight (O, I), in this order.

    With a convolution, dz = dy @ weight where z > 0. So the sums of dz and dz * x, and the weight's
    gradient, follow from dy.T @ x and dy.T @ 1 where z > 0, without dy @ weight for each row.
    """
    dy_MO, weight_OI, bias_O, x_MI, norm_4I = tensors
    inputs = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    scale, shift = _load_line(norm_4I, 2, inputs, IN), _load_line(norm_4I, 3, inputs, IN)
    outputs = inputs if weight_OI is None else tl.arange(0, _block(OUT))
    if weight_OI is None:  # sums of each element of the tile: over its rows they would cost more
        sum_1 = tl.zeros([BLOCK_M, BLOCK_IN], tl.float32)
        sum_x = tl.zeros_like(sum_1)
    else:
        pairs = tl.zeros([_block(OUT), 2 * BLOCK_IN], tl.float32)
    # With many outputs by tl.dot, whose 16 rows are equal, because it needs fewer registers.
    BIAS_ROWS: constexpr = 16 if OUT > 64 else BLOCK_M
    dbias = tl.zeros([BIAS_ROWS, _block(OUT)], tl.float32)
    ones = tl.full([16, BLOCK_M], 1 / 16, x_MI.dtype.element_ty)
    first, step = tl.program_id(1) * BLOCK_M, tl.num_programs(1) * BLOCK_M
    for row in tl.range(first, M, step, num_stages=3):
        rows = row + tl.arange(0, BLOCK_M)
        x, dy = _load(x_MI, rows, inputs, M, IN), _load(dy_MO, rows, outputs, M, OUT)
        is_positive = x.to(tl.float32) * scale + shift > 0
        if weight_OI is None:
            dz = tl.where(is_positive, dy.to(tl.float32), 0.0)
            sum_1 += dz
            sum_x += dz * x.to(tl.float32)
        else:
            one = tl.where(is_positive, 1.0, 0.0).to(x.dtype)
            pair = tl.join(one, tl.where(is_positive, x, 0.0))
            pairs = tl.dot(tl.trans(dy), tl.reshape(pair, [BLOCK_M, 2 * BLOCK_IN]), pairs)
        if bias_O is not None:
            dbias = tl.dot(ones, dy, dbias) if OUT > 64 else dbias + dy
    sums = sums_PS + tl.program_id(1) * S
    if bias_O is not None:
        tl.store(sums + 2 * IN + outputs, tl.sum(dbias, 0), outputs < OUT)
    if weight_OI is not None:
        sum_1, sum_x = tl.split(tl.reshape(pairs, [_block(OUT), BLOCK_IN, 2]))
        dweight = scale * sum_x + shift * sum_1
        _store(sums + S - OUT * IN, dweight, outputs, inputs, OUT, IN)
        weight = _load(weight_OI, outputs, inputs, OUT, IN)
        sum_1, sum_x = sum_1 * weight, sum_x * weight
    mean, inverse_std = _load_line(norm_4I, 0, inputs, IN), _load_line(norm_4I, 1, inputs, IN)
    dbeta, dgamma = tl.sum(sum_1, 0), tl.sum((sum_x - mean * sum_1) * inverse_std, 0)
    _store_pair(sums, dbeta, dgamma, inputs, IN)


@triton.jit
def _input_gradient(
    tensors,
    sums_S,
    results,
    M,
    W,
    IN: constexpr,
    OUT: constexpr,
    BLOCK_M: constexpr,
    BLOCK_IN: constexpr,
):
    """dx, given the sums of `_gradient_sums` over all rows. W: width of x."""
    dy_MO, weight_OI, _, x_MI, norm_4I = tensors
    dskip_MI, dpooled_QI, argmax_QI, dx_MI = results
    inputs = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    outputs = inputs
    mean, inverse_std = _load_line(norm_4I, 0, inputs, IN), _load_line(norm_4I, 1, inputs, IN)
    scale, shift = _load_line(norm_4I, 2, inputs, IN), _load_line(norm_4I, 3, inputs, IN)
    dz_mean = _load_line(sums_S, 0, inputs, IN) / M
    product_mean = _load_line(sums_S, 1, inputs, IN) / M
    if weight_OI is not None:
        outputs = tl.arange(0, _block(OUT))
        weight = _load(weight_OI, outputs, inputs, OUT, IN)
    first, step = tl.program_id(1) * BLOCK_M, tl.num_programs(1) * BLOCK_M
    for row in tl.range(first, M, step, num_stages=3):
        rows = row + tl.arange(0, BLOCK_M)
        x = _load(x_MI, rows, inputs, M, IN).to(tl.float32)
        dy = _load(dy_MO, rows, outputs, M, OUT)
        da = dy.to(tl.float32) if weight_OI is None else tl.dot(dy, weight)
        dz = tl.where(x * scale + shift > 0, da, 0.0)
        dx = scale * (dz - dz_mean - (x - mean) * inverse_std * product_mean)
        if dskip_MI is not None:
            dx += _load(dskip_MI, rows, inputs, M, IN).to(tl.float32)
        if dpooled_QI is not None:
            dx += _pool_gradient(dpooled_QI, argmax_QI, rows, inputs, M, W, IN)
        _store(dx_MI, dx, rows, inputs, M, IN)


@triton.jit
def _upsampling_gradient(dy_MC, dlow_QC, Q, W, C: constexpr):
    """dlow: sums of 2 x 2 pixels of dy. W: width of dlow."""
    rows, channels = tl.program_id(0) * 32 + tl.arange(0, 32), tl.arange(0, _block(C))
    dlow = _load(dy_MC, _corner(rows, W), channels, 4 * Q, C).to(tl.float32)
    for pixel in tl.static_range(1, 4):
        other = _corner(rows, W) + pixel // 2 * 2 * W + pixel % 2
        dlow += _load(dy_MC, other, channels, 4 * Q, C).to(tl.float32)
    _store(dlow_QC, dlow, rows, channels, Q, C)


@triton.jit
def _max_pool_gradient(dpooled_QC, argmax_QC, dx_MC, M, W, C: constexpr):
    """W: width of dx."""
    rows, channels = tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, _block(C))
    dx = _pool_gradient(dpooled_QC, argmax_QC, rows, channels, M, W, C)
    _store(dx_MC, dx, rows, channels, M, C)


# Launches


def _matrix(x: Tensor | None) -> Any:
    """(M, C) view of a channels-last (N, C, H, W) tensor; a copy if it is not channels-last."""
    return (
        None if x is None else x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()
    )


class Tile(NamedTuple):
    """What a program works on at a time. Most of those below were chosen by timing on an H100."""

    rows: int
    channels: int
    warps: int

    def programs(self, rows: int, least_rows: int, blocks: int) -> int:
        """Their number for each block of channels; each has at least `least_rows` rows."""
        most = MULTIPROCESSORS.value * 8 // self.warps // blocks
        return max(1, min(most, triton.cdiv(rows, least_rows)))


def _forward_tile(inputs: int, outputs: int) -> Tile:
    """Of `_norm_relu_conv`. inputs: 1 without a convolution."""
    if inputs * outputs > 2**15:
        return Tile(64, 128, 8)
    return Tile(64 if inputs <= 128 and outputs <= 64 else 32, min(_block(outputs), 128), 4)


def _sums_tile(inputs: int, outputs: int) -> Tile:
    """Of `_gradient_sums`. outputs: 1 without a convolution."""
    if inputs <= 128 and outputs <= 64:
        return Tile(64, min(_block(inputs), 64), 4)
    most = 256 if outputs <= 32 else 128 if outputs <= 128 else 64
    return Tile(64, min(_block(inputs), most), 8)


def _input_tile(inputs: int, outputs: int, has_skip: bool) -> Tile:
    """Of `_input_gradient`. With a skip, 128 channels would need too much shared memory."""
    return Tile(64, min(_block(inputs), 64 if outputs > 128 and has_skip else 128), 8)


def _launch(x_MI: Tensor, rows: int, width: int, outputs: int, *tensors: Tensor | None) -> Tensor:
    """Run `_norm_relu_conv`; returns its statistics. tensors: its own from norm to y."""
    has_conv = tensors[1] is not None
    tile = _forward_tile(x_MI.shape[1] if has_conv else 1, outputs)
    blocks = triton.cdiv(outputs, tile.channels)
    programs = tile.programs(rows, tile.rows, blocks)
    statistics_P3O = x_MI.new_empty(programs, 3, outputs, dtype=torch.float32)
    arguments = (x_MI, *tensors, statistics_P3O), rows, width, x_MI.shape[1], outputs
    _norm_relu_conv[blocks, programs](*arguments, *tile[:2], num_warps=tile.warps)
    return statistics_P3O


def _sum_gradients(tensors: tuple, rows: int, inputs: int, outputs: int, size: int) -> Tensor:
    """The sums of `_gradient_sums` over all rows, (S,). size: S."""
    tile = _sums_tile(inputs, 1 if tensors[1] is None else outputs)
    blocks = triton.cdiv(inputs, tile.channels)
    programs = tile.programs(rows, LEAST_ROWS, blocks)
    sums_PS = tensors[0].new_empty(programs, size, dtype=torch.float32)
    arguments = tensors, sums_PS, rows, inputs, outputs, size, *tile[:2]
    _gradient_sums[blocks, programs](*arguments, num_warps=tile.warps)
    return sums_PS.sum(0)


def _max_pool(x_MI: Tensor, people: int, height: int, width: int) -> tuple[Tensor, ...]:
    """max_pool2d(x, 2), its statistics, and which of the 2 x 2 pixels it is. x: (N, H, W, I)."""
    pooled_NHWI = x_MI.new_empty(people, height // 2, width // 2, x_MI.shape[1])
    argmax = torch.empty_like(pooled_NHWI, dtype=torch.uint8)
    sizes = len(x_MI) // 4, width // 2, x_MI.shape[1]
    statistics = _launch(x_MI, *sizes, *[None] * 5, argmax, pooled_NHWI)
    return pooled_NHWI.permute(0, 3, 1, 2), statistics, argmax


def _norm_table(norm: BatchNorm, x: Tensor, statistics_P3C: Tensor | None) -> Tensor:
    """mean, 1 / std, scale and shift, (4, C); updates the norm's running statistics."""
    x_MC = _matrix(x)
    rows, channels = x_MC.shape
    if statistics_P3C is None:
        statistics_P3C = _launch(x_MC, rows, x.shape[3], channels, *[None] * 7)
    norm_4C = statistics_P3C.new_empty(4, channels)
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm_4C
    values = rows, len(statistics_P3C), norm.eps, norm.momentum, channels
    _normalisation[(triton.cdiv(channels, 16),)](statistics_P3C, tensors, *values)
    return norm_4C


class _NormReluConv(torch.autograd.Function):
    """conv(relu(norm(x))) + skip + upsampled low; parts that are None are left out."""

    @staticmethod
    def forward(
        ctx: Any, pool: bool, norm_4I: Tensor, weight: Tensor | None, x: Tensor, *others: Any
    ) -> tuple[Tensor | None, ...]:
        """weight: in x's type, without a gradient. others: gamma, beta, the weight that has the
        gradient, bias, skip, low. Returns y and its statistics, x, and if `pool`,
        max_pool2d(x, 2) and its statistics. The gradients of all of them are added in one pass.
        """
        x_MI, (bias, skip, low) = _matrix(x), (*others, *[None] * 4)[3:6]
        people, inputs, height, width = x.shape
        outputs, rows = inputs if weight is None else len(weight), len(x_MI)
        y_NHWO = x_MI.new_empty(people, height, width, outputs)
        tensors = norm_4I, weight, bias, _matrix(skip), _matrix(low), None, y_NHWO
        statistics = _launch(x_MI, rows, width, outputs, *tensors)
        pooled, argmax = list[Tensor](), None
        if pool:
            *pooled, argmax = _max_pool(x_MI, people, height, width)
        ctx.mark_non_differentiable(statistics, *pooled[1:])
        ctx.save_for_backward(x, norm_4I, weight, bias, argmax)
        ctx.set_materialize_grads(False)
        return y_NHWO.permute(0, 3, 1, 2), statistics, x, *pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: None, *added: Tensor | None) -> tuple[Any, ...]:
        """One gradient for each argument of `forward`. added: of x and what follows it."""
        x, norm_4I, weight, bias, argmax = ctx.saved_tensors
        dskip, dpooled = map(_matrix, (*added, None)[:2])
        dy_MO, x_MI = _matrix(dy), _matrix(x)
        rows, inputs, outputs = len(x_MI), x.shape[1], dy.shape[1]
        parts = [inputs, inputs, *(0 if each is None else each.numel() for each in (bias, weight))]
        tensors = dy_MO, weight, bias, x_MI, norm_4I
        sums_S = _sum_gradients(tensors, rows, inputs, outputs, sum(parts))
        dx_NHWI = x.new_empty(len(x), *x.shape[2:], inputs)
        tile = _input_tile(inputs, 1 if weight is None else outputs, dskip is not None)
        blocks = triton.cdiv(inputs, tile.channels)
        programs = tile.programs(rows, tile.rows, blocks)
        results, sizes = (dskip, dpooled, argmax, dx_NHWI), (rows, x.shape[3], inputs, outputs)
        arguments = tensors, sums_S, results, *sizes, *tile[:2]
        _input_gradient[blocks, programs](*arguments, num_warps=tile.warps)
        dbeta, dgamma, dbias, dweight = sums_S.split(parts)
        # DDP expects the weight's strides, even for dimensions of size 1.
        dweight = None if weight is None else dweight.as_strided(weight.shape, weight.stride())
        dlow = None
        if any(ctx.needs_input_grad[9:]):
            dlow = dy.new_empty(len(dy), dy.shape[2] // 2, dy.shape[3] // 2, outputs)
            grid = (triton.cdiv(rows // 4, 32),)
            _upsampling_gradient[grid](dy_MO, dlow, rows // 4, dlow.shape[2], outputs)
            dlow = dlow.permute(0, 3, 1, 2)
        gradients = dx_NHWI.permute(0, 3, 1, 2), dgamma, dbeta, dweight, dbias, dy, dlow
        pairs = zip((None, None, None, *gradients), ctx.needs_input_grad, strict=False)
        return tuple(gradient if is_needed else None for gradient, is_needed in pairs)


class _MaxPool(torch.autograd.Function):
    """max_pool2d(x, 2) and its statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, statistics, argmax = _max_pool(_matrix(x), len(x), *x.shape[2:])
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(argmax)
        return pooled, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpooled: Tensor, _: None) -> Tensor:
        (argmax,) = ctx.saved_tensors
        people, height, width, channels = argmax.shape
        dx = dpooled.new_empty(people, 2 * height, 2 * width, channels)
        rows = 4 * people * height * width
        arguments = _matrix(dpooled), argmax, dx, rows, 2 * width, channels
        _max_pool_gradient[(triton.cdiv(rows, 64),)](*arguments)
        return dx.permute(0, 3, 1, 2)


class _Cast(torch.autograd.Function):
    """Casts many tensors in a few kernels, and their gradients too."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _cast(dtype, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast(ctx.dtype, *gradients)


def _cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(each, dtype=dtype) for each in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


# The network


def cast_weights(device: torch.device, *modules: nn.Module) -> Weights:
    """The weights of all convolutions, cast to autocast's type.

    Those of 1x1 convolutions have no gradient: the kernels return that of the parameter.
    """
    convs = [c for module in modules for c in module.modules() if isinstance(c, nn.Conv2d)]
    large = [each for each in convs if each.kernel_size != (1, 1)]
    small = [each for each in convs if each.kernel_size == (1, 1)]
    is_cast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_cast else convs[0].weight.dtype
    weights = _Cast.apply(dtype, *(each.weight for each in large))
    weights += _cast(dtype, *(each.weight.detach() for each in small))
    return dict(zip(large + small, weights, strict=True))


def _norm_relu(
    norm: BatchNorm,
    x: FeatureMap,
    weight: Tensor | None,
    *others: Tensor | None,
    pool: bool = False,
) -> Any:
    """`_NormReluConv` of a norm."""
    table = _norm_table(norm, *x)
    return _NormReluConv.apply(pool, table, weight, x[0], norm.weight, norm.bias, *others)


def fused_residual(
    residual: Any,
    weights: Weights,
    x: FeatureMap,
    low_from: Callable[[FeatureMap], FeatureMap] | None = None,
) -> FeatureMap:
    """`residual(x)`. low_from: computes, from x pooled, a map that is added upsampled."""
    conv1, conv3 = residual.conv1, residual.conv3
    y, statistics, skip, *pooled = _norm_relu(
        residual.norm1, x, weights[conv1], conv1.weight, pool=low_from is not None
    )
    low = low_from(pooled)[0] if low_from else None
    z = _norm_relu(residual.norm2, (y, statistics), None)[0]
    y = functional.conv2d(z, weights[residual.conv2], padding=1)
    bias = conv3.bias
    if isinstance(residual.skip, nn.Conv2d):  # the sum of both biases is added once
        bias, skip = bias + residual.skip.bias, functional.conv2d(skip, residual.skip.weight)
    others = weights[conv3], conv3.weight, bias, skip, low
    return _norm_relu(residual.norm3, (y, None), *others)[:2]


def _hourglass(hourglass: Any, weights: Weights, x: FeatureMap) -> FeatureMap:
    inside = _hourglass if isinstance(hourglass.inner, Hourglass) else fused_residual

    def low_from(pooled: FeatureMap) -> FeatureMap:
        inner = inside(hourglass.inner, weights, fused_residual(hourglass.down, weights, pooled))
        return fused_residual(hourglass.up, weights, inner)

    return fused_residual(hourglass.across, weights, x, low_from)


def _stem(weight: Tensor, images_N3HW: Tensor) -> Tensor:
    """The 7x7 convolution of stride 2 as one of 4x4, with 2 x 2 pixels and 4 zeros as channels."""
    images_N3HW = images_N3HW.to(weight.dtype)
    people, _, height, width = images_N3HW.shape
    images_NHW3 = images_N3HW.permute(0, 2, 3, 1)
    pixels = images_NHW3.reshape(people, height // 2, 2, width // 2, 2, 3).transpose(2, 3)
    pixels_NHWC = functional.pad(pixels.flatten(3), (0, 4, 2, 1, 2, 1))
    weight = functional.pad(weight, (1, 0, 1, 0)).reshape(-1, 3, 4, 2, 4, 2)
    weight = functional.pad(weight.permute(0, 2, 4, 3, 5, 1).flatten(3), (0, 4))
    return functional.conv2d(pixels_NHWC.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2))


def _features(network: Any, weights: Weights, stack: int, x: FeatureMap) -> Tensor:
    """A stack's features before their batch norm."""
    residual, (conv, _, _) = network.features[stack]
    x = _hourglass(network.hourglasses[stack], weights, x)
    return conv(fused_residual(residual, weights, x)[0])


def fused_network(network: Any, images_N3HW: Tensor) -> list[Tensor]:
    """The heatmaps of every stack of a StackedHourglass in training."""
    (conv, norm, _), residual1, _, residual2, residual3 = network.stem
    cast = partial(cast_weights, images_N3HW.device)
    weights = cast(network.stem)
    x = _norm_relu(norm, (_stem(weights[conv], images_N3HW), None), None)[:2]
    x = _MaxPool.apply(fused_residual(residual1, weights, x)[0])
    x = fused_residual(residual3, weights, fused_residual(residual2, weights, x))
    heatmaps = []
    for stack, head in enumerate(network.heads):
        # For each stack, so that DDP can reduce their gradients while earlier ones are computed.
        weights = cast(network.hourglasses[stack], network.features[stack], head)
        features = network.recomputed(partial(_features, network, weights), stack, x)
        norm = network.features[stack][1][1]
        apply = partial(_NormReluConv.apply, False, _norm_table(norm, features, None))
        affine = norm.weight, norm.bias
        heat, _, features = apply(weights[head], features, *affine, head.weight, head.bias)
        heatmaps.append(heat)
        if stack < network.stacks - 1:
            # merge_features(f) + merge_heatmaps(head(f)) is one convolution of f.
            merge, from_heat = network.merge_features[stack], network.merge_heatmaps[stack]
            through_heat = functional.conv2d(from_heat.weight, head.weight.transpose(0, 1))
            weight = merge.weight.clone().add_(through_heat)  # with its strides, as DDP expects
            bias = merge.bias + from_heat(head.bias[None, :, None, None]).flatten()
            low_precision = weight.detach().to(features.dtype)
            x = apply(low_precision, features, *affine, weight, bias, x[0])[:2]
    return heatmaps
