// emulate.h - enough of CUDA to run our kernels on the host: threads of a block as fibers that meet at every shuffle
#pragma once

#undef _FORTIFY_SOURCE // it would take a jump to another stack for a fault
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static // blocks run after one another

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 { float x, y; };
static inline float2 make_float2(float x, float y) { return { x, y }; }

static dim3 threadIdx(0, 0, 0);
static dim3 blockIdx(0, 0, 0);

struct fiber {
    ucontext_t        context; // where it starts
    jmp_buf           place;   // where it waits: a jump takes no system call, as swapcontext does
    std::vector<char> stack;
    bool              started = false;
    uint32_t          slot[2]; // in turns: a thread may be one shuffle ahead of another, not two
    int               n_shuffle = 0;
    int               n_barrier = 0;
    bool              done      = false;
};

static std::vector<fiber>            fibers;
static ucontext_t                    caller;
static jmp_buf                       scheduler;
static const std::function<void()> * fiber_code;

static void fiber_main() {
    (*fiber_code)();
    fibers[threadIdx.x].done = true;
    _longjmp(scheduler, 1);
}

static void resume(fiber & f) {
    if (_setjmp(scheduler) == 0) {
        if (f.started) {
            _longjmp(f.place, 1);
        }
        f.started = true;
        swapcontext(&caller, &f.context);
    }
}

static void wait(fiber & f) {
    if (_setjmp(f.place) == 0) {
        _longjmp(scheduler, 1);
    }
}

// what a thread of the block has
template <typename T>
static T shuffle(T v, unsigned thread) {
    static_assert(sizeof(T) == 4, "one register");
    const unsigned self = threadIdx.x;
    const int      turn = fibers[self].n_shuffle++ % 2;
    memcpy(&fibers[self].slot[turn], &v, 4);
    wait(fibers[self]); // until every other thread is here
    memcpy(&v, &fibers[thread].slot[turn], 4);
    return v;
}
#define KVT_LANE                  (threadIdx.x % 16)
#define KVT_LANE_OF_WARP          (threadIdx.x % 32)
#define KVT_SHUFFLE(v, bit)       shuffle(v, threadIdx.x ^ (bit))
#define KVT_SHUFFLE_FROM(v, lane) shuffle(v, (threadIdx.x & ~15u) + (lane) % 16)
#define KVT_SHUFFLE_WARP(v, lane) shuffle(v, (threadIdx.x & ~31u) + (lane) % 32)

static void __syncthreads() {
    const unsigned self = threadIdx.x;
    const int      mine = ++fibers[self].n_barrier;
    for (bool all = false; !all; ) {
        wait(fibers[self]);
        all = true;
        for (const auto & f : fibers) {
            all = all && f.n_barrier >= mine;
        }
    }
}

static void run_block(int n_thread, const std::function<void()> & code) {
    fiber_code = &code;
    fibers.assign(n_thread, fiber());
    for (auto & f : fibers) {
        f.stack.resize(64*1024);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        makecontext(&f.context, fiber_main, 0);
    }
    for (bool running = true; running; ) {
        running = false;
        for (threadIdx.x = 0; threadIdx.x < fibers.size(); threadIdx.x++) {
            if (!fibers[threadIdx.x].done) {
                resume(fibers[threadIdx.x]);
                running = running || !fibers[threadIdx.x].done;
            }
        }
    }
    for (size_t i = 0; i < fibers.size(); i++) {
        if (fibers[i].n_shuffle != fibers[i & ~31u].n_shuffle || fibers[i].n_barrier != fibers[0].n_barrier) {
            printf("FAIL threads of a warp took different numbers of shuffles, or those of a block of barriers\n");
            exit(1);
        }
    }
}

// as kernel<<<grid, n_thread>>>
static void launch(dim3 grid, int n_thread, const std::function<void()> & code) {
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++) {
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++) {
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                run_block(n_thread, code);
            }
        }
    }
}
