// What a kernel compiled for the CPU asks of the emulator, and how the host starts it.
//
// The model: a CUDA thread is a fiber, a block is a set of fibers, and blocks that must be resident together (a
// cluster, or the whole grid of a cooperative launch) form a group that one OS thread runs. Fibers switch only where a
// CUDA thread would wait, so one order of threads is one deterministic interleaving.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 { unsigned x, y, z; };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace emulator {

// The part of a fiber that kernel code reads without a call.
struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned lane;
  unsigned char* static_shared;   // this block's copy of every __shared__ array of the module
  unsigned char* dynamic_shared;
};

extern thread_local Thread* current __attribute__((tls_model("initial-exec")));

constexpr uint32_t poison_word = 0x7fffffffu;   // a NaN as float, INT_MAX as int: never a plausible value

// ---- failure and spinning
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));
void spin();                       // a thread polls memory: let the others run
long long clock_ticks();           // nanoseconds of processor time of the block

// ---- block barriers; count 0 means every thread of the block that has not exited
enum class Reduce { none, count, all, any };
int block_barrier(Reduce kind, int value, const char* file, int line);   // __syncthreads and its reductions
void named_barrier(unsigned id, unsigned count, bool wait);              // bar.sync / bar.arrive

// ---- warp collectives. Every live lane of `mask` must call with the same mask and operation.
// Deposits `bytes` (at most 32) of `value`; afterwards `all[lane]` holds what each lane gave. Returns the lanes present.
unsigned warp_exchange(unsigned mask, const char* operation, const void* value, unsigned bytes, void* all);
// The same without a copy: what each lane gave, until the caller's next collective.
using LaneSlot = unsigned char[32];
const LaneSlot* warp_deposit(unsigned mask, const char* operation, const void* value, unsigned bytes, unsigned* lanes);
// The same for one source lane; `result` becomes poison when that lane is absent.
void warp_shuffle(unsigned mask, const char* operation, const void* value, unsigned bytes, unsigned source,
                  void* result);
void warp_barrier(unsigned mask);
unsigned warp_live_lanes();

// ---- clusters and the grid
unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive();
void cluster_wait();
void* cluster_map(const void* shared, unsigned rank);    // mapa: the same variable in another block of the cluster
void cluster_access(const void* shared, unsigned bytes);  // a load or store there: its block must still run
void grid_barrier();                                     // cooperative launches only

// ---- shared memory that a whole warp reads or writes at once: 16 bytes that lie in the caller's block
void shared_row(const void* shared, const char* operation);

// ---- asynchronous copies: what they write holds poison until they have ended, which is as late as it can be
void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes);   // cp.async
void async_copy_commit();
void async_copy_wait(unsigned groups_left);
void async_store(void* shared, const void* value, unsigned bytes, uint64_t* mbarrier);      // st.async
void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier);       // cp.async.bulk

// ---- mbarrier: counts threads and bytes, and flips its phase when both are complete
void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_expect(uint64_t* barrier, unsigned bytes);
void mbarrier_arrive(uint64_t* barrier);
bool mbarrier_test(uint64_t* barrier, unsigned parity);   // has the phase of this parity completed?

// ---- memory order, told to ThreadSanitizer; nothing else to do on one core
void fence();

void* static_shared_variable(std::size_t offset);         // AddressSanitizer: every variable has its own heap block

// ---- what a compiled module exports, and what the host passes in
struct Parameter {
  char kind;        // 'p' pointer, 's' scalar, 'o' object passed by value
  char element;     // NumPy character of the pointee or scalar, 'v' when it has none
  bool constant;    // pointer to const
  unsigned size;    // of the parameter itself
};

struct Kernel {
  const char* name;
  void (*call)(void** arguments);
  const Parameter* parameters;
  unsigned parameter_count;
  unsigned max_threads;   // __launch_bounds__, 0 without
  unsigned cluster;       // __cluster_dims__ along x, 0 without
};

struct SharedVariable { unsigned long long offset, bytes; };

enum class Order : int { forward, reverse, eager, shuffled };

struct Launch {
  const Kernel* kernel;
  unsigned grid[3], block[3];
  unsigned dynamic_bytes, static_bytes;
  const SharedVariable* variables;
  unsigned variable_count;
  unsigned cluster;
  int cooperative;
  Order order;
  unsigned long long seed;
  unsigned workers;
  unsigned stack_bytes;
  unsigned spin_limit;      // rounds in which every thread only polls
  double timeout;           // seconds
  int flush_denormals;
  void** arguments;
};

struct Result {
  char* error;              // null: success; else free with emulator_free
  unsigned long long switches;
  double seconds;
};

}  // namespace emulator

extern "C" void emulator_launch(const emulator::Launch* launch, emulator::Result* result);
extern "C" void emulator_free(char* text);
