// The tile registers of AMX in plain C++, for tile_amx.h on machines without them (Intel SDM vol. 1, chapter 18).
#ifndef MMBAL_TESTS_AMX_MODEL_H
#define MMBAL_TESTS_AMX_MODEL_H

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace amx_model {

struct Tile {
    int rows = 0, bytes = 0;
    std::array<std::array<unsigned char, 64>, 16> data{};
};

inline bool configured = false;
inline std::array<Tile, 8> tiles;

inline void loadconfig(const void *memory) {
    unsigned char config[64];
    std::memcpy(config, memory, sizeof config);
    ASSERT_EQ(config[0], 1) << "palette";
    for (int t = 0; t < 8; t++) {
        uint16_t bytes;
        std::memcpy(&bytes, config + 16 + 2 * t, sizeof bytes);
        ASSERT_LE(bytes, 64);
        ASSERT_LE(config[48 + t], 16);
        tiles[t] = {config[48 + t], bytes, {}};
    }
    configured = true;
}

inline void release() { configured = false; }

inline void loadd(int t, const void *base, int64_t stride) {
    ASSERT_TRUE(configured);
    for (int i = 0; i < tiles[t].rows; i++)
        std::memcpy(tiles[t].data[i].data(), static_cast<const unsigned char *>(base) + i * stride, tiles[t].bytes);
}

inline void stored(int t, void *base, int64_t stride) {
    ASSERT_TRUE(configured);
    for (int i = 0; i < tiles[t].rows; i++)
        std::memcpy(static_cast<unsigned char *>(base) + i * stride, tiles[t].data[i].data(), tiles[t].bytes);
}

inline float element(const Tile &t, int row, int index) {
    uint16_t bits;
    std::memcpy(&bits, t.data[row].data() + 2 * index, sizeof bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline void dpbf16ps(int c, int a, int b) {
    ASSERT_TRUE(configured);
    Tile &sum = tiles[c];
    ASSERT_EQ(tiles[a].rows, sum.rows);
    ASSERT_EQ(tiles[b].bytes, sum.bytes);
    ASSERT_EQ(tiles[a].bytes, 4 * tiles[b].rows) << "pairs of a and of b";
    for (int i = 0; i < sum.rows; i++) {
        for (int j = 0; j < sum.bytes / 4; j++) {
            // Even and odd elements are summed apart, then both sums are added to what was there.
            float value, parts[2] = {0, 0};
            std::memcpy(&value, sum.data[i].data() + 4 * j, sizeof value);
            for (int pair = 0; pair < tiles[b].rows; pair++)
                for (int k = 0; k < 2; k++)
                    parts[k] += element(tiles[a], i, 2 * pair + k) * element(tiles[b], pair, 2 * j + k);
            value += parts[0] + parts[1];
            std::memcpy(sum.data[i].data() + 4 * j, &value, sizeof value);
        }
    }
}

} // namespace amx_model

// In place of the compiler's intrinsics, after its header has been read.
#ifdef MMBAL_X86
#include <immintrin.h>
#endif
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_model::loadconfig
#define _tile_release amx_model::release
#define _tile_loadd amx_model::loadd
#define _tile_stored amx_model::stored
#define _tile_dpbf16ps amx_model::dpbf16ps

#endif
