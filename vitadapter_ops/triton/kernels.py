# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of multi-scale deformable attention.

A program computes ROWS neighbouring queries of one head of one image: neighbours sample the same
pixels, which then come from the L1 cache. Its D channels are CHUNKS tiles [ROWS, WIDTH]; a thread
holds up to 16 neighbouring bytes of a row of a tile. CHUNKS need not be a power of two, so that
D = 12, 24 or 40 leaves no thread idle. What depends on a point but not on a channel is a vector
[ROWS], which the threads of a row compute alike.

The convention is that of csrc/bilinear.h, corners in its order: top left, top right, bottom left,
bottom right. A corner that is not on the map is not read. Arithmetic is fp32, or fp64 for fp64.
Offsets into one image are int32 unless WIDE; all others are relative to the program's first row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def compute_type(element):
    """What arithmetic is done in for values stored as `element`."""
    return tl.float64 if element == tl.float64 else tl.float32


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
    """pointer[2 * index] and its neighbour, [ROWS] each, by one load; NaN where masked."""
    element: tl.constexpr = pointer.dtype.element_ty
    acc: tl.constexpr = compute_type(element)
    if element.primitive_bitwidth == 64:
        x = tl.load(pointer + 2 * index, mask=mask, other=float("nan"))
        y = tl.load(pointer + 2 * index + 1, mask=mask, other=float("nan"))
    elif element.primitive_bitwidth == 32:
        both = tl.load(pointer.to(tl.pointer_type(tl.int64)) + index, mask=mask, other=-1)
        x = both.to(tl.int32).to(element, bitcast=True)
        y = (both >> 32).to(tl.int32).to(element, bitcast=True)
    else:
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
    if element.primitive_bitwidth == 64:
        tl.store(pointer + 2 * index, x, mask=mask)
        tl.store(pointer + 2 * index + 1, y, mask=mask)
    elif element.primitive_bitwidth == 32:
        both = x.to(tl.uint32, bitcast=True).to(tl.int64)
        both |= y.to(tl.uint32, bitcast=True).to(tl.int64) << 32
        tl.store(pointer.to(tl.pointer_type(tl.int64)) + index, both, mask=mask)
    else:
        both = x.to(tl.uint16, bitcast=True).to(tl.int32)
        both |= y.to(tl.uint16, bitcast=True).to(tl.int32) << 16
        tl.store(pointer.to(tl.pointer_type(tl.int32)) + index, both, mask=mask)


@triton.jit
def footprint(x, y, height, width):
    """Where points fall on a level, from their positions in pixels [ROWS].

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
    right = touches & (column + 1 < width)
    top = (row >= 0) & (row < height)
    bottom = row + 1 < height
    return touches, column, row, x - low_x, y - low_y, left, right, top, bottom


# --- channels -----------------------------------------------------------------------------------
#
# A row's channels are a tuple of tiles. PACKED bf16 is read as words of two channels and gives two
# tiles for each chunk, its even and its odd channels: widening them takes one instruction each.


@triton.jit
def load_row(
    pointer,
    offset,
    mask,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The channels of pointer[offset], offset [ROWS]; zero, and not read, where masked."""
    acc: tl.constexpr = compute_type(pointer.dtype.element_ty)
    tiles = ()
    if PACKED:
        c = tl.arange(0, WIDTH // 2)
        words = (pointer + offset).to(tl.pointer_type(tl.int32))
        for k in tl.static_range(CHUNKS):
            inside = mask[:, None]
            if (k + 1) * WIDTH > CHANNELS:
                inside = inside & (k * (WIDTH // 2) + c < CHANNELS // 2)[None, :]
            both = tl.load(words[:, None] + (k * (WIDTH // 2) + c)[None, :], mask=inside, other=0)
            even = (both << 16).to(tl.float32, bitcast=True)
            odd = (both & -65536).to(tl.float32, bitcast=True)
            tiles = tiles + (even, odd)
    else:
        c = tl.arange(0, WIDTH)
        row = pointer + offset
        for k in tl.static_range(CHUNKS):
            inside = mask[:, None]
            if (k + 1) * WIDTH > CHANNELS:
                inside = inside & (k * WIDTH + c < CHANNELS)[None, :]
            tile = tl.load(row[:, None] + (k * WIDTH + c)[None, :], mask=inside, other=0.0)
            tiles = tiles + (tile.to(acc),)
    return tiles


@triton.jit
def store_row(
    pointer,
    offset,
    mask,
    tiles,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The inverse of `load_row`."""
    element: tl.constexpr = pointer.dtype.element_ty
    if PACKED:
        c = tl.arange(0, WIDTH // 2)
        words = (pointer + offset).to(tl.pointer_type(tl.int32))
        for k in tl.static_range(CHUNKS):
            inside = mask[:, None]
            if (k + 1) * WIDTH > CHANNELS:
                inside = inside & (k * (WIDTH // 2) + c < CHANNELS // 2)[None, :]
            both = tiles[2 * k].to(element).to(tl.uint16, bitcast=True).to(tl.int32)
            both |= tiles[2 * k + 1].to(element).to(tl.uint16, bitcast=True).to(tl.int32) << 16
            tl.store(words[:, None] + (k * (WIDTH // 2) + c)[None, :], both, mask=inside)
    else:
        c = tl.arange(0, WIDTH)
        row = pointer + offset
        for k in tl.static_range(CHUNKS):
            inside = mask[:, None]
            if (k + 1) * WIDTH > CHANNELS:
                inside = inside & (k * WIDTH + c < CHANNELS)[None, :]
            tile = tiles[k].to(element)
            tl.store(row[:, None] + (k * WIDTH + c)[None, :], tile, mask=inside)


@triton.jit
def add_to_row(
    pointer,
    offset,
    mask,
    weight,
    tiles,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """pointer[offset] += weight * tiles, atomically; untouched where masked."""
    c = tl.arange(0, WIDTH)
    row = pointer + offset
    for k in tl.static_range(CHUNKS):
        # The comparison is always true, and no instruction. It gives the mask all columns: of a
        # single one, the interpreter of triton 3.6 reads beyond the end.
        inside = mask[:, None] & (c >= 0)[None, :]
        if (k + 1) * WIDTH > CHANNELS:
            inside = inside & (k * WIDTH + c < CHANNELS)[None, :]
        at = row[:, None] + (k * WIDTH + c)[None, :]
        # Nothing is read back, and no other memory is ordered by it.
        tl.atomic_add(at, weight[:, None] * tiles[k], mask=inside, sem="relaxed")


@triton.jit
def nothing(ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, acc: tl.constexpr):
    """A row's tiles, zero."""
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles = tiles + (tl.zeros((ROWS, WIDTH), acc),)
    return tiles


@triton.jit
def add_scaled(sums, weight, tiles, TILES: tl.constexpr):
    """sums + weight * tiles."""
    result = ()
    for k in tl.static_range(TILES):
        result = result + (sums[k] + weight[:, None] * tiles[k],)
    return result


@triton.jit
def dot(a, b, TILES: tl.constexpr):
    """The sum of a * b over the channels, [ROWS]."""
    products = a[0] * b[0]
    for k in tl.static_range(1, TILES):
        products += a[k] * b[k]
    return tl.sum(products, 1)


# --- kernels ------------------------------------------------------------------------------------
#
# Both kernels take points in two forms. With `reference` None, `points` are locations and `weights`
# attention weights. Otherwise `points` are offsets and `weights` logits: location and softmax are
# computed here, in the type of arithmetic.


@triton.jit
def locate(queries, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """This program's image, head and first query."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(queries, ROWS)
    image = pid // HEADS // tiles
    return image.to(tl.int64), pid % HEADS, ((pid // HEADS) % tiles) * ROWS


@triton.jit
def load_reference(
    reference, row, real, level: tl.constexpr, LEVELS: tl.constexpr, BOXES: tl.constexpr
):
    """x, y, width and height of the reference boxes of a level, [ROWS]; width 0 for points."""
    pairs: tl.constexpr = 2 if BOXES else 1
    index = (row * LEVELS + (level if LEVELS > 1 else 0)) * pairs
    x, y = load_pair(reference, index, real)
    w = tl.zeros_like(x)
    h = w
    if BOXES:
        w, h = load_pair(reference, index + 1, real)
    return x, y, w, h


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
    """The logits of each row and what makes the exponentials of all of them add up to 1, [ROWS].

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
    return largest, 1 / exponentials


@triton.jit
def load_softmax(weights, weight, real, TOTAL: tl.constexpr):
    """The attention weights of each row, [ROWS, TOTAL rounded up], and which of them there are."""
    acc: tl.constexpr = compute_type(weights.dtype.element_ty)
    k = tl.arange(0, power_of_2(TOTAL))[None, :]
    there = real[:, None] & (k < TOTAL)
    # Rows that are not there read as 0: nothing divides by zero.
    logits = tl.load(weights + (weight[:, None] + k), mask=there, other=0.0).to(acc)
    logits = tl.where(k < TOTAL, logits, -float("inf"))
    exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
    return exponentials / tl.sum(exponentials, 1)[:, None], there


@triton.jit
def load_point(points, weights, point, weight, real, box, factor, terms, height, width):
    """One point of each row: its position in pixels and its weight, and the two numbers stored.

    Args:
        points: locations, or offsets where there is a box.
        weights: attention weights, or logits where there are terms.
        point: index of each row's point.
        weight: index of each row's weight.
        real: which rows exist.
        box: what `load_reference` gives, or None.
        factor: what offsets are multiplied with beside boxes; None beside reference points.
        terms: what `load_logits` gives, or None.
        height: of the level.
        width: of the level.
    """
    stored_x, stored_y = load_pair(points, point, real)
    a = tl.load(weights + weight, mask=real, other=0.0)
    acc: tl.constexpr = stored_x.dtype
    a = a.to(acc)
    if terms is not None:
        a = tl.exp(a - terms[0]) * terms[1]
    x = stored_x
    y = stored_y
    if box is not None and factor is None:
        x = box[0] * width.to(acc) + x - 0.5
        y = box[1] * height.to(acc) + y - 0.5
    else:
        if box is not None:
            x = box[0] + x * factor * box[2]
            y = box[1] + y * factor * box[3]
        x = x * width.to(acc) - 0.5
        y = y * height.to(acc) - 0.5
    return x, y, a, stored_x, stored_y


@triton.jit
def corner_of(pixel, width, k: tl.constexpr):
    """Index of corner k, from that of the top left one."""
    corner = pixel
    if k >= 2:
        corner += width
    if k % 2 == 1:
        corner += 1
    return corner


@triton.jit
def insides(touches, left, right, top, bottom, padding, pixel, width):
    """Which points have each corner on the map and unmasked, and which have any such corner."""
    inside = ()
    for k in tl.static_range(4):
        inside = inside + (is_inside(left, right, top, bottom, padding, pixel, width, k),)
    if padding is not None:
        touches = inside[0] | inside[1] | inside[2] | inside[3]
    return inside, touches


@triton.jit
def is_inside(left, right, top, bottom, padding, pixel, width, k: tl.constexpr):
    """Which points have a corner k that is on the map and no padding."""
    inside = (right if k % 2 == 1 else left) & (bottom if k >= 2 else top)
    if padding is not None:
        inside &= tl.load(padding + corner_of(pixel, width, k), mask=inside, other=1) == 0
    return inside


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
    levels,  # H0, W0, first pixel of level 0, H1, ...
    queries,
    pixels,
    value_b,  # strides of value
    value_s,
    value_m,
    points_b,  # strides of points, in points
    points_q,
    weights_b,
    weights_q,
    REFERENCE: tl.constexpr,  # images, levels and boxes of reference: (1 or 0, L or 1, 1 or 0)
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POINTS: tl.constexpr,  # of each level
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,  # divides every offset into value
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out[b,q,m,:] = sum_p weight[b,q,m,p] * bilinear(value[b,:,m,:], location[b,q,m,p])."""
    acc: tl.constexpr = compute_type(value.dtype.element_ty)
    TILES: tl.constexpr = 2 * CHUNKS if PACKED else CHUNKS
    TOTAL: tl.constexpr = total(POINTS)
    b, m, q = locate(queries, HEADS, ROWS)
    r = tl.arange(0, ROWS)
    real = q + r < queries
    point = r * points_q
    weight = r * weights_q
    points += 2 * (b * points_b + q.to(tl.int64) * points_q + m * TOTAL)
    weights += b * weights_b + q.to(tl.int64) * weights_q + m * TOTAL
    first = (b * queries + q) * HEADS + m
    plane = value + tl.multiple_of(b * value_b + m * value_m, VEC)
    if padding is not None:
        padding += b * pixels
    BOXES: tl.constexpr = REFERENCE[2]
    PAIRS: tl.constexpr = 2 * REFERENCE[1] * (1 + BOXES)
    box = None
    terms = None
    factor = None
    if reference is not None:
        reference += (b * REFERENCE[0] * queries + q) * PAIRS
        terms = load_logits(weights, weight, real, TOTAL)
        if softmax is not None:
            softmax += first * TOTAL
            results = r[:, None] * (HEADS * TOTAL) + tl.arange(0, power_of_2(TOTAL))[None, :]
            tile, there = load_softmax(weights, weight, real, TOTAL)
            tl.store(softmax + results, tile.to(softmax.dtype.element_ty), mask=there)
    sums = nothing(ROWS, WIDTH * CHUNKS // TILES, TILES, acc)
    for level in tl.static_range(len(POINTS)):
        height = levels[3 * level]
        width = levels[3 * level + 1]
        start = levels[3 * level + 2]
        if BOXES:
            factor = tl.full((), share_of_box(POINTS[level]), acc)
        if reference is not None:
            box = load_reference(reference, r, real, level, REFERENCE[1], BOXES)
        for p in tl.range(0, POINTS[level], loop_unroll_factor=UNROLL):
            at_p = before(POINTS, level) + p
            if scale is not None:
                factor = tl.load(scale + at_p)
            x, y, a, _, _ = load_point(
                points,
                weights,
                point + at_p,
                weight + at_p,
                real,
                box,
                factor,
                terms,
                height,
                width,
            )
            touches, column, row, fx, fy, left, right, top, bottom = footprint(x, y, height, width)
            if WIDE:
                row = row.to(tl.int64)
            pixel = start + row * width + column
            inside, touches = insides(touches, left, right, top, bottom, padding, pixel, width)
            # A point that reads no pixel contributes zero even where its weight is NaN.
            a = tl.where(touches, a, 0.0)
            lower = a * fy
            upper = a - lower
            for k in tl.static_range(4):
                share_k = (upper if k < 2 else lower) * (fx if k % 2 == 1 else 1 - fx)
                offset = tl.multiple_of(corner_of(pixel, width, k) * value_s, VEC)
                v = load_row(plane, offset, inside[k], CHANNELS, WIDTH, CHUNKS, PACKED)
                sums = add_scaled(sums, share_k, v, TILES)
    out += first * CHANNELS
    store_row(out, r * (HEADS * CHANNELS), real, sums, CHANNELS, WIDTH, CHUNKS, PACKED)


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
    levels,
    queries,
    pixels,
    value_b,
    value_s,
    value_m,
    points_b,
    points_q,
    weights_b,
    weights_q,
    NEED_VALUE: tl.constexpr,
    NEED_REFERENCE: tl.constexpr,
    NEED_POINTS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POINTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradients, from the four dot products of grad_out with the corners of a point.

    Those of points and weights have one writer each. grad_value and grad_reference take atomics,
    whose order, and so whose last bits, change from run to run.
    """
    acc: tl.constexpr = compute_type(value.dtype.element_ty)
    TOTAL: tl.constexpr = total(POINTS)
    NEED_DOTS: tl.constexpr = NEED_REFERENCE or NEED_POINTS or NEED_WEIGHTS
    b, m, q = locate(queries, HEADS, ROWS)
    r = tl.arange(0, ROWS)
    real = q + r < queries
    point = r * points_q
    weight = r * weights_q
    points += 2 * (b * points_b + q.to(tl.int64) * points_q + m * TOTAL)
    weights += b * weights_b + q.to(tl.int64) * weights_q + m * TOTAL
    first = (b * queries + q) * HEADS + m
    result = r * (HEADS * TOTAL)
    plane = value + tl.multiple_of(b * value_b + m * value_m, VEC)
    stride_g: tl.constexpr = HEADS * CHANNELS
    if NEED_VALUE:
        grad_value += b * pixels * stride_g + m * CHANNELS
    if NEED_POINTS:
        grad_points += first * (2 * TOTAL)
    if NEED_WEIGHTS:
        grad_weights += first * TOTAL
    if padding is not None:
        padding += b * pixels
    BOXES: tl.constexpr = REFERENCE[2]
    PAIRS: tl.constexpr = 2 * REFERENCE[1] * (1 + BOXES)
    box = None
    terms = None
    factor = None
    if reference is not None:
        reference += (b * REFERENCE[0] * queries + q) * PAIRS
        terms = load_logits(weights, weight, real, TOTAL)
        columns = tl.arange(0, power_of_2(TOTAL))[None, :]
        # The gradients by the weights, [ROWS, TOTAL rounded up]: the softmax needs all of a row.
        slopes = tl.zeros((ROWS, power_of_2(TOTAL)), acc)
    g = load_row(grad_out + first * CHANNELS, r * stride_g, real, CHANNELS, WIDTH, CHUNKS, False)
    for level in tl.static_range(len(POINTS)):
        height = levels[3 * level]
        width = levels[3 * level + 1]
        start = levels[3 * level + 2]
        if BOXES:
            factor = tl.full((), share_of_box(POINTS[level]), acc)
        if reference is not None:
            box = load_reference(reference, r, real, level, REFERENCE[1], BOXES)
        if NEED_REFERENCE:
            by_x = tl.zeros((ROWS,), acc)
            by_y = by_x
            by_w = by_x
            by_h = by_x
        for p in tl.range(0, POINTS[level], loop_unroll_factor=UNROLL):
            at_p = before(POINTS, level) + p
            if scale is not None:
                factor = tl.load(scale + at_p)
            x, y, a, stored_x, stored_y = load_point(
                points,
                weights,
                point + at_p,
                weight + at_p,
                real,
                box,
                factor,
                terms,
                height,
                width,
            )
            touches, column, row, fx, fy, left, right, top, bottom = footprint(x, y, height, width)
            if WIDE:
                row = row.to(tl.int64)
            pixel = start + row * width + column
            inside, touches = insides(touches, left, right, top, bottom, padding, pixel, width)
            a = tl.where(touches, a, 0.0)
            lower = a * fy
            upper = a - lower
            s = ()
            for k in tl.static_range(4):
                corner = corner_of(pixel, width, k)
                if NEED_DOTS:
                    offset = tl.multiple_of(corner * value_s, VEC)
                    v = load_row(plane, offset, inside[k], CHANNELS, WIDTH, CHUNKS, False)
                    s = s + (dot(g, v, CHUNKS),)
                if NEED_VALUE:
                    share_k = (upper if k < 2 else lower) * (fx if k % 2 == 1 else 1 - fx)
                    add_to_row(
                        grad_value,
                        corner * stride_g,
                        inside[k],
                        share_k,
                        g,
                        CHANNELS,
                        WIDTH,
                        CHUNKS,
                    )
            if NEED_DOTS:
                top_sum = s[0] + fx * (s[1] - s[0])
                bottom_sum = s[2] + fx * (s[3] - s[2])
                if NEED_WEIGHTS:
                    slope = tl.where(touches, top_sum + fy * (bottom_sum - top_sum), 0.0)
                    if reference is not None:
                        slopes = tl.where(columns == at_p, slope[:, None], slopes)
                    else:
                        slope = slope.to(grad_weights.dtype.element_ty)
                        tl.store(grad_weights + (result + at_p), slope, mask=real)
                if NEED_POINTS or NEED_REFERENCE:
                    across = (s[1] - s[0]) + fy * ((s[3] - s[2]) - (s[1] - s[0]))
                    # By the position in pixels; by the location as a fraction of the map.
                    slope_x = a * across
                    slope_y = a * (bottom_sum - top_sum)
                    loc_x = tl.where(touches, slope_x * width.to(acc), 0.0)
                    loc_y = tl.where(touches, slope_y * height.to(acc), 0.0)
                    if NEED_REFERENCE:
                        by_x += loc_x
                        by_y += loc_y
                        if BOXES:
                            by_w += tl.where(touches, loc_x * factor * stored_x, 0.0)
                            by_h += tl.where(touches, loc_y * factor * stored_y, 0.0)
                    if NEED_POINTS:
                        if reference is not None:
                            if BOXES:
                                loc_x *= factor * box[2]
                                loc_y *= factor * box[3]
                            else:
                                loc_x = slope_x
                                loc_y = slope_y
                            loc_x = tl.where(touches, loc_x, 0.0)
                            loc_y = tl.where(touches, loc_y, 0.0)
                        store_pair(grad_points, result + at_p, loc_x, loc_y, real)
        if NEED_REFERENCE:
            sums = grad_reference + (b * REFERENCE[0] * queries + q) * PAIRS
            sums += r * PAIRS + (level if REFERENCE[1] > 1 else 0) * (2 + 2 * BOXES)
            tl.atomic_add(sums, by_x, mask=real, sem="relaxed")
            tl.atomic_add(sums + 1, by_y, mask=real, sem="relaxed")
            if BOXES:
                tl.atomic_add(sums + 2, by_w, mask=real, sem="relaxed")
                tl.atomic_add(sums + 3, by_h, mask=real, sem="relaxed")
    if reference is not None and NEED_WEIGHTS:
        results = result[:, None] + columns
        weighted, there = load_softmax(weights, weight, real, TOTAL)
        if grad_softmax is not None:
            grad_softmax += first * TOTAL
            slopes += tl.load(grad_softmax + results, mask=there, other=0.0).to(acc)
        pulled = weighted * slopes
        pulled -= weighted * tl.sum(pulled, 1)[:, None]
        tl.store(grad_weights + results, pulled.to(grad_weights.dtype.element_ty), mask=there)
