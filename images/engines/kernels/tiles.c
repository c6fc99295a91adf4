// Products of a model's inputs with its weights by AMX: tiles of bfloat16, sums in float32.
//
// A float32 is exactly the sum of three bfloat16 of falling size. Their products with a weight are
// exact, too, so all of them together give what float32 gives, with a rounding like its own.

#include "tiles.h"

#if WIDTH == 16 && defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "products.h"
#include "transpose.h"

#define AMX __attribute__((target("amx-tile,amx-bf16")))

// A tile has 16 lines of 16 words, each of two columns. Two tiles of weights and two of inputs are
// multiplied at a time, over STEPS steps of columns. What a CHUNK of inputs needs for that fits into
// a core's second-level cache, and so do LITTLE bytes.
enum { LINES = 16, DEEP = 32, BAND = 2 * LINES, PAIR = 2 * LINES };
enum { CHUNK = 256, STEPS = 8, LITTLE = 1 << 20 };

typedef struct { words weights[STEPS * BAND], sums[TILE * CHUNK / WIDTH]; } Room;
_Static_assert(sizeof(Room) <= ROOM, "the room that is given");

#define EVEN(lane, s) (2 * (lane))
#define ODD(lane, s) (2 * (lane) + 1)

// Takes the next part of each number, in the upper half of a word: to nearest, half to even.
INLINE words next_part(vec *left) {
    const words all = (words)*left;
    const words finite = (words)((all & 0x7f800000) != 0x7f800000);
    const words near = all + (0x7fff + (all >> 16 & 1));
    const words part = ((near & finite) | ((all | 0x400000) & ~finite)) & 0xffff0000;
    *left -= (vec)part;
    return part;
}

// Splits n <= DEEP numbers beside each other, the others being zero.
INLINE void split_line(const float *from, int64_t n, words found[PARTS]) {
    float buffer[DEEP] = {0};
    if (n < DEEP) from = memcpy(buffer, from, n * sizeof *from);
    vec low, high;
    memcpy(&low, from, sizeof low);
    memcpy(&high, from + WIDTH, sizeof high);
    vec even = __builtin_shufflevector(low, high, EACH_LANE(EVEN, 0));
    vec odd = __builtin_shufflevector(low, high, EACH_LANE(ODD, 0));
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        found[part] = next_part(&even) >> 16 | next_part(&odd);
}

// The parts lie in tiles, by group of inputs, step of columns and part; each line of a tile has a
// word of each input.
void split_inputs_16(const float *inputs, int64_t count, int64_t columns, uint16_t *split) {
    words *to = (words *)split;
    for (int64_t group = 0; group < count; group += LINES)
        for (int64_t k = 0; k < columns; k += DEEP) {
            words squares[PARTS][LINES];
            for (int line = 0; line < LINES; line++) {
                const int64_t input = group + line, n = columns - k < DEEP ? columns - k : DEEP;
                words found[PARTS];
                if (input < count) split_line(inputs + input * columns + k, n, found);
                else split_line(inputs, 0, found);
                for (int part = 0; part < PARTS; part++) squares[part][line] = found[part];
            }
            for (int part = 0; part < PARTS; part++, to += LINES) {
                transpose(squares[part]);
                memcpy(to, squares[part], sizeof squares[part]);
            }
        }
}

// Some columns of BAND rows of weights: two tiles per step, a line of them per row.
typedef struct { const char *first; int64_t pitch, step; } Tiles;

// Tiles lie where the weights are, but not if rows are missing or columns do not fill a step.
INLINE Tiles tiles_of(
    const uint16_t *weights, int64_t rows, int64_t columns, int64_t k, int64_t deep, words *room
) {
    if (rows >= BAND && deep % DEEP == 0)
        return (Tiles){(const char *)(weights + k), columns * 2, DEEP * 2};
    for (int64_t step = 0; step * DEEP < deep; step++)
        for (int line = 0; line < BAND; line++) {
            const int64_t left = deep - step * DEEP;
            words some = {0};
            if (line < rows)
                memcpy(&some, weights + line * columns + k + step * DEEP,
                       (left < DEEP ? left : DEEP) * sizeof *weights);
            room[step * BAND + line] = some;
        }
    return (Tiles){(const char *)room, sizeof *room, BAND * sizeof *room};
}

// Multiplies two tiles of weights with one or two of inputs, `groups`, which are `next` words apart.
AMX INLINE void block(
    Tiles tiles, const words *inputs, int64_t next, int64_t steps, const int groups,
    words made[4][LINES]
) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
        const char *weights = tiles.first + step * tiles.step;
        _tile_loadd(4, weights, tiles.pitch);
        _tile_loadd(5, weights + LINES * tiles.pitch, tiles.pitch);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const words *some = inputs + (step * PARTS + part) * LINES;
            _tile_loadd(6, some, sizeof *some);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (groups > 1) {
                _tile_loadd(7, some + next, sizeof *some);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, made[0], sizeof(words));
    _tile_stored(1, made[1], sizeof(words));
    if (groups > 1) {
        _tile_stored(2, made[2], sizeof(words));
        _tile_stored(3, made[3], sizeof(words));
    }
}

// Adds a tile to sums, or begins them: a line per row of weights, CHUNK inputs wide.
INLINE void add_up(const words tile[LINES], words *sums, int begun) {
#pragma unroll
    for (int line = 0; line < LINES; line++) {
        vec *to = (vec *)(sums + line * CHUNK / WIDTH);
        *to = begun ? *to + (vec)tile[line] : (vec)tile[line];
    }
}

// Writes sums of some rows of weights for a group of inputs to where they belong.
INLINE void write_out(const words *sums, float *out, int64_t stride, int64_t count, int64_t rows) {
    words square[LINES];
#pragma unroll
    for (int line = 0; line < LINES; line++) square[line] = sums[line * CHUNK / WIDTH];
    transpose(square);
    for (int64_t input = 0; input < count && input < LINES; input++)
        if (rows >= LINES) memcpy(out + input * stride, &square[input], sizeof *square);
        else memcpy(out + input * stride, &square[input], rows * sizeof(float));
}

// Multiplies at most TILE rows of weights.
AMX INLINE void multiply(
    const words *inputs, int64_t count, const uint16_t *weights, int64_t rows, int64_t columns,
    float *out, int64_t stride, Room *room
) {
    const int64_t next = (columns + DEEP - 1) / DEEP * PARTS * LINES, most = STEPS * DEEP;
    const int64_t bands = (rows + BAND - 1) / BAND, slices = (columns + most - 1) / most;
    for (int64_t chunk = 0; chunk < count; chunk += CHUNK) {
        const int64_t some = count - chunk < CHUNK ? count - chunk : CHUNK;
        // Rows are read from end to end if what these inputs need for that fits into the cache.
        const int across = some * columns * PARTS * 2 <= LITTLE;
        for (int64_t at = 0; at < bands * slices; at++) {
            const int64_t row = (across ? at / slices : at % bands) * BAND;
            const int64_t k = (across ? at % slices : at / bands) * most;
            const int64_t deep = columns - k < most ? columns - k : most;
            const int64_t steps = (deep + DEEP - 1) / DEEP;
            const uint16_t *from = weights + row * columns;
            const Tiles tiles = tiles_of(from, rows - row, columns, k, deep, room->weights);
            for (int64_t first = 0; first < some; first += PAIR) {
                const words *with = inputs + (chunk + first) / LINES * next;
                words *sums = room->sums + (row * CHUNK + first) / WIDTH, made[4][LINES];
                const int groups = some - first > LINES ? 2 : 1;
                with += k / DEEP * PARTS * LINES;
                if (groups > 1) block(tiles, with, next, steps, 2, made);
                else block(tiles, with, next, steps, 1, made);
                for (int one = 0; one < 2 * groups; one++)
                    add_up(made[one], sums + one % 2 * CHUNK + one / 2, k > 0);
            }
        }
        for (int64_t row = 0; row < rows; row += LINES)
            for (int64_t first = 0; first < some; first += LINES) {
                float *to = out + (chunk + first) * stride + row;
                const words *sums = room->sums + (row * CHUNK + first) / WIDTH;
                write_out(sums, to, stride, some - first, rows - row);
            }
    }
}

// What LDTILECFG reads.
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t lines[16];
} Shapes;

AMX void multiply_split_16(
    const uint16_t *split, int64_t count, const uint16_t *weights, int64_t rows, int64_t columns,
    float *out, int64_t stride, void *room
) {
    Shapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.lines[tile] = LINES;
    _tile_loadconfig(&shapes);
    for (int64_t row = 0; row < rows; row += TILE) {
        const int64_t high = rows - row < TILE ? rows - row : TILE;
        const uint16_t *from = weights + row * columns;
        multiply((const words *)split, count, from, high, columns, out + row, stride, room);
    }
    _tile_release();
}
#endif
