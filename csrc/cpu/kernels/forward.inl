// SPDX-License-Identifier: Apache-2.0
// The forward kernel: samples each tile of a task's parts into the output.

template <typename value_t, typename Points>
void forward(const ForwardParams<value_t, Points>& p, cpu::Cut cut, int64_t begin, int64_t end) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const LevelsOfPoints<acc> levels(n, cpu::tile_queries(n));
  Block<acc> block(n, cut, false);
  Tile<acc> tile(n, false);
  Planes<value_t, acc> planes(p);
  for_each_part(n, cut, begin, end, planes, [&](const Part& part) {
    for_each_placed_tile<false>(
        p, part, planes.mask_to_ask(), levels, part.count, block, tile,
        [&](int64_t h, int64_t q, int64_t first, int64_t queries) {
          value_t* out = p.out + (part.row(n, q) + h) * n.channels;
          for_each_span<acc>(n.channels, [&](auto lanes, auto vectors, const Span& span) {
            planes.with(h, [&](const auto& plane) {
              sample<decltype(lanes)::value, decltype(vectors)::value>(
                  n, queries, plane.from(span.first), tile, out + span.first, n.heads * n.channels);
            });
          });
          for (int64_t i = 0; i < queries && p.weights != nullptr && n.points > 0; ++i) {
            const acc* from = &block.attention[(first + i) * n.points];
            auto* to = p.weights + (part.row(n, q + i) + h) * n.points;
            with_width<kLanes<acc>>(n.points, [&](auto width) {
              move_row<decltype(width)::value>(from, to, n.points);
            });
          }
        });
  });
}
