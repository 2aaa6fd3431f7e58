// Tiles: blocks of kRowBlock rows and kColumnBlock columns, side by side.
//
// In a tile a row of a slice, or of a plane, is [tile_blocks, kRowBlock, kColumnBlock], and rows
// are tile_stride apart.

namespace tcur::TCUR_ISA {

TCUR_TARGET inline int64_t tile_stride(int64_t tile_blocks) {
  return tile_blocks * kBlock + kPad;
}

}  // namespace tcur::TCUR_ISA
