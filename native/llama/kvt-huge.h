// kvt-huge.h - huge pages for a cache
#pragma once

#include "ggml-backend.h"

// asks the kernel for huge pages; of a buffer in the host's memory that nothing was written to yet
void kvt_use_huge_pages(ggml_backend_buffer_t buf);
