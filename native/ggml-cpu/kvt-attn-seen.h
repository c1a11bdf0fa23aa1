// kvt-attn-seen.h - which query row sees which cells of a tile of KV rows.
#pragma once

#include "kvt-attn-simd.h"

#include <algorithm>
#include <bitset>
#include <cstdint>

static const int KVT_TILE  = 128; // KV rows, at most
static const int KVT_PART  = 64; // of these, whose weights are rounded together
static const int KVT_PARTS = KVT_TILE / KVT_PART;

// a bit for each cell of a tile
typedef std::bitset<KVT_TILE> kvt_cells;

static const uint16_t KVT_F16_NEG_INF = 0xfc00;

// what a query row keeps from tile to tile, beside its Q and out
struct kvt_row {
    const uint16_t * mask; // null, or of the first KV row on
    float            scale, slope, max, sum;
};

// Which cells of a tile some rows of a group see. What a row gets depends on these alone: the others may hold anything.
struct kvt_seen {
    const kvt_row *  rows;
    int              first, n_rows; // of the group's
    const int        size, n; // cells of a tile; of this one, from ic on
    const int64_t    ic;
    uint16_t * const end;
    bool             any = false, all = true; // any cell of any row, all cells of all rows

    kvt_seen(const kvt_row * rows, int n_rows, int size, int64_t ic, int n, uint16_t * end) : rows(rows), first(0), n_rows(n_rows), size(size), n(n), ic(ic), end(end) {
        for (int r = 0; r < n_rows; r++) {
            if (!as_before(r)) {
                const int hidden = rows[r].mask ? n_hidden(rows[r].mask + ic) : 0;
                any |= hidden < n;
                all &= hidden == 0;
            }
        }
    }

    // of n_rows rows from r on
    kvt_seen part(int r, int n) const {
        kvt_seen x = *this;
        x.rows += r, x.first += r, x.n_rows = n;
        return x;
    }

    // all heads of a token see the same
    bool as_before(int r) const { return r > 0 && rows[r].mask == rows[r - 1].mask; }

    // of a whole tile; null if it changes nothing in row r; valid until the next call
    const uint16_t * mask(int r) const {
        const uint16_t * p = rows[r].mask ? rows[r].mask + ic : nullptr;
        if (n == size) {
            return p && !all_zero(p) ? p : nullptr;
        }
        std::fill(end, end + size, KVT_F16_NEG_INF); // the padding is masked
        for (int i = 0; i < n; i++) {
            end[i] = p ? p[i] : 0;
        }
        return end;
    }

    // any of the cells whose bits are set
    bool sees(int r, const kvt_cells & cells) const {
        const uint16_t * p = rows[r].mask ? rows[r].mask + ic : nullptr;
        for (int i = 0; i < n; i++) {
            if (cells[i] && (!p || p[i] != KVT_F16_NEG_INF)) {
                return true;
            }
        }
        return false;
    }

private:
    int n_hidden(const uint16_t * mask) const {
        uint16_t hidden = 0;
        for (int i = 0; i < n; i++) {
            hidden += mask[i] == KVT_F16_NEG_INF;
        }
        return hidden;
    }

    bool all_zero(const uint16_t * mask) const {
        uint16_t any = 0;
        for (int i = 0; i < n; i++) {
            any |= mask[i];
        }
        return any == 0;
    }
};
