// Forced into the compilation of llama.cpp by `make setup` (g++ -include), for CPUs with matrix tiles (AMX).
//
// GCC 12's _tile_loadconfig tells the compiler that it reads 8 of the 64 bytes of a tile configuration, so that the
// stores of the others are dropped, and what happened to lie on the stack makes the instruction fault: a segmentation
// fault in ggml_backend_amx_mul_mat, whatever the machine. Its _tile_loadd does not say that it reads memory at all.
// Here both say what they read.
//
// llama.cpp configures a thread's tiles once. Others use them in the same thread (torch multiplies bfloat16 in them, and
// gives them back), after which its next product is an illegal instruction. Here each product loads the configuration.
//
// The symbol tells tsugiki.evaluate.tiles that this build may repack weights for tiles.
#if defined(__AMX_INT8__) && defined(__cplusplus) && defined(__GNUC__) && !defined(__clang__)
#include <cstring>
#include <immintrin.h>
extern "C" {
__attribute__((weak, visibility("default"))) int tsugiki_tiles = 2;
}
static thread_local char tsugiki_tile_config[64];
static inline void tsugiki_load_tile_config() {
    __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])tsugiki_tile_config));
}
#define _tile_loadconfig(config) (std::memcpy(tsugiki_tile_config, (config), 64), tsugiki_load_tile_config())
#undef _tile_loadd
#define _tile_loadd(tile, base, stride) tsugiki_tile_loadd(tile, base, stride)
#define tsugiki_tile_loadd(tile, base, stride) \
    __asm__ volatile("tileloadd\t(%0,%1,1), %%tmm" #tile ::"r"((const void *)(base)), "r"((long)(stride)) : "memory")
// Its definition, `ggml_tile_config_init(void)`, becomes tsugiki_configurevoid(void); a call configures a thread's first time
// and loads the configuration every time.
#define ggml_tile_config_init(...) tsugiki_configure##__VA_ARGS__(__VA_ARGS__)
#define tsugiki_configure() (tsugiki_configurevoid(), tsugiki_load_tile_config())
#endif
