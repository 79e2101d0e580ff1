# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of multi-scale deformable attention.

A program computes `rows` neighbouring queries of one head of one image: neighbours sample the same
pixels, which then come from the L1 cache. Its D channels are tiles [rows, width], one for each of
its chunks; a thread holds up to 16 neighbouring bytes of a row of a tile. Chunks need not be a
power of two, so that D = 12, 24 or 40 leaves no thread idle. What depends on a point but not on a
channel is a vector [rows], which the threads of a row compute alike.

The convention is that of csrc/bilinear.h, corners in its order: top left, top right, bottom left,
bottom right. A corner that is not on the map is not read. Arithmetic is fp32, or fp64 for fp64.
Offsets into one image are int32 unless they are wide; all others are relative to the program's
first row.

CONFIG is a `launch.Configuration`, LAYOUT a `tuning.Layout`.

"tested: NAME" marks a line in whose place tests/ops/test_triton_kernels.py puts a mistake.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.constexpr_function
def compute_type(element):
    """What arithmetic is done in for values stored as `element`."""
    return tl.float64 if element == tl.float64 else tl.float32


@triton.constexpr_function
def has_16_bits(element):
    """Whether values stored as `element` are fp16 or bf16."""
    return element in (tl.float16, tl.bfloat16)


@triton.constexpr_function
def total(points):
    """All points of a query's head."""
    return sum(points)


@triton.constexpr_function
def before(points, level):
    """The points of all lower levels."""
    return sum(points[:level])


@triton.constexpr_function
def power_of_2(number):
    """The least power of two that is not smaller."""
    return triton.next_power_of_2(number)


# --- points -------------------------------------------------------------------------------------


@triton.jit
def load_pair(pointer, index, mask):
    """pointer[2 * index] and its neighbour, [rows] each, by one load; NaN where masked."""
    element: tl.constexpr = pointer.dtype.element_ty
    acc: tl.constexpr = compute_type(element)
    if element == tl.float64:
        x = tl.load(pointer + 2 * index, mask=mask, other=float("nan"))
        y = tl.load(pointer + 2 * index + 1, mask=mask, other=float("nan"))
    elif element == tl.float32:
        both = tl.load(pointer.to(tl.pointer_type(tl.int64)) + index, mask=mask, other=-1)
        x = both.to(tl.int32).to(element, bitcast=True)
        y = (both >> 32).to(tl.int32).to(element, bitcast=True)
    else:
        tl.static_assert(has_16_bits(element), "load_pair: expected fp64, fp32, fp16 or bf16")
        both = tl.load(pointer.to(tl.pointer_type(tl.int32)) + index, mask=mask, other=-1)
        x = both.to(tl.int16).to(element, bitcast=True)
        y = (both >> 16).to(tl.int16).to(element, bitcast=True)
    return x.to(acc), y.to(acc)


@triton.jit
def store_pair(pointer, index, x, y, mask):
    """The inverse of `load_pair`."""
    element: tl.constexpr = pointer.dtype.element_ty
    x = x.to(element)
    y = y.to(element)
    if element == tl.float64:
        tl.store(pointer + 2 * index, x, mask=mask)
        tl.store(pointer + 2 * index + 1, y, mask=mask)
    elif element == tl.float32:
        both = x.to(tl.uint32, bitcast=True).to(tl.int64)
        both |= y.to(tl.uint32, bitcast=True).to(tl.int64) << 32
        tl.store(pointer.to(tl.pointer_type(tl.int64)) + index, both, mask=mask)
    else:
        tl.static_assert(has_16_bits(element), "store_pair: expected fp64, fp32, fp16 or bf16")
        both = x.to(tl.uint16, bitcast=True).to(tl.int32)
        both |= y.to(tl.uint16, bitcast=True).to(tl.int32) << 16
        tl.store(pointer.to(tl.pointer_type(tl.int32)) + index, both, mask=mask)


@triton.jit
def footprint(x, y, height, width):
    """Where points fall on a level, from their positions in pixels [rows].

    Returns:
        Whether each touches the map, which no coordinate does that is not finite; column and row of
        its top left corner; the fractions of a pixel to the right of and below it; and which of its
        two columns and two rows are on the map.
    """
    # Before any conversion to an integer, which could overflow.
    touches = (x > -1) & (y > -1) & (x < width.to(x.dtype)) & (y < height.to(y.dtype))
    x = tl.where(touches, x, 0.0)
    y = tl.where(touches, y, 0.0)
    low_x = tl.floor(x)
    low_y = tl.floor(y)
    column = low_x.to(tl.int32)
    row = low_y.to(tl.int32)
    # Sizes above 2^24 round in fp32, so that the low side may reach the size: hence both bounds.
    left = touches & (column >= 0) & (column < width)
    right = touches & (column + 1 < width)  # tested: last column
    top = (row >= 0) & (row < height)
    bottom = row + 1 < height
    return touches, column, row, x - low_x, y - low_y, left, right, top, bottom


# --- channels -----------------------------------------------------------------------------------
#
# A row's channels are a tuple of tiles. PACKED bf16 is read as words of two channels and gives two
# tiles for each chunk, its even and its odd channels: widening them takes one instruction each.


@triton.jit
def chunk(mask, k: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Columns of a row's chunk k, [1, WIDTH], and which of them are channels of a row in mask."""
    c = (k * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = mask[:, None]
    if (k + 1) * WIDTH > CHANNELS:
        inside = inside & (c < CHANNELS)
    return c, inside


@triton.jit
def load_row(
    pointer, offset, mask, CONFIG: tl.constexpr, LAYOUT: tl.constexpr, PACKED: tl.constexpr
):
    """The channels of pointer[offset], offset [rows]; zero, and not read, where masked."""
    acc: tl.constexpr = compute_type(pointer.dtype.element_ty)
    CHUNKS: tl.constexpr = LAYOUT.chunks
    tiles = ()
    if PACKED:
        words = (pointer + offset).to(tl.pointer_type(tl.int32))[:, None]
        for k in tl.static_range(CHUNKS):
            c, inside = chunk(mask, k, LAYOUT.width // 2, CONFIG.channels // 2)
            both = tl.load(words + c, mask=inside, other=0)
            even = (both << 16).to(tl.float32, bitcast=True)
            odd = (both & -65536).to(tl.float32, bitcast=True)
            tiles = tiles + (even, odd)  # tested: channels in order
    else:
        row = (pointer + offset)[:, None]
        for k in tl.static_range(CHUNKS):
            c, inside = chunk(mask, k, LAYOUT.width, CONFIG.channels)
            tiles = tiles + (tl.load(row + c, mask=inside, other=0.0).to(acc),)
    return tiles


@triton.jit
def store_row(
    pointer, offset, mask, tiles, CONFIG: tl.constexpr, LAYOUT: tl.constexpr, PACKED: tl.constexpr
):
    """The inverse of `load_row`."""
    element: tl.constexpr = pointer.dtype.element_ty
    CHUNKS: tl.constexpr = LAYOUT.chunks
    if PACKED:
        words = (pointer + offset).to(tl.pointer_type(tl.int32))[:, None]
        for k in tl.static_range(CHUNKS):
            c, inside = chunk(mask, k, LAYOUT.width // 2, CONFIG.channels // 2)
            both = tiles[2 * k].to(element).to(tl.uint16, bitcast=True).to(tl.int32)
            both |= tiles[2 * k + 1].to(element).to(tl.uint16, bitcast=True).to(tl.int32) << 16
            tl.store(words + c, both, mask=inside)
    else:
        row = (pointer + offset)[:, None]
        for k in tl.static_range(CHUNKS):
            c, inside = chunk(mask, k, LAYOUT.width, CONFIG.channels)
            tl.store(row + c, tiles[k].to(element), mask=inside)


@triton.jit
def add_to_row(pointer, offset, mask, weight, tiles, CONFIG: tl.constexpr, LAYOUT: tl.constexpr):
    """pointer[offset] += weight * tiles, atomically; untouched where masked."""
    row = (pointer + offset)[:, None]
    CHUNKS: tl.constexpr = LAYOUT.chunks
    for k in tl.static_range(CHUNKS):
        c, inside = chunk(mask, k, LAYOUT.width, CONFIG.channels)
        # The comparison is always true, and no instruction. It gives the mask all columns: of a
        # single one, the interpreter of triton 3.6 reads beyond the end.
        inside = inside & (c >= 0)
        # Nothing is read back, and no other memory is ordered by it.
        tl.atomic_add(row + c, weight[:, None] * tiles[k], mask=inside, sem="relaxed")


@triton.jit
def add_scaled(sums, weight, tiles):
    """sums + weight * tiles."""
    result = ()
    for k in tl.static_range(len(tiles)):
        result = result + (sums[k] + weight[:, None] * tiles[k],)
    return result


@triton.jit
def dot(a, b):
    """The sum of a * b over the channels, [rows]."""
    products = a[0] * b[0]
    for k in tl.static_range(1, len(a)):
        products += a[k] * b[k]
    return tl.sum(products, 1)


# --- rows, levels, points -----------------------------------------------------------------------
#
# Both kernels take points in two forms. With `reference` None, `points` are locations and `weights`
# attention weights. Otherwise `points` are offsets and `weights` logits: location and softmax are
# computed here, in the type of arithmetic.
#
# What there is none of is () in these tuples: triton 3.6 returns no None.


class Sizes(NamedTuple):
    """What a kernel is not compiled for."""

    levels: Any  # H0, W0, first pixel of level 0, H1, ...
    queries: Any
    pixels: Any
    value_b: Any  # strides of value
    value_s: Any
    value_m: Any
    points_b: Any  # strides of points, in points
    points_q: Any
    weights_b: Any
    weights_q: Any


class Rows(NamedTuple):
    """A program's rows: neighbouring queries of one head of one image."""

    sizes: Any  # what the kernel is given
    b: Any  # their image
    m: Any  # their head
    r: Any  # 0, 1, ...
    real: Any  # which of them exist
    first: Any  # index of the first of them in [B, Q, M]
    value: Any  # of their image and head
    points: Any  # of the first of them, like the next
    weights: Any
    point: Any  # index of each one's first point
    weight: Any
    pairs: Any  # index of the first one's numbers in reference, if any
    reference: Any  # of the first of them, if any
    scale: Any  # if any
    padding: Any  # of their image, if any
    terms: Any  # what `load_logits` gives, for logits


class Level(NamedTuple):
    """A level, and where each row's offsets on it start from."""

    height: Any
    width: Any
    start: Any  # its first pixel
    box: Any  # x, y and, of boxes, width and height, [rows], if there is a reference
    factor: Any  # what offsets are multiplied with beside boxes


class Point(NamedTuple):
    """A point of each row, [rows]."""

    stored_x: Any  # location or offset
    stored_y: Any
    factor: Any  # see Level
    weight: Any  # zero where no pixel is read
    x: Any  # how far right of its top left corner, in pixels
    y: Any  # how far below
    touches: Any  # whether a pixel is read
    inside: Any  # by corner: whether it is read
    pixels: Any  # by corner: its pixel
    shares: Any  # by corner: its part of the weight


@triton.constexpr_function
def boxed(config):
    """Whether offsets are relative to boxes."""
    return config.reference is not None and config.reference[2] == 1


@triton.constexpr_function
def pairs_of(config):
    """Numbers of a query's reference, in pairs: a point, or a box's centre and size."""
    _, levels, boxes = config.reference
    return levels * (1 + boxes)


@triton.jit
def open_rows(
    value,
    points,
    weights,
    reference,
    scale,
    padding,
    sizes,
    CONFIG: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """This program's rows, from a kernel's arguments."""
    HEADS: tl.constexpr = CONFIG.heads
    TOTAL: tl.constexpr = total(CONFIG.points)
    VEC: tl.constexpr = LAYOUT.vec
    pid = tl.program_id(0)
    tiles = tl.cdiv(sizes.queries, LAYOUT.rows)
    b = (pid // HEADS // tiles).to(tl.int64)
    m = pid % HEADS
    q = ((pid // HEADS) % tiles) * LAYOUT.rows
    r = tl.arange(0, LAYOUT.rows)
    real = q + r < sizes.queries
    query = q.to(tl.int64)
    points += 2 * (b * sizes.points_b + query * sizes.points_q + m * TOTAL)  # tested: image
    weights += b * sizes.weights_b + query * sizes.weights_q + m * TOTAL
    weight = r * sizes.weights_q
    plane = value + tl.multiple_of(b * sizes.value_b + m * sizes.value_m, VEC)
    pairs = ()
    terms = ()
    if CONFIG.reference is not None:
        pairs = (b * CONFIG.reference[0] * sizes.queries + q) * (2 * pairs_of(CONFIG))
        terms = load_logits(weights, weight, real, TOTAL)
    return Rows(
        sizes=sizes,
        b=b,
        m=m,
        r=r,
        real=real,
        first=(b * sizes.queries + q) * HEADS + m,
        value=plane,
        points=points,
        weights=weights,
        point=r * sizes.points_q,
        weight=weight,
        pairs=pairs,
        reference=() if reference is None else reference + pairs,
        scale=() if scale is None else scale,
        padding=() if padding is None else padding + b * sizes.pixels,
        terms=terms,
    )


@triton.jit
def load_level(rows, level: tl.constexpr, CONFIG: tl.constexpr):
    """A level of the table, and the rows' references on it."""
    levels = rows.sizes.levels
    box = ()
    factor = ()
    if CONFIG.reference is not None:
        LEVELS: tl.constexpr = CONFIG.reference[1]
        one = level if LEVELS > 1 else 0  # tested: level of a box
        pair = (rows.r * LEVELS + one) * (1 + CONFIG.reference[2])
        box = load_pair(rows.reference, pair, rows.real)
        if boxed(CONFIG):
            box = box + load_pair(rows.reference, pair + 1, rows.real)
            factor = tl.full((), share_of_box(CONFIG.points[level]), box[0].dtype)
    return Level(levels[3 * level], levels[3 * level + 1], levels[3 * level + 2], box, factor)


@triton.constexpr_function
def share_of_box(points):
    """What an offset is multiplied with beside boxes when no scale is given."""
    return 0.5 / max(points, 1)


@triton.constexpr_function
def unrolled(points):
    """All points at once, unless they are so many that compiling would take long."""
    return points if points <= 64 else 8


@triton.jit
def load_logits(weights, weight, real, TOTAL: tl.constexpr):
    """The logits of each row and what makes the exponentials of all of them add up to 1, [rows].

    Point by point and unrolled, in the threads that sample the row: sums over a tile, or carried by
    a loop, would lie in other threads, and every weight would have to be fetched from there.
    """
    acc: tl.constexpr = compute_type(weights.dtype.element_ty)
    largest = tl.full(weight.shape, -float("inf"), acc)
    for p in tl.range(0, TOTAL, loop_unroll_factor=unrolled(TOTAL)):
        largest = tl.maximum(largest, tl.load(weights + (weight + p), mask=real, other=0.0).to(acc))
    exponentials = tl.zeros(weight.shape, acc)
    for p in tl.range(0, TOTAL, loop_unroll_factor=unrolled(TOTAL)):
        logit = tl.load(weights + (weight + p), mask=real, other=0.0).to(acc)
        exponentials += tl.exp(logit - largest)
    return largest, 1 / exponentials  # tested: sum of a softmax


@triton.jit
def load_softmax(rows, TOTAL: tl.constexpr):
    """The attention weights of each row, [rows, TOTAL rounded up], and which of them there are."""
    acc: tl.constexpr = compute_type(rows.weights.dtype.element_ty)
    k = tl.arange(0, power_of_2(TOTAL))[None, :]
    there = rows.real[:, None] & (k < TOTAL)
    # Rows that are not there read as 0: nothing divides by zero.
    logits = tl.load(rows.weights + (rows.weight[:, None] + k), mask=there, other=0.0).to(acc)
    logits = tl.where(k < TOTAL, logits, -float("inf"))
    exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
    return exponentials / tl.sum(exponentials, 1)[:, None], there


@triton.jit
def load_point(rows, level, at_p, CONFIG: tl.constexpr):
    """Point at_p of each row, which lies on this level."""
    stored_x, stored_y = load_pair(rows.points, rows.point + at_p, rows.real)
    acc: tl.constexpr = stored_x.dtype
    a = tl.load(rows.weights + (rows.weight + at_p), mask=rows.real, other=0.0).to(acc)
    if CONFIG.reference is not None:
        a = tl.exp(a - rows.terms[0]) * rows.terms[1]
    box = level.box
    factor = level.factor
    if CONFIG.scaled:
        factor = tl.load(rows.scale + at_p)
    x = stored_x
    y = stored_y
    if boxed(CONFIG):
        x = box[0] + x * factor * box[2]
        y = box[1] + y * factor * box[3]
    height = level.height
    width = level.width
    if CONFIG.reference is None or boxed(CONFIG):
        x = x * width.to(acc) - 0.5
        y = y * height.to(acc) - 0.5
    else:
        x = box[0] * width.to(acc) + x - 0.5
        y = box[1] * height.to(acc) + y - 0.5
    touches, column, row, fx, fy, left, right, top, bottom = footprint(x, y, height, width)
    if CONFIG.wide:
        row = row.to(tl.int64)
    pixel = level.start + row * width + column
    pixels = (pixel, pixel + 1, pixel + width, pixel + width + 1)
    inside = (left & top, right & top, left & bottom, right & bottom)
    if CONFIG.padded:
        inside = unpadded(rows.padding, pixels, inside)
        touches = inside[0] | inside[1] | inside[2] | inside[3]
    # A point that reads no pixel contributes zero even where its weight is NaN.
    a = tl.where(touches, a, 0.0)
    lower = a * fy
    upper = a - lower  # tested: upper row
    shares = (upper * (1 - fx), upper * fx, lower * (1 - fx), lower * fx)
    return Point(stored_x, stored_y, factor, a, fx, fy, touches, inside, pixels, shares)


@triton.jit
def unpadded(padding, pixels, inside):
    """Which corners on the map are no padding."""
    result = ()
    for k in tl.static_range(4):
        image = tl.load(padding + pixels[k], mask=inside[k], other=1) == 0  # tested: padding
        result = result + (inside[k] & image,)
    return result


@triton.jit
def load_corner(
    rows, point, k: tl.constexpr, CONFIG: tl.constexpr, LAYOUT: tl.constexpr, PACKED: tl.constexpr
):
    """The channels of value at corner k of a point of each row."""
    VEC: tl.constexpr = LAYOUT.vec
    offset = tl.multiple_of(point.pixels[k] * rows.sizes.value_s, VEC)
    return load_row(rows.value, offset, point.inside[k], CONFIG, LAYOUT, PACKED)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    value,  # [B, S, M, D], strided over B, S and M
    points,  # [B, Q, M, sum(POINTS), 2], strided over B and Q
    weights,  # [B, Q, M, sum(POINTS)], strided over B and Q
    reference,  # [B or 1, Q, L or 1, 2 or 4], or None
    scale,  # [sum(POINTS)], or None
    padding,  # [B, S] bytes, or None
    out,  # [B, Q, M, D]
    softmax,  # [B, Q, M, sum(POINTS)], or None
    sizes,  # Sizes
    CONFIG: tl.constexpr,
    LAYOUT: tl.constexpr,  # its vec divides every offset into value
):
    """out[b,q,m,:] = sum_p weight[b,q,m,p] * bilinear(value[b,:,m,:], location[b,q,m,p])."""
    acc: tl.constexpr = compute_type(value.dtype.element_ty)
    POINTS: tl.constexpr = CONFIG.points
    TOTAL: tl.constexpr = total(POINTS)
    PACKED: tl.constexpr = value.dtype.element_ty == tl.bfloat16 and LAYOUT.vec > 1
    ROWS: tl.constexpr = LAYOUT.rows
    TILES: tl.constexpr = LAYOUT.chunks * (2 if PACKED else 1)
    WIDTH: tl.constexpr = LAYOUT.width // (2 if PACKED else 1)
    rows = open_rows(value, points, weights, reference, scale, padding, sizes, CONFIG, LAYOUT)
    if softmax is not None:
        tile, there = load_softmax(rows, TOTAL)
        columns = tl.arange(0, power_of_2(TOTAL))[None, :]
        results = rows.r[:, None] * (CONFIG.heads * TOTAL) + columns
        tl.store(
            softmax + rows.first * TOTAL + results, tile.to(softmax.dtype.element_ty), mask=there
        )
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros((ROWS, WIDTH), acc),)
    for i in tl.static_range(len(POINTS)):
        level = load_level(rows, i, CONFIG)
        for p in tl.range(0, POINTS[i], loop_unroll_factor=LAYOUT.unroll):
            point = load_point(rows, level, before(POINTS, i) + p, CONFIG)
            for k in tl.static_range(4):
                v = load_corner(rows, point, k, CONFIG, LAYOUT, PACKED)
                sums = add_scaled(sums, point.shares[k], v)
    row = rows.r * (CONFIG.heads * CONFIG.channels)
    store_row(out + rows.first * CONFIG.channels, row, rows.real, sums, CONFIG, LAYOUT, PACKED)


@triton.jit
def backward_kernel(
    grad_out,  # [B, Q, M, D]
    grad_softmax,  # [B, Q, M, sum(POINTS)], or None
    value,  # this and the next five as in forward_kernel
    points,
    weights,
    reference,
    scale,
    padding,
    grad_value,  # [B, S, M, D], of the type of arithmetic, zeroed by the caller
    grad_points,  # [B, Q, M, sum(POINTS), 2]
    grad_weights,  # [B, Q, M, sum(POINTS)]
    grad_reference,  # like reference, zeroed by the caller
    sizes,
    CONFIG: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The gradients, from the four dot products of grad_out with the corners of a point.

    Those of points and weights have one writer each. grad_value and grad_reference take atomics,
    whose order, and so whose last bits, change from run to run.
    """
    acc: tl.constexpr = compute_type(value.dtype.element_ty)
    POINTS: tl.constexpr = CONFIG.points
    TOTAL: tl.constexpr = total(POINTS)
    NEED_VALUE: tl.constexpr = CONFIG.needs[0]
    NEED_REFERENCE: tl.constexpr = CONFIG.needs[1]
    NEED_POINTS: tl.constexpr = CONFIG.needs[2]
    NEED_WEIGHTS: tl.constexpr = CONFIG.needs[3]
    ROWS: tl.constexpr = LAYOUT.rows
    BOXES: tl.constexpr = boxed(CONFIG)
    NEED_DOTS: tl.constexpr = NEED_REFERENCE or NEED_POINTS or NEED_WEIGHTS
    rows = open_rows(value, points, weights, reference, scale, padding, sizes, CONFIG, LAYOUT)
    real = rows.real
    first = rows.first
    result = rows.r * (CONFIG.heads * TOTAL)
    stride_g: tl.constexpr = CONFIG.heads * CONFIG.channels
    if NEED_VALUE:
        grad_value += rows.b * sizes.pixels * stride_g + rows.m * CONFIG.channels
    if NEED_POINTS:
        grad_points += first * (2 * TOTAL)
    if NEED_WEIGHTS:
        grad_weights += first * TOTAL
    if reference is not None:
        columns = tl.arange(0, power_of_2(TOTAL))[None, :]
        # The gradients by the weights, [rows, TOTAL rounded up]: the softmax needs all of a row.
        slopes = tl.zeros((ROWS, power_of_2(TOTAL)), acc)
    grad_out += first * CONFIG.channels
    g = load_row(grad_out, rows.r * stride_g, real, CONFIG, LAYOUT, False)
    for i in tl.static_range(len(POINTS)):
        level = load_level(rows, i, CONFIG)
        if NEED_REFERENCE:
            zero = tl.zeros((ROWS,), acc)
            by_box = (zero, zero, zero, zero)
        for p in tl.range(0, POINTS[i], loop_unroll_factor=LAYOUT.unroll):
            at_p = before(POINTS, i) + p
            point = load_point(rows, level, at_p, CONFIG)
            touches = point.touches
            s = ()
            for k in tl.static_range(4):
                if NEED_DOTS:
                    v = load_corner(rows, point, k, CONFIG, LAYOUT, False)
                    s = s + (dot(g, v),)
                if NEED_VALUE:
                    pixel = point.pixels[k] * stride_g
                    share = point.shares[k]
                    add_to_row(grad_value, pixel, point.inside[k], share, g, CONFIG, LAYOUT)
            if NEED_DOTS:
                top_sum = s[0] + point.x * (s[1] - s[0])
                bottom_sum = s[2] + point.x * (s[3] - s[2])
                if NEED_WEIGHTS:
                    slope = tl.where(touches, top_sum + point.y * (bottom_sum - top_sum), 0.0)
                    if reference is not None:
                        slopes = tl.where(columns == at_p, slope[:, None], slopes)
                    else:
                        slope = slope.to(grad_weights.dtype.element_ty)
                        tl.store(grad_weights + (result + at_p), slope, mask=real)
                if NEED_POINTS or NEED_REFERENCE:
                    across = (s[1] - s[0]) + point.y * ((s[3] - s[2]) - (s[1] - s[0]))
                    # By the position in pixels; by the location as a fraction of the map.
                    slope_x = point.weight * across  # tested: weight of a location's gradient
                    slope_y = point.weight * (bottom_sum - top_sum)
                    loc_x = tl.where(touches, slope_x * level.width.to(acc), 0.0)
                    loc_y = tl.where(touches, slope_y * level.height.to(acc), 0.0)
                    if NEED_REFERENCE:
                        w = by_box[2]
                        h = by_box[3]
                        if BOXES:
                            w += tl.where(touches, loc_x * point.factor * point.stored_x, 0.0)
                            h += tl.where(touches, loc_y * point.factor * point.stored_y, 0.0)
                        by_box = (by_box[0] + loc_x, by_box[1] + loc_y, w, h)
                    if NEED_POINTS:
                        if reference is not None:
                            if BOXES:
                                loc_x *= point.factor * level.box[2]
                                loc_y *= point.factor * level.box[3]
                            else:
                                loc_x = slope_x
                                loc_y = slope_y
                            loc_x = tl.where(touches, loc_x, 0.0)
                            loc_y = tl.where(touches, loc_y, 0.0)
                        store_pair(grad_points, result + at_p, loc_x, loc_y, real)
        if NEED_REFERENCE:
            sums = grad_reference + rows.pairs + rows.r * (2 * pairs_of(CONFIG))
            sums += (i if CONFIG.reference[1] > 1 else 0) * (2 + 2 * BOXES)
            for k in tl.static_range(2 + 2 * BOXES):
                tl.atomic_add(sums + k, by_box[k], mask=real, sem="relaxed")
    if reference is not None and NEED_WEIGHTS:
        results = result[:, None] + columns
        weighted, there = load_softmax(rows, TOTAL)
        if grad_softmax is not None:
            grad_softmax += first * TOTAL
            slopes += tl.load(grad_softmax + results, mask=there, other=0.0).to(acc)
        pulled = weighted * slopes
        pulled -= weighted * tl.sum(pulled, 1)[:, None]  # tested: mean of a softmax's gradient
        tl.store(grad_weights + results, pulled.to(grad_weights.dtype.element_ty), mask=there)
