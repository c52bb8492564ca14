// Lets g++ compile CUDA C kernels: force-included before every kernels/*.cu.
// See include/runtime.h for the model and runtime.cpp for the scheduler.
#pragma once

#define CUDA_ON_CPU 1

#include "include/runtime.h"

#include "include/vector_types.h"

#include "include/intrinsics.h"

#include "include/threads.h"

#include "include/tensor_core.h"

// The scan for kernels preprocesses with these words left as they are.
#ifndef CUDA_ON_CPU_SCAN
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __block_size__(...)
#endif
#define __device__
#define __host__
#define __constant__ static
#define __managed__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_assume(condition) ((void)0)
#define __builtin_assume_aligned(p, n) (p)

// A __shared__ array is a thread-local one whose address the module asks of __tls_get_addr. The module brings its own
// __tls_get_addr (register.h), which answers with the running block's copy. `used`: the compiler must not conclude that an
// array nobody writes is full of zeros.
#define __shared__ static thread_local __attribute__((tls_model("global-dynamic"), used))
