// Forced into the compilation of llama.cpp by `make setup` (g++ -include), for CPUs with matrix tiles (AMX).
//
// GCC 12's _tile_loadconfig tells the compiler that it reads 8 of the 64 bytes of a tile configuration, so that the
// stores of the others are dropped, and what happened to lie on the stack makes the instruction fault: a segmentation
// fault in ggml_backend_amx_mul_mat, whatever the machine. Its _tile_loadd does not say that it reads memory at all.
// Here both say what they read. The symbol tells tsugiki.evaluate.tiles that this build may repack weights for tiles.
#if defined(__AMX_INT8__) && defined(__cplusplus)
extern "C" {
__attribute__((weak, visibility("default"))) int tsugiki_tiles = 1;
}
#if defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) tsugiki_tile_loadd(tile, base, stride)
#define tsugiki_tile_loadd(tile, base, stride) \
    __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)), "r"((long)(stride)) : "memory")
#endif
#endif
