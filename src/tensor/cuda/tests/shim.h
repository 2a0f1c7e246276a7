// The kernels as plain C++, for tests on a machine without a GPU: a launch runs its blocks one after the other. A
// kernel with barriers gives each thread of a block a stack of its own and switches between them at every barrier;
// the others are a loop.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
// Tests launch from several threads at once.
#define __shared__ static thread_local

struct Triple { int x, y, z; };
static thread_local Triple threadIdx, blockIdx, blockDim, gridDim;

static inline float __int_as_float(int bits) { float f; memcpy(&f, &bits, 4); return f; }

namespace emulation {
const int MOST = 256, STACK = 64 * 1024;
struct Thread { ucontext_t start; jmp_buf at; bool fresh, done; };
static thread_local Thread threads[MOST];
static thread_local char* stacks = nullptr;
static thread_local ucontext_t home_start;
static thread_local jmp_buf home;
static thread_local int current;
static thread_local void (*body)(void*);
static thread_local void* arguments;

static void enter() {
    body(arguments);
    threads[current].done = true;
    _longjmp(home, 1);
}

// One block whose threads meet at barriers. Every round runs each thread to its next barrier, or to its end.
static void run_block(void (*f)(void*), void* given, int count) {
    if (!stacks) stacks = (char*)malloc((size_t)MOST * STACK);
    body = f;
    arguments = given;
    for (int t = 0; t < count; t++) threads[t].fresh = true, threads[t].done = false;
    for (bool left = true; left;) {
        left = false;
        for (current = 0; current < count; current++) {
            Thread& thread = threads[current];
            if (thread.done) continue;
            threadIdx.x = current;
            if (_setjmp(home) == 0) {
                if (!thread.fresh) _longjmp(thread.at, 1);
                thread.fresh = false;
                getcontext(&thread.start);
                thread.start.uc_stack.ss_sp = stacks + (size_t)current * STACK;
                thread.start.uc_stack.ss_size = STACK;
                thread.start.uc_link = nullptr;
                makecontext(&thread.start, enter, 0);
                setcontext(&thread.start);
            }
            left = left || !thread.done;
        }
    }
}

static void barrier() {
    Thread& thread = threads[current];
    if (_setjmp(thread.at) == 0) _longjmp(home, 1);
    threadIdx.x = current;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
    kernel(*(A*)parameters[I]...);
}

template <class... A>
struct Call { void (*kernel)(A...); void** parameters; };

template <class... A>
void invoke(void* given) {
    auto* c = (Call<A...>*)given;
    call(c->kernel, c->parameters, std::index_sequence_for<A...>());
}

template <class... A>
void launch(void (*kernel)(A...), int barriers, int grid_x, int grid_y, int block, void** parameters) {
    Call<A...> c = {kernel, parameters};
    gridDim = {grid_x, grid_y, 1};
    blockDim = {block, 1, 1};
    for (int y = 0; y < grid_y; y++)
        for (int x = 0; x < grid_x; x++) {
            blockIdx = {x, y, 0};
            threadIdx = {0, 0, 0};
            if (barriers) run_block(invoke<A...>, &c, block);
            else for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++) invoke<A...>(&c);
        }
}
}  // namespace emulation

static inline void __syncthreads() { emulation::barrier(); }

// What a program exports for kernel NAME.
#define EXPORT(NAME, BARRIERS)                                                                        \
    extern "C" void emulate_##NAME(int grid_x, int grid_y, int block, void** parameters) {            \
        emulation::launch(NAME, BARRIERS, grid_x, grid_y, block, parameters);                         \
    }
