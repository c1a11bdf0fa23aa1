// kvt-attn-seen.h - which query row sees which cells of a tile of KV rows.
#pragma once

#include "kvt-attn-simd.h"

#include <algorithm>
#include <cstdint>

static const int KVT_TILE = 64; // KV rows

static_assert(KVT_TILE <= 64, "a bit for each cell");

static const uint16_t KVT_F16_NEG_INF = 0xfc00;

// what a query row keeps from tile to tile, beside its Q and out
struct kvt_row {
    const uint16_t * mask; // null, or of the first KV row on
    float            scale, slope, max, sum;
};

// Which cells of a tile the rows of an item see. What a row gets depends on these alone: the others may hold anything.
struct kvt_seen {
    const kvt_row *  rows;
    const int        n_rows, n; // n cells from ic on
    const int64_t    ic;
    uint16_t * const end;
    bool             any = false, all = true; // any cell of any row, all cells of all rows

    kvt_seen(const kvt_row * rows, int n_rows, int64_t ic, int n, uint16_t * end) : rows(rows), n_rows(n_rows), n(n), ic(ic), end(end) {
        for (int r = 0; r < n_rows; r++) {
            if (!as_before(r)) {
                const int hidden = rows[r].mask ? n_hidden(rows[r].mask + ic) : 0;
                any |= hidden < n;
                all &= hidden == 0;
            }
        }
    }

    // all heads of a token see the same
    bool as_before(int r) const { return r > 0 && rows[r].mask == rows[r - 1].mask; }

    // of whole vectors; null if it changes nothing in row r; valid until the next call
    const uint16_t * mask(int r) const {
        const uint16_t * p = rows[r].mask ? rows[r].mask + ic : nullptr;
        if (n % KVT_VW == 0) {
            return p && !all_zero(p) ? p : nullptr;
        }
        std::fill(end, end + KVT_TILE, KVT_F16_NEG_INF); // the padding is masked
        for (int i = 0; i < n; i++) {
            end[i] = p ? p[i] : 0;
        }
        return end;
    }

    // any of the cells whose bits are set
    bool sees(int r, uint64_t cells) const {
        const uint16_t * p = rows[r].mask ? rows[r].mask + ic : nullptr;
        for (int i = 0; i < n; i++) {
            if (cells >> i & 1 && (!p || p[i] != KVT_F16_NEG_INF)) {
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
