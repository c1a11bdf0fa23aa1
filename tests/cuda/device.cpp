// device.cpp - our cache types on a GPU, as ggml runs them there: what is written and read back is the CPU's, and the time it takes
// Prints a line for each check, then tables, unless its argument is "bytes". gpu.py runs it.
#include "kvt-reads-pair.h"
#include "values.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

static int n_fail = 0;

static void check(bool ok, ggml_type type, const char * what) {
    n_fail += !ok;
    printf("%s %s %s\n", ok ? "ok" : "FAIL", ggml_type_name(type), what);
}

struct graph {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_cgraph *           nodes;

    graph() : ctx(ggml_init({ 16u << 20, nullptr, true })), nodes(ggml_new_graph_custom(ctx.get(), 4096, false)) {}

    void alloc(ggml_backend_t backend) {
        buffer.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        if (!buffer) {
            fprintf(stderr, "device: no memory for the tensors of a check. Free some on the GPU.\n");
            exit(2);
        }
    }

    void run(ggml_backend_t backend) {
        if (ggml_backend_graph_compute(backend, nodes) != GGML_STATUS_SUCCESS) {
            fprintf(stderr, "device: the GPU did not compute the graph\n");
            exit(2);
        }
        ggml_backend_synchronize(backend);
    }

    // microseconds of a node: the median of 7 runs after 3
    double us(ggml_backend_t backend, int n_node) {
        std::vector<double> times;
        for (int i = 0; i < 10; i++) {
            const auto t0 = std::chrono::steady_clock::now();
            run(backend);
            times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count());
        }
        std::sort(times.begin() + 3, times.end());
        return times[6]/n_node;
    }
};

template <typename T>
static std::vector<T> read(const ggml_tensor * t) {
    std::vector<T> res(ggml_nbytes(t)/sizeof(T));
    ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));
    return res;
}

//
// bytes and values
//

static const int64_t N_EMBD = 1024; // of K or V of a token: 8 heads of 128

// into a cache, row by row and as a whole, and back to f32
static void check_bytes(ggml_backend_t gpu, ggml_type type) {
    const int64_t n_row = 64;
    const auto    x     = values(N_EMBD*n_row);
    const auto    calm  = tame(x);
    const size_t  row   = ggml_row_size(type, N_EMBD);

    std::vector<int64_t> rows(n_row);
    for (int64_t i = 0; i < n_row; i++) {
        rows[i] = (5*i + 3) % n_row;
    }

    graph g;
    ggml_tensor * src     = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, N_EMBD, n_row);
    ggml_tensor * ids     = ggml_new_tensor_1d(g.ctx.get(), GGML_TYPE_I64, n_row);
    ggml_tensor * cache   = ggml_new_tensor_2d(g.ctx.get(), type, N_EMBD, n_row);
    ggml_tensor * copied  = ggml_new_tensor_2d(g.ctx.get(), type, N_EMBD, n_row);
    ggml_tensor * packed  = ggml_new_tensor_2d(g.ctx.get(), type, N_EMBD, n_row);
    ggml_tensor * back    = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, N_EMBD, n_row);
    ggml_build_forward_expand(g.nodes, ggml_set_rows(g.ctx.get(), cache, src, ids));
    ggml_build_forward_expand(g.nodes, ggml_cpy(g.ctx.get(), src, copied));
    ggml_build_forward_expand(g.nodes, ggml_cpy(g.ctx.get(), packed, back));
    g.alloc(gpu);

    const auto want = encode(type, x);
    const auto tamed = encode(type, calm);
    ggml_backend_tensor_set(src, x.data(), 0, ggml_nbytes(src));
    ggml_backend_tensor_set(ids, rows.data(), 0, ggml_nbytes(ids));
    ggml_backend_tensor_set(packed, tamed.data(), 0, ggml_nbytes(packed));
    g.run(gpu);

    std::vector<uint8_t> moved(want.size());
    for (int64_t i = 0; i < n_row; i++) {
        memcpy(&moved[rows[i]*row], &want[i*row], row);
    }
    const auto values_back = decode(type, tamed);
    check(read<uint8_t>(cache) == moved, type, "set rows: the bytes of the CPU");
    check(read<uint8_t>(copied) == want, type, "copy from f32: the bytes of the CPU");
    check(memcmp(read<float>(back).data(), values_back.data(), ggml_nbytes(back)) == 0, type, "copy to f32: the values of the CPU");
}

//
// time
//

// microseconds to write the K of n tokens of a layer
static double us_of_writing(ggml_backend_t gpu, ggml_type type, int64_t n_token) {
    const int n_node = 100;
    graph g;
    ggml_tensor * src   = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F32, N_EMBD, n_token);
    ggml_tensor * ids   = ggml_new_tensor_1d(g.ctx.get(), GGML_TYPE_I64, n_token);
    ggml_tensor * cache = ggml_new_tensor_2d(g.ctx.get(), type, N_EMBD, n_token);
    for (int i = 0; i < n_node; i++) {
        ggml_build_forward_expand(g.nodes, ggml_set_rows(g.ctx.get(), cache, src, ids));
    }
    g.alloc(gpu);

    std::mt19937 gen(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(N_EMBD*n_token);
    std::generate(x.begin(), x.end(), [&] { return normal(gen); });
    std::vector<int64_t> rows(n_token);
    for (int64_t i = 0; i < n_token; i++) {
        rows[i] = i;
    }
    ggml_backend_tensor_set(src, x.data(), 0, ggml_nbytes(src));
    ggml_backend_tensor_set(ids, rows.data(), 0, ggml_nbytes(ids));
    return g.us(gpu, n_node);
}

// random blocks of a type, over and over: a search for each would take minutes
static const std::vector<uint8_t> & some_blocks(ggml_type type) {
    static std::map<ggml_type, std::vector<uint8_t>> made;
    auto & res = made[type];
    if (res.empty()) {
        std::mt19937 gen(1);
        std::normal_distribution<float> normal;
        std::vector<float> x(1 << 13);
        std::generate(x.begin(), x.end(), [&] { return normal(gen); });
        res = encode(type, x);
    }
    return res;
}

struct shape {
    int64_t head_dim, n_head, n_head_kv, n_kv, n_token;
};

static const shape MAIN[]   = { { 128, 32, 8, 8192, 1 }, { 128, 32, 8, 32768, 1 } };
static const shape OTHERS[] = {
    {  64,  9, 3, 8192, 1 },
    { 128, 28, 4, 8192, 1 },
    { 256,  8, 4, 8192, 1 },
    { 128, 32, 8,  256, 1 },
    { 128, 32, 8, 8192, 2 },
    { 128, 32, 8, 8192, 4 },
    { 128, 32, 8, 8192, 8 },
};

typedef std::vector<std::pair<ggml_type, ggml_type>> type_pairs;

// microseconds of attention over one layer's cache, and its bytes. As many layers as pass the GPU's L2 by far
static double us_of_attention(ggml_backend_t gpu, ggml_type type_k, ggml_type type_v, const shape & s, size_t & bytes) {
    bytes = (ggml_row_size(type_k, s.head_dim) + ggml_row_size(type_v, s.head_dim))*s.n_head_kv*s.n_kv;
    const int n_layer = std::min<size_t>(64, std::max<size_t>(8, (size_t(200) << 20)/bytes));

    graph g;
    ggml_tensor * mask = ggml_new_tensor_2d(g.ctx.get(), GGML_TYPE_F16, s.n_kv, s.n_token);
    ggml_tensor * q    = ggml_new_tensor_3d(g.ctx.get(), GGML_TYPE_F32, s.head_dim, s.n_token, s.n_head);
    std::vector<ggml_tensor *> caches;
    for (int il = 0; il < n_layer; il++) {
        ggml_tensor * kv[2];
        for (int i = 0; i < 2; i++) { // as llama.cpp has it: the heads of a token beside each other
            const ggml_type type = i ? type_v : type_k;
            ggml_tensor * cache = ggml_new_tensor_2d(g.ctx.get(), type, s.head_dim*s.n_head_kv, s.n_kv);
            caches.push_back(cache);
            kv[i] = ggml_view_3d(g.ctx.get(), cache, s.head_dim, s.n_kv, s.n_head_kv, cache->nb[1], ggml_row_size(type, s.head_dim), 0);
        }
        ggml_tensor * out = ggml_flash_attn_ext(g.ctx.get(), q, kv[0], kv[1], mask, 0.125f, 0.0f, 0.0f);
        ggml_build_forward_expand(g.nodes, out);
    }
    g.alloc(gpu);

    for (ggml_tensor * cache : caches) {
        const auto & part = some_blocks(cache->type);
        std::vector<uint8_t> all(ggml_nbytes(cache));
        for (size_t at = 0; at < all.size(); at += part.size()) {
            memcpy(&all[at], part.data(), std::min(part.size(), all.size() - at));
        }
        ggml_backend_tensor_set(cache, all.data(), 0, all.size());
    }
    std::mt19937 gen(2);
    std::normal_distribution<float> normal;
    std::vector<float> query(ggml_nelements(q));
    std::generate(query.begin(), query.end(), [&] { return normal(gen); });
    ggml_backend_tensor_set(q, query.data(), 0, ggml_nbytes(q));
    std::vector<uint16_t> none(ggml_nelements(mask), 0);
    ggml_backend_tensor_set(mask, none.data(), 0, ggml_nbytes(mask));
    return g.us(gpu, n_layer);
}

static void print_attention(ggml_backend_t gpu, const shape & s, const type_pairs & pairs) {
    const ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(gpu));
    const auto reads_pair = (kvt_cuda_reads_pair_t) ggml_backend_reg_get_proc_address(reg, KVT_CUDA_READS_PAIR);
    for (const auto & [type_k, type_v] : pairs) {
        if (reads_pair && !reads_pair(s.head_dim, s.head_dim, type_k, type_v)) {
            continue;
        }
        size_t bytes = 0;
        const double us = us_of_attention(gpu, type_k, type_v, s, bytes);
        printf("attention %d:%d:%d %d %d %s-%s %.1f %.0f\n", int(s.head_dim), int(s.n_head), int(s.n_head_kv), int(s.n_kv), int(s.n_token),
            ggml_type_name(type_k), ggml_type_name(type_v), us, bytes*1e-3/us);
        fflush(stdout);
    }
}

#define OURS(NAME, name, number, n, bits) GGML_TYPE_##NAME,
#define STOCK(NAME) GGML_TYPE_##NAME,

int main(int argc, char ** argv) {
    ggml_backend_load_all();
    ggml_backend_ptr gpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr));
    if (!gpu) {
        fprintf(stderr, "device: ggml finds no GPU. Build with -DGGML_CUDA=ON, and run where there is one.\n");
        return 2;
    }
    printf("# %s\n", ggml_backend_dev_description(ggml_backend_get_device(gpu.get())));

    for (ggml_type type : { KVT_TYPES(OURS) }) {
        check_bytes(gpu.get(), type);
    }

    if (argc > 1 && strcmp(argv[1], "bytes") == 0) { // as compute-sanitizer bears it
        return n_fail > 0;
    }
    printf("# us to write %d values of each of n tokens: type n=1 n=512\n", int(N_EMBD));
    for (ggml_type type : { KVT_CACHE_TYPES(STOCK, OURS) }) {
        printf("write %s %.2f %.2f\n", ggml_type_name(type), us_of_writing(gpu.get(), type, 1), us_of_writing(gpu.get(), type, 512));
    }

    const type_pairs some = {
        { GGML_TYPE_F16, GGML_TYPE_F16 }, { GGML_TYPE_Q8_0, GGML_TYPE_Q8_0 }, { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 },
        { GGML_TYPE_K4_64, GGML_TYPE_T3_64 }, { GGML_TYPE_K3_64, GGML_TYPE_T2_64 },
    };
    type_pairs all = some; // what a K type and a V type take does not depend on each other: each beside one
    for (ggml_type type : { KVT_CACHE_TYPES(STOCK, OURS) }) {
        all.push_back({ type, GGML_TYPE_T2_64 });
        all.push_back({ GGML_TYPE_K3_64, type });
    }
    printf("# us of attention of a layer, GB/s of its cache: head size, heads, KV heads, tokens in the cache, new tokens\n");
    for (const shape & s : MAIN) {
        print_attention(gpu.get(), s, all);
    }
    for (const shape & s : OTHERS) {
        print_attention(gpu.get(), s, some);
    }
    return n_fail > 0;
}
