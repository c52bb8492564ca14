// The scheduler behind runtime.h. Compiled once, without sanitizers: the weak __tsan_* and __sanitizer_* functions
// exist only inside a sanitized process, and are told there about fibers and barriers.
//
// Waiting threads sleep in the object they wait for and are woken by its completion; only polling threads are run
// again and again. When no thread is ready, no copy is in flight and nobody polls, the launch is deadlocked.
//
// Not modelled: weak memory between blocks (loads and stores take effect at once, in program order), co-residency limits,
// the time anything takes.
#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches fibers with x86-64 Linux assembly"
#endif

#include "include/runtime.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <xmmintrin.h>

#define WEAK extern "C" __attribute__((weak))
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_func_entry(void* return_address);
WEAK void __tsan_func_exit();
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
WEAK void __tsan_read_range(void* address, unsigned long bytes);
WEAK void __tsan_write_range(void* address, unsigned long bytes);
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* bytes);
WEAK void __asan_poison_memory_region(void const volatile* address, size_t bytes);
WEAK void __asan_unpoison_memory_region(void const volatile* address, size_t bytes);
WEAK int __asan_address_is_poisoned(void const volatile* address);

namespace emulator {

thread_local Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

bool under_tsan() { return __tsan_create_fiber != nullptr; }
bool under_asan() { return __sanitizer_start_switch_fiber != nullptr && !under_tsan(); }

void release(void* cookie) { if (under_tsan()) __tsan_release(cookie); }
void acquire(void* cookie) { if (under_tsan()) __tsan_acquire(cookie); }

// memcpy that ThreadSanitizer does not intercept: these bytes are the emulator's own.
struct __attribute__((packed, may_alias)) Word4 { uint32_t v; };
struct __attribute__((packed, may_alias)) Word8 { uint64_t v; };
__attribute__((always_inline)) inline void copy_bytes(void* to, const void* from, unsigned bytes) {
  auto* t = static_cast<volatile unsigned char*>(to);
  auto* f = static_cast<const unsigned char*>(from);
  unsigned i = 0;
  for (; i + 8 <= bytes; i += 8)
    reinterpret_cast<volatile Word8*>(t + i)->v = reinterpret_cast<const Word8*>(f + i)->v;
  if (i + 4 <= bytes) {
    reinterpret_cast<volatile Word4*>(t + i)->v = reinterpret_cast<const Word4*>(f + i)->v;
    i += 4;
  }
  for (; i < bytes; ++i) t[i] = f[i];
}

void poison(void* memory, size_t bytes) {
  auto* p = static_cast<unsigned char*>(memory);
  size_t i = 0;
  for (; i + 4 <= bytes; i += 4) reinterpret_cast<Word4*>(p + i)->v = poison_word;
  for (; i < bytes; ++i) p[i] = reinterpret_cast<const unsigned char*>(&poison_word)[i % 4];
}

// ---------------------------------------------------------------------------------------------- switching stacks
// Saves the registers a call preserves on the old stack, keeps its pointer in *save, and returns on the new one.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;   // AddressSanitizer
  void* tsan = nullptr;
};

void switch_context(Context& from, Context& to, bool from_ends = false) {
  if (under_tsan()) __tsan_switch_to_fiber(to.tsan, 1 /* no happens-before */);
  if (under_asan())
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack_bottom, to.stack_bytes);
  emulator_switch(&from.stack_pointer, to.stack_pointer);
  if (under_asan()) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// Stacks come in slabs, one for the threads of a block, kept for the next block. The stride is not a power of two: equal
// addresses modulo 64 KB would share one cache set. A page that nobody may touch lies below the slab; between the stacks of
// a slab lies a canary, which is looked at when its thread ends.
class StackPool {
 public:
  unsigned char* take(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto& list = free_[bytes];
      if (!list.empty()) { auto* p = list.back(); list.pop_back(); return p; }
    }
    void* p = mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE)) { perror("emulator: stacks"); abort(); }
    return static_cast<unsigned char*>(p) + page;
  }
  void give(unsigned char* slab, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& list = free_[bytes];
    if (list.size() < 64) list.push_back(slab); else munmap(slab - page, page + bytes);
  }

 private:
  std::mutex mutex_;
  static constexpr size_t page = 4096;
  std::map<size_t, std::vector<unsigned char*>> free_;
};
StackPool stack_pool;
constexpr uint64_t canary = 0x5afe57ac5afe57acull;

// Shared memory, poisoned, before a page that nobody may touch. The sanitizers watch the exact end of a heap block.
class SharedPool {
 public:
  unsigned char* take(size_t bytes) {
    void* p = nullptr;
    if (under_asan() || under_tsan()) {
      if (posix_memalign(&p, alignment, std::max<size_t>(bytes, 1))) abort();
    } else {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        auto& list = free_[bytes];
        if (!list.empty()) { p = list.back(); list.pop_back(); }
      }
      if (!p) p = map(bytes);
    }
    poison(p, bytes);
    return static_cast<unsigned char*>(p);
  }
  void give(unsigned char* p, size_t bytes) {
    if (under_asan() || under_tsan()) return free(p);
    std::lock_guard<std::mutex> lock(mutex_);
    auto& list = free_[bytes];
    if (list.size() < 512) list.push_back(p);
    else munmap(p - (pages(bytes) - padded(bytes)) - page, pages(bytes) + 2 * page);
  }
  static bool past_end(const unsigned char* p, size_t bytes, uintptr_t address) {
    const auto end = reinterpret_cast<uintptr_t>(p) + padded(bytes);
    return address >= end && address < end + page;
  }

 private:
  static constexpr size_t page = 4096, alignment = 128;
  static size_t padded(size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }
  static size_t pages(size_t bytes) { return (padded(bytes) + page - 1) / page * page; }
  static void* map(size_t bytes) {
    void* p = mmap(nullptr, pages(bytes) + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { perror("emulator: shared memory"); abort(); }
    auto* first = static_cast<unsigned char*>(p) + page;
    if (bytes && mprotect(first, pages(bytes), PROT_READ | PROT_WRITE)) { perror("emulator: shared memory"); abort(); }
    return first + (pages(bytes) - padded(bytes));
  }
  std::mutex mutex_;
  std::map<size_t, std::vector<unsigned char*>> free_;
};
SharedPool shared_pool;

// ------------------------------------------------------------------------------------------------------ the machine
struct Block;
struct Group;

struct Copy { void* to; const void* from; unsigned bytes, source_bytes; };

struct Fiber : Thread, Context {
  Block* home = nullptr;
  unsigned linear = 0;
  bool done = false;
  const char* waits_for = nullptr;   // what the thread sleeps in, null while it runs or is ready
  unsigned waits_id = 0;
  void* waits_pc = nullptr;
  void* access_pc = nullptr;         // the kernel's place while the runtime touches memory on its behalf
  bool cluster_arrived = false;
  uint64_t cluster_generation = 0;
  std::vector<Copy> open_copies;                  // cp.async since the last commit
  std::vector<std::vector<Copy>> copy_groups;     // committed, oldest first
};

// One rendezvous of the lanes of a mask. Two sets of slots by parity: a lane cannot reach the rendezvous after next
// before every lane has read the last one.
struct Collective {
  unsigned mask = 0, arrived = 0, parity = 0;
  unsigned reading = 0;   // lanes of the last rendezvous that have not yet returned from it
  const char* operation = nullptr;
  alignas(32) LaneSlot slot[2][32];
  unsigned present[2] = {0, 0};
  char cookie[2] = {0, 0};
};

struct Warp {
  unsigned live = 0;
  std::vector<std::unique_ptr<Collective>> collectives;   // one for each mask in use
};

struct Barrier {
  unsigned arrived = 0, count = 0;
  uint64_t generation = 0;
  const char* file = nullptr;
  int line = 0;
  unsigned first = 0;                 // thread that opened this generation
  Reduce kind = Reduce::none;
  int sum[2] = {0, 0};
  char cookie[2] = {0, 0};
  std::vector<Fiber*> waiting;
};

struct Rendezvous {                   // a cluster's barrier, and the grid's
  unsigned live = 0, arrived = 0;
  uint64_t generation = 0;
  char cookie[2] = {0, 0};
  std::vector<Fiber*> waiting;
};

struct Block {
  Group* group = nullptr;
  unsigned rank = 0;                  // in its cluster
  Rendezvous* cluster = nullptr;
  unsigned cluster_first = 0;         // position in the group of the cluster's first block
  unsigned live = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  unsigned char* static_shared = nullptr;
  unsigned char* dynamic_shared = nullptr;
  std::vector<unsigned char*> variables;   // AddressSanitizer: static variables one by one
  unsigned char* stacks = nullptr;
};

struct Store {                        // an st.async or a cp.async.bulk in flight
  Block* block;
  void* to;
  const void* from;                   // null: `value`
  unsigned char value[16];
  unsigned bytes;
  uint64_t* mbarrier;
};

struct Run {                          // one launch
  const Launch* launch = nullptr;
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::condition_variable finished;
  std::string error;
  std::atomic<unsigned> next_group{0};
  unsigned groups = 0, blocks_per_group = 1, running = 0;
  std::atomic<uint64_t> switches{0};
  uintptr_t code_begin = 0, code_end = 0;   // of the kernel's module
};

struct Group {
  Run* run = nullptr;
  const Launch* launch = nullptr;
  Context host;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Rendezvous>> clusters;
  Rendezvous grid;
  unsigned live = 0;
  std::vector<Fiber*> round, ready, polling;
  size_t at = 0;
  unsigned idle_rounds = 0;
  std::vector<Store> stores;
  std::mt19937_64 random;
  uint64_t switches = 0;
};

thread_local Group* active __attribute__((tls_model("initial-exec"))) = nullptr;
thread_local void* signal_pc = nullptr;
thread_local uintptr_t signal_address = 0;
thread_local int signal_number = 0;

Fiber* self() { return static_cast<Fiber*>(current); }

// -------------------------------------------------------------------------------------------------- text for failures
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  char line[1024];
  va_list list;
  va_start(list, text);
  vsnprintf(line, sizeof line, text, list);
  va_end(list);
  return line;
}

std::string at_code(void* pc) {   // "<file+0xoffset>", which the Python side turns into file:line
  Dl_info info;
  if (!pc || !dladdr(pc, &info)) return "";
  return format(" <%s+0x%llx>", info.dli_fname,
                static_cast<unsigned long long>(static_cast<char*>(pc) - static_cast<char*>(info.dli_fbase)));
}

std::string name_thread(const Fiber* f) {
  return format("block (%u,%u,%u) thread (%u,%u,%u)", f->block.x, f->block.y, f->block.z, f->thread.x, f->thread.y,
                f->thread.z);
}

void fail(Group* g, const std::string& text) {
  std::lock_guard<std::mutex> lock(g->run->mutex);
  if (!g->run->failed.exchange(true)) g->run->error = format("kernel %s: ", g->launch->kernel->name) + text;
}

std::string who_waits(Group* g) {
  std::string out;
  for (auto& b : g->blocks) {
    struct Line { unsigned count = 0; std::string threads; unsigned last = 0, begin = 0; };
    std::map<std::string, Line> lines;
    unsigned exited = 0;
    for (auto& f : b->fibers) {
      if (f.done) { ++exited; continue; }
      std::string what = f.waits_for ? f.waits_for : "polling";
      if (f.waits_for && f.waits_id) what += format(" %u", f.waits_id);
      what += at_code(f.waits_pc);
      Line& l = lines[what];
      if (l.count && f.linear == l.last + 1) {
        l.last = f.linear;
      } else {
        if (l.count) l.threads += l.begin == l.last ? format("%u,", l.begin) : format("%u-%u,", l.begin, l.last);
        l.begin = l.last = f.linear;
      }
      ++l.count;
    }
    auto& index = b->fibers[0].block;
    for (auto& [what, l] : lines) {
      l.threads += l.begin == l.last ? format("%u", l.begin) : format("%u-%u", l.begin, l.last);
      out += format("\n  block (%u,%u,%u): threads %s wait at ", index.x, index.y, index.z, l.threads.c_str()) + what;
    }
    if (exited && !lines.empty()) out += format("\n  block (%u,%u,%u): %u threads have exited", index.x, index.y, index.z,
                                                exited);
    if (out.size() > 6000) { out += "\n  ..."; break; }
  }
  return out;
}

// ------------------------------------------------------------------------------------------------------- scheduling
void wake(Group* g, Fiber* f) {
  f->waits_for = nullptr;
  f->waits_id = 0;
  g->ready.push_back(f);
  g->idle_rounds = 0;
}

void wake_all(Group* g, std::vector<Fiber*>& waiting) {
  auto sort = [&](auto before) {   // fibers of a block lie in one array
    if (!std::is_sorted(waiting.begin(), waiting.end(), before)) std::sort(waiting.begin(), waiting.end(), before);
  };
  if (g->launch->order == Order::forward) sort(std::less<Fiber*>());
  if (g->launch->order == Order::reverse) sort(std::greater<Fiber*>());
  for (Fiber* f : waiting) wake(g, f);
  waiting.clear();
}

void deliver(Group* g, const Store& s);   // below, with the mbarriers

// Asynchronous stores land between rounds: all of them, or in shuffled order each with probability one half.
bool deliver_stores(Group* g, bool all) {
  if (g->stores.empty()) return false;
  std::vector<Store> later, now;
  if (g->launch->order == Order::shuffled) std::shuffle(g->stores.begin(), g->stores.end(), g->random);
  for (auto& s : g->stores) (all || g->launch->order != Order::shuffled || (g->random() & 1) ? now : later).push_back(s);
  g->stores.swap(later);
  for (auto& s : now) deliver(g, s);
  if (!now.empty()) g->idle_rounds = 0;
  return !now.empty();
}

// The next fiber to run, or null: back to the host, because all is done, failed or stuck.
Fiber* pick(Group* g) {
  if (g->run->failed.load(std::memory_order_relaxed)) return nullptr;
  const bool eager = g->launch->order == Order::eager;
  for (;;) {
    if (eager && !g->ready.empty()) {   // newest first: one warp runs as far ahead as the barriers let it
      Fiber* f = g->ready.back();
      g->ready.pop_back();
      return f;
    }
    if (!eager && g->at < g->round.size()) return g->round[g->at++];
    deliver_stores(g, eager);
    if (g->ready.empty() && g->polling.empty()) {
      if (deliver_stores(g, true)) continue;
      return nullptr;
    }
    if (g->ready.empty() && ++g->idle_rounds > g->launch->spin_limit) {
      fail(g, format("threads poll in vain: %u rounds without progress", g->launch->spin_limit) +
                  (g->launch->cooperative ? "" : " (the launch is not cooperative: blocks run one after the other)") +
                  who_waits(g));
      return nullptr;
    }
    if (eager) {
      g->ready.assign(g->polling.rbegin(), g->polling.rend());
      g->polling.clear();
      continue;
    }
    g->round.swap(g->ready);
    g->round.insert(g->round.end(), g->polling.begin(), g->polling.end());
    g->ready.clear();
    g->polling.clear();
    g->at = 0;
    if (g->launch->order == Order::shuffled) std::shuffle(g->round.begin(), g->round.end(), g->random);
  }
}

// Runs somebody else; returns when this fiber is picked again.
void leave(Fiber* f, bool ends = false) {
  Group* g = active;
  Fiber* next = pick(g);
  if (next == f) return;
  ++g->switches;
  current = next;
  switch_context(*f, next ? static_cast<Context&>(*next) : g->host, ends);
}

void sleep_in(Fiber* f, const char* what, unsigned id, void* pc) {
  f->waits_for = what;
  f->waits_id = id;
  f->waits_pc = pc;
  leave(f);
}

[[noreturn]] void stop(const std::string& text) {
  Fiber* f = self();
  fail(active, text);
  leave(f, true);
  abort();   // a failed launch resumes nobody
}

// ----------------------------------------------------------------------------------------- completing what waits
void complete(Group* g, Block* b, Barrier& bar) {
  bar.arrived = 0;
  ++bar.generation;
  bar.sum[bar.generation & 1] = 0;
  wake_all(g, bar.waiting);
}

void check_barrier(Group* g, Block* b, Barrier& bar) {
  if (bar.arrived && bar.arrived >= (bar.count ? bar.count : b->live)) complete(g, b, bar);
}

void check_collective(Group* g, Block* b, unsigned warp, Collective& c) {
  if (!c.arrived || (c.mask & b->warps[warp].live & ~c.arrived)) return;
  c.present[c.parity] = c.reading = c.arrived;
  c.arrived = 0;
  c.parity ^= 1;
  const bool down = g->launch->order == Order::reverse;
  for (unsigned i = 0; i < 32; ++i) {
    unsigned index = warp * 32 + (down ? 31 - i : i);
    if (index >= b->fibers.size() || !(c.present[c.parity ^ 1] >> (index & 31) & 1)) continue;
    Fiber& f = b->fibers[index];
    if (f.waits_for) wake(g, &f);
  }
}

void check_rendezvous(Group* g, Rendezvous& r) {
  if (!r.arrived || r.arrived < r.live) return;
  r.arrived = 0;
  ++r.generation;
  wake_all(g, r.waiting);
}

void thread_exits(Fiber* f) {
  Block* b = f->home;
  Group* g = b->group;
  f->done = true;
  if (f->cluster_arrived) --b->cluster->arrived;   // arrived and left: counted once, by leaving
  --g->live;
  --b->live;
  --b->cluster->live;
  --g->grid.live;
  Warp& w = b->warps[f->linear / 32];
  w.live &= ~(1u << f->lane);
  for (auto& c : w.collectives) check_collective(g, b, f->linear / 32, *c);
  check_barrier(g, b, b->barriers[0]);
  check_rendezvous(g, *b->cluster);
  check_rendezvous(g, g->grid);
  g->idle_rounds = 0;
  if (b->live == 0) {   // its shared memory is gone: a late read from the cluster shall see it
    if (!b->variables.empty()) {
      for (unsigned i = 0; i < g->launch->variable_count; ++i) poison(b->variables[i], g->launch->variables[i].bytes);
    } else {
      poison(b->static_shared, g->launch->static_bytes);
    }
    poison(b->dynamic_shared, g->launch->dynamic_bytes);
  }
}

extern "C" void emulator_fiber_main() {
  Fiber* f = self();
  if (under_asan()) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  const Launch* launch = active->launch;
  launch->kernel->call(launch->arguments);
  f = self();
  release(&active->host);
  if (*static_cast<const uint64_t*>(f->stack_bottom) != canary) stop(name_thread(f) + ": stack overflow");
  thread_exits(f);
  leave(f, true);
  abort();
}

// -------------------------------------------------------------------------------------------------- memory of a block
size_t stack_stride(const Launch* l) { return l->stack_bytes + 17 * 64; }

void open_block(Group* g, Block* b, unsigned number, unsigned position) {
  const Launch* l = g->launch;
  const unsigned threads = l->block[0] * l->block[1] * l->block[2];
  b->group = g;
  b->live = threads;
  b->rank = number % l->cluster;   // clusters lie along x
  b->cluster_first = position - position % l->cluster;
  b->cluster = g->clusters[position / l->cluster].get();
  b->static_shared = shared_pool.take(l->static_bytes);
  b->dynamic_shared = shared_pool.take(l->dynamic_bytes);
  if (under_asan())
    for (unsigned i = 0; i < l->variable_count; ++i) b->variables.push_back(shared_pool.take(l->variables[i].bytes));
  b->warps.resize((threads + 31) / 32);
  b->fibers = std::vector<Fiber>(threads);
  const size_t stride = stack_stride(l);
  b->stacks = stack_pool.take(stride * threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b->fibers[i];
    f.thread = {i % l->block[0], i / l->block[0] % l->block[1], i / (l->block[0] * l->block[1])};
    f.block = {number % l->grid[0], number / l->grid[0] % l->grid[1], number / (l->grid[0] * l->grid[1])};
    f.block_dim = dim3(l->block[0], l->block[1], l->block[2]);
    f.grid_dim = dim3(l->grid[0], l->grid[1], l->grid[2]);
    f.lane = i & 31;
    f.static_shared = b->static_shared;
    f.dynamic_shared = b->dynamic_shared;
    f.home = b;
    f.linear = i;
    b->warps[i / 32].live |= 1u << f.lane;
    unsigned char* bottom = b->stacks + i * stride;
    if (under_asan()) __asan_unpoison_memory_region(bottom, stride);
    *reinterpret_cast<uint64_t*>(bottom) = canary;
    f.stack_bottom = bottom;
    f.stack_bytes = l->stack_bytes;
    auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(bottom) + l->stack_bytes) & ~uintptr_t(15));
    *--top = nullptr;                                              // where emulator_fiber_main would return to
    *--top = reinterpret_cast<void*>(&emulator_fiber_main);
    for (int r = 0; r < 6; ++r) *--top = nullptr;                  // the registers emulator_switch restores
    f.stack_pointer = top;
    if (under_tsan()) f.tsan = __tsan_create_fiber(0);
  }
}

void close_block(Group* g, Block* b) {
  if (under_tsan()) for (auto& f : b->fibers) __tsan_destroy_fiber(f.tsan);
  stack_pool.give(b->stacks, stack_stride(g->launch) * b->fibers.size());
  shared_pool.give(b->static_shared, g->launch->static_bytes);
  shared_pool.give(b->dynamic_shared, g->launch->dynamic_bytes);
  for (unsigned i = 0; i < b->variables.size(); ++i) shared_pool.give(b->variables[i], g->launch->variables[i].bytes);
}

void run_group(Run* run, unsigned number) {
  Group g;
  g.run = run;
  g.launch = run->launch;
  const Launch* l = run->launch;
  g.random.seed(l->seed * 1000003u + number);
  const unsigned blocks = run->blocks_per_group;
  const unsigned threads = l->block[0] * l->block[1] * l->block[2];
  for (unsigned i = 0; i < blocks / l->cluster; ++i) {
    g.clusters.push_back(std::make_unique<Rendezvous>());
    g.clusters.back()->live = l->cluster * threads;
  }
  g.live = g.grid.live = blocks * threads;
  if (under_tsan()) g.host.tsan = __tsan_get_current_fiber();
  if (under_asan()) {
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &g.host.stack_bytes);
    pthread_attr_destroy(&attributes);
    g.host.stack_bottom = bottom;
  }
  for (unsigned i = 0; i < blocks; ++i) {
    g.blocks.push_back(std::make_unique<Block>());
    open_block(&g, g.blocks.back().get(), number * blocks + i, i);
    for (auto& f : g.blocks.back()->fibers) g.ready.push_back(&f);
  }
  if (l->order == Order::reverse || l->order == Order::eager) std::reverse(g.ready.begin(), g.ready.end());
  active = &g;
  if (Fiber* first = pick(&g)) {
    current = first;
    switch_context(g.host, *first);
  }
  current = nullptr;
  if (g.live && !run->failed) fail(&g, "deadlock: no thread can run" + who_waits(&g));
  active = nullptr;
  acquire(&g.host);
  for (auto& b : g.blocks) close_block(&g, b.get());
  run->switches += g.switches;
}

// ------------------------------------------------------------------------------- wrong addresses and endless loops
// A signal inside a kernel moves the fiber to `landing`, which reports the fault like any other.
[[noreturn]] __attribute__((noinline)) void landing() {
  Fiber* f = self();
  std::string what;
  if (signal_number == SIGSEGV || signal_number == SIGBUS) {
    what = signal_address ? format("invalid memory access at %p", reinterpret_cast<void*>(signal_address))
                          : std::string("invalid or misaligned memory access");
    auto* bottom = static_cast<const unsigned char*>(f->stack_bottom);
    if (signal_address && signal_address + 4096 > reinterpret_cast<uintptr_t>(bottom) &&
        signal_address < reinterpret_cast<uintptr_t>(bottom) + 4096)
      what += " (stack overflow)";
    for (const bool dynamic : {false, true}) {
      const size_t bytes = dynamic ? active->launch->dynamic_bytes : active->launch->static_bytes;
      if (SharedPool::past_end(dynamic ? f->dynamic_shared : f->static_shared, bytes, signal_address))
        what += format(" (past the %zu bytes of %s shared memory)", bytes, dynamic ? "dynamic" : "static");
    }
  } else if (signal_number == SIGFPE) {
    what = "integer division by zero";
  } else if (signal_number == SIGILL) {
    what = "trap";
  } else {
    what = format("time-out: the thread ran for %.1f s without waiting for another", active->launch->timeout);
  }
  const auto pc = reinterpret_cast<uintptr_t>(signal_pc);
  const Run* run = active->run;
  const bool in_kernel = pc >= run->code_begin && pc < run->code_end;
  stop(name_thread(f) + ": " + what + at_code(in_kernel || !f->access_pc ? signal_pc : f->access_pc));
}

struct sigaction previous[65];

void on_signal(int number, siginfo_t* info, void* raw) {
  auto* context = static_cast<ucontext_t*>(raw);
  auto& registers = context->uc_mcontext.gregs;
  const auto pc = static_cast<uintptr_t>(registers[REG_RIP]);
  Run* run = active ? active->run : nullptr;
  if (number == SIGUSR2) {   // time-out: only where no lock can be held, else the host asks again
    if (!run || !current || pc < run->code_begin || pc >= run->code_end) return;
  } else if (!run || !current) {
    sigaction(number, &previous[number], nullptr);   // not ours: happens again under the old handler
    return;
  }
  signal_number = number;
  signal_pc = reinterpret_cast<void*>(pc);
  signal_address = number == SIGUSR2 ? 0 : reinterpret_cast<uintptr_t>(info->si_addr);
  Fiber* f = self();
  const auto top = (reinterpret_cast<uintptr_t>(f->stack_bottom) + f->stack_bytes) & ~uintptr_t(15);
  registers[REG_RSP] = static_cast<greg_t>(top - 8);
  registers[REG_RIP] = reinterpret_cast<greg_t>(&landing);
}

const int caught[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGUSR2};
std::mutex handler_mutex;
int handler_users = 0;

void install_handlers(bool install) {
  std::lock_guard<std::mutex> lock(handler_mutex);
  if (install ? handler_users++ : --handler_users) return;
  for (int s : caught) {
    if (!install) { sigaction(s, &previous[s], nullptr); continue; }
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(s, &action, &previous[s]);
  }
}

int find_code(struct dl_phdr_info* info, size_t, void* raw) {
  Run* run = static_cast<Run*>(raw);
  const auto call = reinterpret_cast<uintptr_t>(run->launch->kernel->call);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& p = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + p.p_vaddr;
    if (p.p_type == PT_LOAD && (p.p_flags & PF_X) && call >= begin && call < begin + p.p_memsz) {
      run->code_begin = begin;
      run->code_end = begin + p.p_memsz;
      return 1;
    }
  }
  return 0;
}

void work(Run* run) {
  const unsigned mode = _mm_getcsr();
  if (run->launch->flush_denormals) _mm_setcsr(mode | 0x8040);   // like -ftz=true
  for (unsigned i; !run->failed && (i = run->next_group++) < run->groups;) run_group(run, i);
  _mm_setcsr(mode);
}

void worker(Run* run) {
  std::vector<unsigned char> alternate(64 << 10);   // signals run here: a fiber's stack may be the problem
  stack_t stack = {};
  stack.ss_sp = alternate.data();
  stack.ss_size = alternate.size();
  sigaltstack(&stack, nullptr);
  work(run);
  stack.ss_flags = SS_DISABLE;
  sigaltstack(&stack, nullptr);
  std::lock_guard<std::mutex> lock(run->mutex);
  --run->running;
  run->finished.notify_all();
}

void run_on_workers(Run* run) {
  install_handlers(true);
  const unsigned count = std::max(1u, std::min(run->launch->workers, run->groups));
  run->running = count;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < count; ++i) threads.emplace_back(worker, run);
  auto wait = std::chrono::duration<double>(run->launch->timeout);
  {
    std::unique_lock<std::mutex> lock(run->mutex);
    while (!run->finished.wait_for(lock, wait, [&] { return run->running == 0; })) {
      for (auto& t : threads) pthread_kill(t.native_handle(), SIGUSR2);
      wait = std::chrono::duration<double>(0.003);
    }
  }
  for (auto& t : threads) t.join();
  install_handlers(false);
}

}  // namespace

// ------------------------------------------------------------------------------------------- what kernels call
#define CALLER __builtin_extract_return_addr(static_cast<char*>(__builtin_return_address(0)) - 1)

void fault(const char* text, ...) {
  char line[1024];
  va_list list;
  va_start(list, text);
  vsnprintf(line, sizeof line, text, list);
  va_end(list);
  stop(name_thread(self()) + ": " + line + at_code(CALLER));
}

void spin() {
  Fiber* f = self();
  f->waits_pc = CALLER;
  active->polling.push_back(f);
  leave(f);
}

// The block's own processor time: a wait gives up after so much work, however busy the machine is.
long long clock_ticks() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return 1000000000ll * t.tv_sec + t.tv_nsec;
}

int block_barrier(Reduce kind, int value, const char* file, int line) {
  Fiber* f = self();
  Block* b = f->home;
  Barrier& bar = b->barriers[0];
  void* pc = CALLER;
  if (!bar.arrived) {
    bar.file = file;
    bar.line = line;
    bar.first = f->linear;
    bar.kind = kind;
    bar.count = 0;
  } else if (bar.line != line || bar.kind != kind || strcmp(bar.file, file)) {
    stop(format("divergent __syncthreads() in block (%u,%u,%u): thread %u waits at %s:%d, thread %u came to %s:%d",
                f->block.x, f->block.y, f->block.z, bar.first, bar.file, bar.line, f->linear, file, line));
  }
  const uint64_t generation = bar.generation;
  const unsigned parity = generation & 1;
  release(&bar.cookie[parity]);
  bar.sum[parity] += value != 0;
  ++bar.arrived;
  // Threads that left early do not vote: __syncthreads_and is over those still here.
  if (bar.arrived >= b->live) {
    const int all = bar.arrived;
    if (kind == Reduce::all) bar.sum[parity] = bar.sum[parity] == all;
    complete(b->group, b, bar);
  } else {
    bar.waiting.push_back(f);
    sleep_in(f, "__syncthreads()", 0, pc);
  }
  acquire(&bar.cookie[parity]);
  const int sum = bar.sum[parity];
  return kind == Reduce::any ? sum != 0 : sum;
}

void named_barrier(unsigned id, unsigned count, bool wait) {
  Fiber* f = self();
  Block* b = f->home;
  void* pc = CALLER;
  if (id >= 16) stop(name_thread(f) + format(": barrier %u: there are 16", id) + at_code(pc));
  if (count == 0 || count % 32 || count > b->fibers.size())
    stop(name_thread(f) + format(": barrier %u counts %u threads: not a multiple of 32 within the block", id, count) +
         at_code(pc));
  Barrier& bar = b->barriers[id];
  if (bar.arrived && bar.count != count)
    stop(name_thread(f) + format(": barrier %u counts %u threads here and %u elsewhere", id, count, bar.count) +
         at_code(pc));
  bar.count = count;
  const unsigned parity = bar.generation & 1;
  release(&bar.cookie[parity]);
  ++bar.arrived;
  if (bar.arrived >= count) {
    complete(b->group, b, bar);
  } else if (wait) {
    bar.waiting.push_back(f);
    sleep_in(f, "named barrier", id, pc);
  }
  if (wait) acquire(&bar.cookie[parity]);
}

namespace {

Collective& meet(Fiber* f, unsigned mask, const char* operation, const void* value, unsigned bytes, unsigned& parity,
                 void* pc) {
  Block* b = f->home;
  Warp& w = b->warps[f->linear / 32];
  if (!(mask >> f->lane & 1))
    stop(name_thread(f) + format(": %s with mask 0x%08x, which leaves out the calling lane %u", operation, mask, f->lane) +
         at_code(pc));
  Collective* c = nullptr;
  for (auto& known : w.collectives) if (known->mask == mask) { c = known.get(); break; }
  if (!c) {
    for (auto& known : w.collectives) if (!known->arrived && !known->reading) { c = known.get(); break; }
    if (!c) {
      w.collectives.push_back(std::make_unique<Collective>());
      c = w.collectives.back().get();
    }
    c->mask = mask;
  }
  if (c->arrived && c->operation != operation && strcmp(c->operation, operation))
    stop(name_thread(f) + format(": %s meets %s of another lane of its warp", operation, c->operation) + at_code(pc));
  c->operation = operation;
  parity = c->parity;
  copy_bytes(c->slot[parity][f->lane], value, bytes);
  c->arrived |= 1u << f->lane;
  const bool memory = bytes == 0;   // only __syncwarp orders memory
  if (memory) release(&c->cookie[parity]);
  if (c->mask & w.live & ~c->arrived) sleep_in(f, operation, 0, pc);
  else check_collective(b->group, b, f->linear / 32, *c);
  if (memory) acquire(&c->cookie[parity]);
  c->reading &= ~(1u << f->lane);   // the caller reads its slots before it can be switched away
  return *c;
}

}  // namespace

unsigned warp_exchange(unsigned mask, const char* operation, const void* value, unsigned bytes, void* all) {
  unsigned parity;
  Collective& c = meet(self(), mask, operation, value, bytes, parity, CALLER);
  for (unsigned lane = 0; lane < 32; ++lane)
    copy_bytes(static_cast<unsigned char*>(all) + lane * bytes, c.slot[parity][lane], bytes);
  return c.present[parity];
}

const LaneSlot* warp_deposit(unsigned mask, const char* operation, const void* value, unsigned bytes, unsigned* lanes) {
  unsigned parity;
  Collective& c = meet(self(), mask, operation, value, bytes, parity, CALLER);
  *lanes = c.present[parity];
  return c.slot[parity];
}

void warp_shuffle(unsigned mask, const char* operation, const void* value, unsigned bytes, unsigned source, void* result) {
  unsigned parity;
  Collective& c = meet(self(), mask, operation, value, bytes, parity, CALLER);
  if (c.present[parity] >> source & 1) copy_bytes(result, c.slot[parity][source], bytes);
  else poison(result, bytes);
}

void warp_barrier(unsigned mask) {
  unsigned parity;
  meet(self(), mask, "__syncwarp()", nullptr, 0, parity, CALLER);
}

unsigned warp_live_lanes() { return self()->home->warps[self()->linear / 32].live; }

unsigned cluster_rank() { return self()->home->rank; }
unsigned cluster_size() { return active->launch->cluster; }

namespace {

// The block of the caller's cluster whose shared memory holds `p`, or null. `offset` counts within the variable's region.
Block* owner(const void* p, unsigned& variable, size_t& offset) {
  Block* home = self()->home;
  const Launch* l = active->launch;
  auto inside = [&](unsigned char* begin, size_t bytes) {
    auto* q = static_cast<const unsigned char*>(p);
    if (!begin || q < begin || q >= begin + bytes) return false;
    offset = q - begin;
    return true;
  };
  for (unsigned i = 0; i < l->cluster; ++i) {
    Block* b = active->blocks[home->cluster_first + i].get();
    variable = ~0u;
    if (inside(b->dynamic_shared, l->dynamic_bytes)) return b;
    variable = ~1u;
    if (b->variables.empty() && inside(b->static_shared, l->static_bytes)) return b;
    for (variable = 0; variable < b->variables.size(); ++variable)
      if (inside(b->variables[variable], l->variables[variable].bytes)) return b;
  }
  return nullptr;
}

}  // namespace

void shared_row(const void* shared, const char* operation) {
  Fiber* f = self();
  unsigned variable;
  size_t offset;
  if (owner(shared, variable, offset) != f->home || owner(static_cast<const char*>(shared) + 15, variable, offset) != f->home)
    stop(name_thread(f) + format(": %s of a row outside the block's shared memory", operation) + at_code(CALLER));
  if (reinterpret_cast<uintptr_t>(shared) % 16)
    stop(name_thread(f) + format(": %s of a row that is not aligned to 16 bytes", operation) + at_code(CALLER));
}

void cluster_arrive() {
  Fiber* f = self();
  Rendezvous& r = *f->home->cluster;
  if (f->cluster_arrived) stop(name_thread(f) + ": arrives twice at the cluster barrier without a wait" + at_code(CALLER));
  f->cluster_arrived = true;
  f->cluster_generation = r.generation;
  release(&r.cookie[r.generation & 1]);
  ++r.arrived;
  check_rendezvous(f->home->group, r);
}

void cluster_wait() {
  Fiber* f = self();
  Rendezvous& r = *f->home->cluster;
  if (!f->cluster_arrived) stop(name_thread(f) + ": waits for the cluster barrier without arriving" + at_code(CALLER));
  if (r.generation == f->cluster_generation) {
    r.waiting.push_back(f);
    sleep_in(f, "cluster barrier", 0, CALLER);
  }
  f->cluster_arrived = false;
  acquire(&r.cookie[f->cluster_generation & 1]);
}

void* cluster_map(const void* shared, unsigned rank) {
  Fiber* f = self();
  if (rank >= active->launch->cluster)
    stop(name_thread(f) + format(": rank %u in a cluster of %u", rank, active->launch->cluster) + at_code(CALLER));
  unsigned variable;
  size_t offset;
  if (!owner(shared, variable, offset)) stop(name_thread(f) + ": mapa of an address outside shared memory" + at_code(CALLER));
  Block* b = active->blocks[f->home->cluster_first + rank].get();
  if (!b->live) stop(name_thread(f) + format(": block of rank %u has exited", rank) + at_code(CALLER));
  if (variable == ~0u) return b->dynamic_shared + offset;
  if (variable == ~1u) return b->static_shared + offset;
  return b->variables[variable] + offset;
}

void cluster_access(const void* shared, unsigned bytes) {
  Fiber* f = self();
  unsigned variable;
  size_t offset;
  Block* b = owner(shared, variable, offset);
  if (!b) stop(name_thread(f) + ": access to the cluster outside shared memory" + at_code(CALLER));
  if (!b->live) stop(name_thread(f) + ": access to shared memory of a block that has exited" + at_code(CALLER));
  if (reinterpret_cast<uintptr_t>(shared) % bytes)
    stop(name_thread(f) + ": access to the cluster at a misaligned address" + at_code(CALLER));
}

void grid_barrier() {
  Fiber* f = self();
  Rendezvous& r = active->grid;
  if (!active->launch->cooperative) stop(name_thread(f) + ": grid barrier in a launch that is not cooperative" + at_code(CALLER));
  const uint64_t generation = r.generation;
  release(&r.cookie[generation & 1]);
  ++r.arrived;
  if (r.arrived >= r.live) {
    check_rendezvous(f->home->group, r);
  } else {
    r.waiting.push_back(f);
    sleep_in(f, "grid barrier", 0, CALLER);
  }
  acquire(&r.cookie[generation & 1]);
}

namespace {

// Reads the ends of a copy's source now, so that a report of a wrong address shows this call.
void probe(Fiber* f, const void* global, unsigned bytes, void* pc) {
  if (!bytes) return;
  auto* p = static_cast<const volatile unsigned char*>(global);
  f->access_pc = pc;
  (void)p[0];
  (void)p[bytes - 1];
  f->access_pc = nullptr;
  if (!under_asan()) return;
  for (unsigned i = 0; i < bytes; ++i)
    if (__asan_address_is_poisoned(p + i)) stop(name_thread(f) + ": asynchronous copy reads out of bounds" + at_code(pc));
}

// What an asynchronous write will fill is undefined until it has ended. To ThreadSanitizer somebody else does it, whom only
// the mbarrier orders before others.
void in_flight(Fiber* f, const Store& s, void* pc) {
  if (under_tsan()) {
    char token = 0;
    release(&token);
    void* engine = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(engine, 1);
    acquire(&token);
    __tsan_func_entry(static_cast<char*>(pc) + 1);   // the report names the kernel's line
    if (s.from) __tsan_read_range(const_cast<void*>(s.from), s.bytes);
    __tsan_write_range(s.to, s.bytes);
    __tsan_func_exit();
    release(s.mbarrier);
    __tsan_switch_to_fiber(f->tsan, 1);
    __tsan_destroy_fiber(engine);
  }
  poison(s.to, s.bytes);
  active->stores.push_back(s);
}

}  // namespace

void async_copy(void* shared, const void* global, unsigned bytes, unsigned source_bytes) {
  Fiber* f = self();
  const auto bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes > bytes)
    stop(name_thread(f) + format(": cp.async of %u bytes from %u", bytes, source_bytes) + at_code(CALLER));
  if (bits % bytes) stop(name_thread(f) + format(": cp.async of %u bytes at a misaligned address", bytes) + at_code(CALLER));
  unsigned variable;
  size_t offset;
  if (owner(shared, variable, offset) != f->home ||
      owner(static_cast<char*>(shared) + bytes - 1, variable, offset) != f->home)
    stop(name_thread(f) + ": cp.async to an address outside the block's shared memory" + at_code(CALLER));
  probe(f, global, source_bytes, CALLER);
  if (under_tsan()) {   // it may happen at once, or at the wait
    __tsan_read_range(const_cast<void*>(global), source_bytes);
    __tsan_write_range(shared, bytes);
  }
  poison(shared, bytes);
  f->open_copies.push_back({shared, global, bytes, source_bytes});
}

void async_copy_commit() {
  Fiber* f = self();
  f->copy_groups.push_back(std::move(f->open_copies));
  f->open_copies.clear();
}

void async_copy_wait(unsigned groups_left) {
  Fiber* f = self();
  while (f->copy_groups.size() > groups_left) {
    for (auto& c : f->copy_groups.front()) {
      if (under_tsan()) {
        __tsan_read_range(const_cast<void*>(c.from), c.source_bytes);
        __tsan_write_range(c.to, c.bytes);
      }
      unsigned char value[16] = {};
      copy_bytes(value, c.from, c.source_bytes);
      copy_bytes(c.to, value, c.bytes);
    }
    f->copy_groups.erase(f->copy_groups.begin());
  }
}

namespace {

// The block that holds both ends of an asynchronous write: its destination and its mbarrier.
Block* destination(Fiber* f, const char* operation, void* shared, unsigned bytes, uint64_t* mbarrier, void* pc) {
  unsigned variable;
  size_t offset;
  Block* b = owner(shared, variable, offset);
  if (!b || b != owner(static_cast<char*>(shared) + bytes - 1, variable, offset) || b != owner(mbarrier, variable, offset))
    stop(name_thread(f) + format(": %s: data and mbarrier must lie in one block of the cluster", operation) + at_code(pc));
  if (!b->live) stop(name_thread(f) + format(": %s into a block that has exited", operation) + at_code(pc));
  return b;
}

}  // namespace

void async_store(void* shared, const void* value, unsigned bytes, uint64_t* mbarrier) {
  Fiber* f = self();
  Store s{destination(f, "st.async", shared, bytes, mbarrier, CALLER), shared, nullptr, {}, bytes, mbarrier};
  if (reinterpret_cast<uintptr_t>(shared) % bytes) stop(name_thread(f) + ": st.async to a misaligned address" + at_code(CALLER));
  copy_bytes(s.value, value, bytes);
  in_flight(f, s, CALLER);
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier) {
  Fiber* f = self();
  const auto bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes;
  if (!bytes || bits % 16)
    stop(name_thread(f) + format(": cp.async.bulk of %u bytes: size and addresses must be multiples of 16", bytes) +
         at_code(CALLER));
  Block* b = destination(f, "cp.async.bulk", shared, bytes, mbarrier, CALLER);
  probe(f, global, bytes, CALLER);
  in_flight(f, {b, shared, global, {}, bytes, mbarrier}, CALLER);
}

// An mbarrier's 64 bits. The top bit tells an initialised one from poison.
namespace {

struct MBarrier {
  uint64_t pending : 20, count : 20;
  int64_t bytes : 22;
  uint64_t phase : 1, valid : 1;
};
static_assert(sizeof(MBarrier) == 8);

MBarrier load(uint64_t* p, void* pc) {
  MBarrier m;
  copy_bytes(&m, p, 8);
  if (!m.valid) {
    unsigned variable;
    size_t offset;
    Block* b = owner(p, variable, offset);
    stop(name_thread(self()) + (!b ? ": mbarrier outside shared memory"
                                : b->live ? ": mbarrier used before its initialisation"
                                          : ": mbarrier of a block that has exited") + at_code(pc));
  }
  return m;
}

void save(uint64_t* p, MBarrier m) {
  if (m.pending == 0 && m.bytes == 0) {
    m.phase ^= 1;
    m.pending = m.count;
    active->idle_rounds = 0;
  }
  copy_bytes(p, &m, 8);
}

void deliver(Group* g, const Store& s) {
  const char* operation = s.from ? "cp.async.bulk" : "st.async";
  if (!s.block->live) return fail(g, format("%s arrives in a block that has exited", operation));
  MBarrier m;
  copy_bytes(&m, s.mbarrier, 8);
  if (!m.valid) return fail(g, format("%s completes on an mbarrier that is not initialised", operation));
  copy_bytes(s.to, s.from ? s.from : s.value, s.bytes);
  m.bytes -= s.bytes;
  save(s.mbarrier, m);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned count) {
  if (!count || count >= 1u << 20) stop(name_thread(self()) + format(": mbarrier counts %u threads", count) + at_code(CALLER));
  MBarrier m{count, count, 0, 0, 1};
  copy_bytes(barrier, &m, 8);
  release(barrier);
}

void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
  MBarrier m = load(barrier, CALLER);
  m.bytes += static_cast<int>(bytes);
  save(barrier, m);
}

void mbarrier_arrive(uint64_t* barrier) {
  release(barrier);
  MBarrier m = load(barrier, CALLER);
  if (m.pending == 0) stop(name_thread(self()) + ": more arrivals at an mbarrier than it counts" + at_code(CALLER));
  --m.pending;
  save(barrier, m);
}

bool mbarrier_test(uint64_t* barrier, unsigned parity) {
  MBarrier m = load(barrier, CALLER);
  if (m.phase == (parity & 1)) return false;
  acquire(barrier);
  return true;
}

void fence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  static char cookie;   // ThreadSanitizer knows no fences: any two of them order what lies between
  release(&cookie);
  acquire(&cookie);
}

void* static_shared_variable(std::size_t offset) {
  Block* b = self()->home;
  const Launch* l = active->launch;
  for (unsigned i = 0; i < l->variable_count; ++i)
    if (offset >= l->variables[i].offset && offset < l->variables[i].offset + l->variables[i].bytes)
      return b->variables[i] + (offset - l->variables[i].offset);
  return b->static_shared + offset;
}

}  // namespace emulator

using emulator::Launch;
using emulator::Result;

extern "C" void emulator_launch(const Launch* launch, Result* result) {
  emulator::Run run;
  run.launch = launch;
  const unsigned blocks = launch->grid[0] * launch->grid[1] * launch->grid[2];
  // One group for all blocks: a cooperative launch, and the race checker, which would else see blocks in sequence.
  run.blocks_per_group = launch->cooperative || emulator::under_tsan() ? blocks : launch->cluster;
  run.groups = blocks / run.blocks_per_group;
  const auto begin = std::chrono::steady_clock::now();
  if (emulator::under_tsan() || emulator::under_asan()) {
    emulator::work(&run);
  } else {
    dl_iterate_phdr(emulator::find_code, &run);
    emulator::run_on_workers(&run);
  }
  fflush(stdout);
  result->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  result->switches = run.switches;
  result->error = run.failed ? strdup(run.error.c_str()) : nullptr;
}

extern "C" void emulator_free(char* text) { free(text); }
