// SPDX-License-Identifier: Apache-2.0
// What both directions do with a task: its parts, their tiles, and the stages up to the placed
// points of a tile.

// The part that is task (b, group of heads, block of queries).
Part part_of(const Problem& n, const cpu::Cut& cut, int64_t task) {
  const int64_t blocks = cut.blocks(n), groups = cut.groups(n), group = task / blocks;
  const int64_t first = task % blocks * cut.queries, head = group % groups * cut.heads;
  return Part{group / groups, first, smaller(cut.queries, n.queries - first), head,
              smaller(cut.heads, n.heads - head)};
}

// Calls handle(part) for tasks (b, group, block), with `planes` turned to their heads.
template <typename value_t, typename acc, typename Handle>
VITADAPTER_HD void for_each_part(const Problem& n, const cpu::Cut& cut, int64_t begin, int64_t end,
                                 Planes<value_t, acc>& planes, const Handle& handle) {
  const int64_t blocks = cut.blocks(n);
  for (int64_t task = begin; task < end; ++task) {
    const Part part = part_of(n, cut, task);
    if (task == begin || task % blocks == 0) {
      planes.turn_to(part, smaller(end - task, blocks - task % blocks) * cut.queries);
    }
    handle(part);
  }
}

// Calls use(h, q, first, queries) for the tiles of a part: head h, queries from q on, whose first
// row in the block is `first`.
template <typename Use>
VITADAPTER_HD void for_each_tile(const Problem& n, const Part& part, const Use& use) {
  const int64_t queries = cpu::tile_queries(n);
  for (int64_t h = 0; h < part.heads; ++h) {
    for (int64_t q = 0; q < part.count; q += queries) {
      use(h, q, h * part.count + q, smaller(queries, part.count - q));
    }
  }
}

// Fetches, places and samples tile by tile: what both directions do with the points of a part.
// Calls use(h, q, first, queries) for tiles as for_each_tile, placed.
template <bool kBackward, typename Params, typename acc, typename Use>
VITADAPTER_HD void for_each_placed_tile(const Params& p, const Part& part, const uint8_t* mask,
                                        const LevelsOfPoints<acc>& levels, int64_t ahead,
                                        Block<acc>& block, Tile<acc>& tile, const Use& use) {
  const Problem& n = p.problem;
  fetch(n, part, p.points, ahead, kBackward, block);
  if constexpr (kBackward) fetch_grad_out(n, part, p.grad_out, block);
  for_each_tile(n, part, [&](int64_t h, int64_t q, int64_t first, int64_t queries) {
    place<kBackward, typename Params::Points>(n, block, first * n.points, queries * n.points,
                                              levels, tile);
    if (mask != nullptr) mark_masked(n, mask, queries * n.points, tile);
    if (p.mask != nullptr) {
      const acc* weights = &block.attention[first * n.points];
      acc bad = non_finite(weights, queries * n.points);
      if constexpr (kBackward) {
        bad += non_finite(&block.grad_out[first * n.channels], queries * n.channels);
      }
      if (bad != 0) drop_masked(n, p.mask + part.b * n.pixels, queries * n.points, tile);
    }
    use(h, q, first, queries);
  });
}
