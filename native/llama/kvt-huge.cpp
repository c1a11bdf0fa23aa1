// kvt-huge.cpp - huge pages for a cache: attention reads all of it for each token, and small pages cost it their addresses
#include "kvt-huge.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

void kvt_use_huge_pages(ggml_backend_buffer_t buf) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!ggml_backend_buffer_is_host(buf)) {
        return;
    }
    const uintptr_t page = 2u << 20, base = (uintptr_t) ggml_backend_buffer_get_base(buf), end = base + ggml_backend_buffer_get_size(buf);
    const uintptr_t from = (base + page - 1) / page * page, to = end / page * page;
    if (from < to) {
        madvise((void *) from, to - from, MADV_HUGEPAGE); // where the kernel has none, pages stay small
    }
#else
    (void) buf;
#endif
}
