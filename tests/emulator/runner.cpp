// Runs one launch in a process built with a sanitizer: runner MODULE JOB RESULT. Arrays live on the instrumented heap.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <unistd.h>

#include "include/runtime.h"

namespace {

FILE* job;

template <class T> T read() {
  T v;
  if (fread(&v, sizeof v, 1, job) != 1) { fprintf(stderr, "runner: the job file ends early\n"); exit(2); }
  return v;
}

std::vector<char> read_bytes(uint64_t count) {
  std::vector<char> bytes(count);
  if (count && fread(bytes.data(), 1, count, job) != count) { fprintf(stderr, "runner: the job file ends early\n"); exit(2); }
  return bytes;
}

char* allocate(uint64_t bytes) {   // exactly so many: the sanitizer guards what follows
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes)) exit(2);
  return static_cast<char*>(p);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  void* module = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
  if (!module) { fprintf(stderr, "runner: %s\n", dlerror()); return 2; }
  const auto* kernels = static_cast<const emulator::Kernel*>(dlsym(module, "emulator_kernels"));
  const unsigned kernel_count = *static_cast<const unsigned*>(dlsym(module, "emulator_kernel_count"));

  job = fopen(argv[2], "rb");
  if (!job) { perror(argv[2]); return 2; }
  const auto name_bytes = read_bytes(read<uint64_t>());
  const std::string name(name_bytes.begin(), name_bytes.end());
  emulator::Launch launch{};
  for (unsigned i = 0; i < kernel_count; ++i)
    if (name == kernels[i].name) launch.kernel = &kernels[i];
  if (!launch.kernel) { fprintf(stderr, "runner: no kernel %s\n", name.c_str()); return 2; }
  for (auto& v : launch.grid) v = read<uint32_t>();
  for (auto& v : launch.block) v = read<uint32_t>();
  launch.dynamic_bytes = read<uint32_t>();
  launch.static_bytes = read<uint32_t>();
  launch.cluster = read<uint32_t>();
  launch.cooperative = read<uint32_t>();
  launch.order = static_cast<emulator::Order>(read<uint32_t>());
  launch.seed = read<uint32_t>();
  launch.spin_limit = read<uint32_t>();
  launch.workers = 1;
  launch.stack_bytes = 256 << 10;   // sanitized frames are larger
  launch.timeout = 1e9;             // the parent process keeps the time
  std::vector<emulator::SharedVariable> variables(read<uint32_t>());
  for (auto& v : variables) { v.offset = read<uint64_t>(); v.bytes = read<uint64_t>(); }
  launch.variables = variables.data();
  launch.variable_count = variables.size();

  // Allocations first (each a heap block of its exact size), then arguments: a value, or a place in an allocation.
  std::vector<std::pair<char*, uint64_t>> arrays(read<uint32_t>());
  for (auto& a : arrays) {
    a.second = read<uint64_t>();
    a.first = allocate(a.second);
    const auto bytes = read_bytes(a.second);
    memcpy(a.first, bytes.data(), bytes.size());
  }
  const unsigned count = read<uint32_t>();
  std::vector<char*> values(count);
  for (auto& v : values) {
    const auto array = read<int32_t>();
    const auto bytes = read_bytes(read<uint64_t>());
    v = allocate(bytes.size() < 8 ? 8 : bytes.size());
    memcpy(v, bytes.data(), bytes.size());
    if (array >= 0) {
      uint64_t offset;
      memcpy(&offset, bytes.data(), 8);
      char* p = arrays[array].first + offset;
      memcpy(v, &p, sizeof p);
    }
  }
  fclose(job);
  launch.arguments = reinterpret_cast<void**>(values.data());

  emulator::Result result{};
  emulator_launch(&launch, &result);
  if (result.error) { fprintf(stderr, "EMULATOR: %s\n", result.error); fflush(stderr); _exit(3); }

  FILE* out = fopen(argv[3], "wb");
  if (!out) { perror(argv[3]); return 2; }
  for (auto& a : arrays) fwrite(a.first, 1, a.second, out);
  fclose(out);
  for (auto& a : arrays) free(a.first);
  for (auto* v : values) free(v);
  return 0;
}
