/* A libcuda that pretends one H100: memory, streams, events, modules and graphs without a GPU.
 *
 * Kernels do nothing. What the driver is asked for is checked instead, and what a device would
 * refuse, or a capture must not hold, is a violation: see README.md. To teach it another function
 * of the driver, write it below and add its name to FUNCTIONS.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
typedef uint64_t Handle;
typedef uint64_t Address;

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_HANDLE = 400, NOT_FOUND = 500, OUT_OF_RESOURCES = 701, CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901, CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906, CAPTURED_EVENT = 907,
};

/* --- every function, and whether a capture may hold it ---------------------------------------- */

enum rule { LEGAL, UNSAFE };  /* UNSAFE: allocates, frees, waits, or loads code */

#define FUNCTIONS(X) \
    X(cuInit, LEGAL) X(cuDriverGetVersion, LEGAL) X(cuGetProcAddress, LEGAL) \
    X(cuGetErrorName, LEGAL) X(cuGetErrorString, LEGAL) \
    X(cuDeviceGet, LEGAL) X(cuDeviceGetCount, LEGAL) X(cuDeviceGetName, LEGAL) \
    X(cuDeviceGetUuid, LEGAL) X(cuDeviceGetAttribute, LEGAL) X(cuDeviceTotalMem, LEGAL) \
    X(cuDevicePrimaryCtxRetain, LEGAL) X(cuDevicePrimaryCtxRelease, LEGAL) \
    X(cuDevicePrimaryCtxGetState, LEGAL) \
    X(cuCtxGetCurrent, LEGAL) X(cuCtxSetCurrent, LEGAL) X(cuCtxPushCurrent, LEGAL) \
    X(cuCtxPopCurrent, LEGAL) X(cuCtxGetDevice, LEGAL) X(cuCtxGetFlags, LEGAL) \
    X(cuCtxGetApiVersion, LEGAL) X(cuCtxGetId, LEGAL) X(cuCtxGetStreamPriorityRange, LEGAL) \
    X(cuCtxSynchronize, UNSAFE) \
    X(cuMemGetInfo, LEGAL) X(cuMemAlloc, UNSAFE) X(cuMemFree, UNSAFE) \
    X(cuMemHostAlloc, UNSAFE) X(cuMemFreeHost, UNSAFE) X(cuMemGetAddressRange, LEGAL) \
    X(cuPointerGetAttribute, LEGAL) X(cuPointerGetAttributes, LEGAL) \
    X(cuMemcpyHtoD, UNSAFE) X(cuMemcpyDtoH, UNSAFE) X(cuMemcpyDtoD, UNSAFE) \
    X(cuMemcpyHtoDAsync, LEGAL) X(cuMemcpyDtoHAsync, LEGAL) X(cuMemcpyDtoDAsync, LEGAL) \
    X(cuMemsetD8, UNSAFE) X(cuMemsetD8Async, LEGAL) \
    X(cuStreamCreate, LEGAL) X(cuStreamCreateWithPriority, LEGAL) X(cuStreamDestroy, UNSAFE) \
    X(cuStreamSynchronize, UNSAFE) X(cuStreamQuery, UNSAFE) X(cuStreamWaitEvent, LEGAL) \
    X(cuStreamGetCtx, LEGAL) X(cuStreamGetId, LEGAL) X(cuStreamGetFlags, LEGAL) \
    X(cuStreamGetPriority, LEGAL) X(cuStreamIsCapturing, LEGAL) \
    X(cuStreamBeginCapture, LEGAL) X(cuStreamEndCapture, LEGAL) \
    X(cuEventCreate, LEGAL) X(cuEventDestroy, LEGAL) X(cuEventRecord, LEGAL) \
    X(cuEventRecordWithFlags, LEGAL) X(cuEventQuery, UNSAFE) X(cuEventSynchronize, UNSAFE) \
    X(cuEventElapsedTime, LEGAL) \
    X(cuGraphInstantiateWithFlags, LEGAL) X(cuGraphInstantiate, LEGAL) X(cuGraphLaunch, LEGAL) \
    X(cuGraphUpload, LEGAL) X(cuGraphDestroy, LEGAL) X(cuGraphExecDestroy, LEGAL) \
    X(cuLibraryLoadData, UNSAFE) X(cuLibraryUnload, UNSAFE) X(cuLibraryGetKernel, LEGAL) \
    X(cuLibraryGetModule, LEGAL) X(cuKernelGetFunction, LEGAL) X(cuKernelGetAttribute, LEGAL) \
    X(cuKernelSetAttribute, LEGAL) X(cuKernelGetParamInfo, LEGAL) X(cuKernelGetLibrary, LEGAL) \
    X(cuModuleLoadData, UNSAFE) X(cuModuleLoadDataEx, UNSAFE) X(cuModuleUnload, UNSAFE) \
    X(cuModuleGetFunction, LEGAL) X(cuFuncGetAttribute, LEGAL) X(cuFuncSetAttribute, LEGAL) \
    X(cuFuncSetCacheConfig, LEGAL) X(cuFuncGetParamInfo, LEGAL) X(cuFuncGetModule, LEGAL) \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor, LEGAL) \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, LEGAL) \
    X(cuLaunchKernel, LEGAL) X(cuLaunchKernelEx, LEGAL)

#define INDEX(name, rule) INDEX_##name,
enum { FUNCTIONS(INDEX) FUNCTION_COUNT };
#define NAME(name, rule) #name,
static const char *const names[] = {FUNCTIONS(NAME)};
#define RULE(name, rule) rule,
static const enum rule rules[] = {FUNCTIONS(RULE)};

/* --- what happened ---------------------------------------------------------------------------- */

enum { MOST_VIOLATIONS = 200 };
static pthread_mutex_t lock;
static long calls[FUNCTION_COUNT];
static long captures, launches, captured_launches, graph_launches, unannounced;
static char *violations[MOST_VIOLATIONS];
static int violation_count;
static int announced = -1;  /* arguments of the next launch, or -1 */
static size_t announced_sizes[1024];

__attribute__((format(printf, 1, 2))) static void violation(const char *format, ...) {
    if (violation_count == MOST_VIOLATIONS) return;
    va_list args;
    va_start(args, format);
    if (vasprintf(&violations[violation_count], format, args) > 0) violation_count++;
    va_end(args);
}

/* --- objects ---------------------------------------------------------------------------------- */

enum kind { STREAM, EVENT, GRAPH, GRAPH_EXEC, LIBRARY, KERNEL, MEMORY, HOST_MEMORY, KINDS };
static const char *const kind_names[] = {
    "streams", "events", "graphs", "graph executables", "libraries", "kernels", "device memory",
    "pinned memory",
};

/* Indices that grow: of nodes in a capture, of objects that a graph reads. */
struct list {
    int *items, count, room;
};

struct kernel {
    char *name;
    int library, registers, max_threads, static_shared, max_dynamic_shared;
    int parameter_count, parameter_bytes;
    struct { int offset, size; } parameters[256];
};

struct object {
    enum kind kind;
    bool alive;
    int capture;              /* of a stream or event: number of the capture it is in, or 0 */
    struct list behind;       /* of a stream or event in a capture: the nodes it comes after */
    struct list reads;        /* of a graph: the allocations that its kernels were given */
    unsigned flags;           /* of an event or stream */
    Address address;          /* of memory */
    size_t bytes;
    struct kernel *kernel;
    struct list kernels;      /* of a library */
};

static struct object **objects;
static int object_count, object_room;
static long live[KINDS];
static size_t device_bytes;

/* The first handles are small numbers to the driver (the legacy stream is 0, 1 or 2). */
static const Handle FIRST_HANDLE = 0x57ab0000000;

static void append(struct list *list, int item) {
    for (int i = 0; i < list->count; i++)
        if (list->items[i] == item) return;
    if (list->count == list->room) {
        list->room = list->room ? 2 * list->room : 8;
        list->items = realloc(list->items, list->room * sizeof(int));
    }
    list->items[list->count++] = item;
}

static void append_all(struct list *list, const struct list *other) {
    for (int i = 0; i < other->count; i++) append(list, other->items[i]);
}

static Handle make(enum kind kind, struct object **made) {
    if (object_count == object_room) {
        object_room = object_room ? 2 * object_room : 256;
        objects = realloc(objects, object_room * sizeof *objects);
    }
    struct object *object = calloc(1, sizeof *object);
    object->kind = kind;
    object->alive = true;
    live[kind]++;
    objects[object_count] = object;
    if (made) *made = object;
    return FIRST_HANDLE + 16 * (Handle)object_count++;
}

static int index_of(Handle handle) { return (int)((handle - FIRST_HANDLE) / 16); }

/* The object behind a handle; a violation and NULL where it is none or was destroyed. */
static struct object *find(const char *function, enum kind kind, Handle handle) {
    static struct object legacy = {.kind = STREAM, .alive = true};
    if (kind == STREAM && handle <= 2) return &legacy;
    Handle number = (handle - FIRST_HANDLE) / 16;
    struct object *object = NULL;
    if (handle >= FIRST_HANDLE && number < (Handle)object_count) object = objects[number];
    if (object && object->kind == kind && object->alive) return object;
    bool dead = object && object->kind == kind;
    violation("%s: %s of the %s", function, dead ? "a destroyed one" : "an unknown handle, not one",
              kind_names[kind]);
    return NULL;
}

static void destroy(struct object *object) {
    object->alive = false;
    live[object->kind]--;
}

/* The allocation that holds [address, address + bytes), or -1. */
static int allocation(Address address, size_t bytes) {
    for (int i = 0; i < object_count; i++) {
        struct object *o = objects[i];
        if (o->kind == MEMORY && o->alive && address >= o->address &&
            address + bytes <= o->address + o->bytes)
            return i;
    }
    return -1;
}

static bool inside(const char *function, Address address, size_t bytes) {
    if (bytes == 0 || allocation(address, bytes) >= 0) return true;
    violation("%s: %zu bytes at %#lx, outside of any allocation", function, bytes, (long)address);
    return false;
}

/* --- captures --------------------------------------------------------------------------------- */

enum { RELAXED = 2 };

static struct {
    int number;               /* of the capture under way, or 0: one at a time */
    Handle origin;
    int mode;
    int nodes;
    struct list followed;     /* nodes that another comes after */
    struct list reads;
    bool invalid;
} capture;

/* A node on a stream in the capture: it comes after what the stream came after. */
static void add_node(struct object *stream) {
    append_all(&capture.followed, &stream->behind);
    stream->behind = (struct list){0};
    append(&stream->behind, capture.nodes++);
}

/* Work on a stream: true where it is captured, false where it runs at once. */
static bool captured(const char *function, Handle handle, struct object *stream, Result *status) {
    *status = SUCCESS;
    if (!capture.number) return false;
    if (stream->capture == capture.number) {
        add_node(stream);
        return true;
    }
    violation("%s on a stream outside of the capture that is under way", function);
    if (handle <= 2) {
        capture.invalid = true;
        *status = CAPTURE_IMPLICIT;
    }
    return false;
}

/* --- entering a function ---------------------------------------------------------------------- */

struct scope {
    Result refused;
};

static struct scope enter(int function) {
    pthread_mutex_lock(&lock);
    calls[function]++;
    if (rules[function] != UNSAFE || !capture.number) return (struct scope){SUCCESS};
    violation("%s during a capture", names[function]);
    if (capture.mode == RELAXED) return (struct scope){SUCCESS};
    capture.invalid = true;
    return (struct scope){CAPTURE_UNSUPPORTED};
}

static void leave(struct scope *scope) {
    (void)scope;
    pthread_mutex_unlock(&lock);
}

#define EXPORT __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
/* First in every function: counts the call, and holds it to its rule during a capture. */
#define ENTER(name) \
    struct scope scope __attribute__((cleanup(leave))) = enter(INDEX_##name); \
    static const char *const self UNUSED = #name; \
    if (scope.refused) return scope.refused
/* The second name of a function, as libraries that are linked to the driver ask for it. */
#define ALIAS(name, other) \
    EXPORT extern __typeof__(name) other __attribute__((alias(#name)));
#define FIND(variable, kind, handle) \
    struct object *variable = find(self, kind, handle); \
    if (!variable) return INVALID_HANDLE

/* --- the device ------------------------------------------------------------------------------- */

static const Handle CONTEXT = 0x57ac0000000;
static __thread Handle contexts[16];
static __thread int context_depth;

enum {
    MULTIPROCESSORS = 132, MAX_THREADS = 1024, MAX_SHARED = 49152, MAX_SHARED_OPT_IN = 232448,
    SHARED_A_MULTIPROCESSOR = 233472, RESERVED_SHARED = 1024, REGISTERS = 65536,
    THREADS_A_MULTIPROCESSOR = 2048, BLOCKS_A_MULTIPROCESSOR = 32,
};
static const size_t H100_BYTES = 79ull << 30;

/* CU_DEVICE_ATTRIBUTE_*, in the order of cuda.h; those that are missing are 0. */
static const struct { int attribute, value; } attributes[] = {
    {1, MAX_THREADS}, {2, 1024}, {3, 1024}, {4, 64},             /* block */
    {5, 2147483647}, {6, 65535}, {7, 65535},                     /* grid */
    {8, MAX_SHARED}, {9, 65536}, {10, 32}, {11, 2147483647}, {12, REGISTERS},
    {13, 1980000}, {14, 512}, {15, 1}, {16, MULTIPROCESSORS}, {19, 1}, {31, 1}, {32, 1},
    {36, 2619000}, {37, 5120}, {38, 50 << 20}, {39, THREADS_A_MULTIPROCESSOR}, {40, 3}, {41, 1},
    {75, 9}, {76, 0}, {78, 1}, {79, 1}, {80, 1}, {81, SHARED_A_MULTIPROCESSOR}, {82, REGISTERS},
    {83, 1}, {89, 1}, {90, 1}, {91, 1}, {95, 1}, {97, MAX_SHARED_OPT_IN}, {99, 1}, {102, 1},
    {106, BLOCKS_A_MULTIPROCESSOR}, {111, RESERVED_SHARED}, {115, 1}, {120, 1}, {127, 1},
};

static int attribute_of_device(int attribute) {
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (attributes[i].attribute == attribute) return attributes[i].value;
    return 0;
}

EXPORT Result cuInit(unsigned flags) {
    ENTER(cuInit);
    return flags ? INVALID_VALUE : SUCCESS;
}

EXPORT Result cuDriverGetVersion(int *version) {
    ENTER(cuDriverGetVersion);
    const char *wanted = getenv("STUB_DRIVER_VERSION");
    *version = wanted ? atoi(wanted) : 13000;
    return SUCCESS;
}

EXPORT Result cuGetErrorName(Result error, const char **name) {
    ENTER(cuGetErrorName);
    static char text[32];
    snprintf(text, sizeof text, "CUDA error %d", error);
    *name = text;
    return SUCCESS;
}

EXPORT Result cuGetErrorString(Result error, const char **text) {
    ENTER(cuGetErrorString);
    (void)error;
    *text = "an error of the stub driver";
    return SUCCESS;
}

EXPORT Result cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount);
    *count = 1;
    return SUCCESS;
}

EXPORT Result cuDeviceGet(int *device, int ordinal) {
    ENTER(cuDeviceGet);
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

EXPORT Result cuDeviceGetName(char *name, int length, int device) {
    ENTER(cuDeviceGetName);
    snprintf(name, length, "NVIDIA H100 (stub driver)");
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

EXPORT Result cuDeviceGetUuid(unsigned char *uuid, int device) {
    ENTER(cuDeviceGetUuid);
    memset(uuid, 7, 16);
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}
ALIAS(cuDeviceGetUuid, cuDeviceGetUuid_v2)

EXPORT Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER(cuDeviceGetAttribute);
    *value = attribute_of_device(attribute);
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

/* All of the memory: STUB_DRIVER_MEMORY in bytes, or an H100's. */
static size_t total_bytes(void) {
    const char *wanted = getenv("STUB_DRIVER_MEMORY");
    return wanted ? strtoull(wanted, NULL, 10) : H100_BYTES;
}

EXPORT Result cuDeviceTotalMem(size_t *bytes, int device) {
    ENTER(cuDeviceTotalMem);
    *bytes = total_bytes();
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}
ALIAS(cuDeviceTotalMem, cuDeviceTotalMem_v2)

EXPORT Result cuDevicePrimaryCtxRetain(Handle *context, int device) {
    ENTER(cuDevicePrimaryCtxRetain);
    *context = CONTEXT;
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

EXPORT Result cuDevicePrimaryCtxRelease(int device) {
    ENTER(cuDevicePrimaryCtxRelease);
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}
ALIAS(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2)

EXPORT Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    ENTER(cuDevicePrimaryCtxGetState);
    *flags = 0;
    *active = 1;
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

EXPORT Result cuCtxGetCurrent(Handle *context) {
    ENTER(cuCtxGetCurrent);
    *context = contexts[context_depth];
    return SUCCESS;
}

EXPORT Result cuCtxSetCurrent(Handle context) {
    ENTER(cuCtxSetCurrent);
    contexts[context_depth] = context;
    return SUCCESS;
}

EXPORT Result cuCtxPushCurrent(Handle context) {
    ENTER(cuCtxPushCurrent);
    if (context_depth == 15) return INVALID_VALUE;
    contexts[++context_depth] = context;
    return SUCCESS;
}
ALIAS(cuCtxPushCurrent, cuCtxPushCurrent_v2)

EXPORT Result cuCtxPopCurrent(Handle *context) {
    ENTER(cuCtxPopCurrent);
    if (context) *context = contexts[context_depth];
    contexts[context_depth] = 0;
    if (context_depth) context_depth--;
    return SUCCESS;
}
ALIAS(cuCtxPopCurrent, cuCtxPopCurrent_v2)

EXPORT Result cuCtxGetDevice(int *device) {
    ENTER(cuCtxGetDevice);
    *device = 0;
    return SUCCESS;
}

EXPORT Result cuCtxGetFlags(unsigned *flags) {
    ENTER(cuCtxGetFlags);
    *flags = 0;
    return SUCCESS;
}

EXPORT Result cuCtxGetApiVersion(Handle context, unsigned *version) {
    ENTER(cuCtxGetApiVersion);
    (void)context;
    *version = 3020;
    return SUCCESS;
}

EXPORT Result cuCtxGetId(Handle context, unsigned long long *id) {
    ENTER(cuCtxGetId);
    (void)context;
    *id = 1;
    return SUCCESS;
}

EXPORT Result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER(cuCtxGetStreamPriorityRange);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

EXPORT Result cuCtxSynchronize(void) {
    ENTER(cuCtxSynchronize);
    return SUCCESS;
}

/* --- memory: of the host, so that copies are real --------------------------------------------- */

EXPORT Result cuMemGetInfo(size_t *available, size_t *total) {
    ENTER(cuMemGetInfo);
    *total = total_bytes();
    *available = *total > device_bytes ? *total - device_bytes : 0;
    return SUCCESS;
}
ALIAS(cuMemGetInfo, cuMemGetInfo_v2)

static Result allocate(enum kind kind, Address *address, size_t bytes) {
    if (bytes == 0) return INVALID_VALUE;
    if (kind == MEMORY && device_bytes + bytes > total_bytes()) return OUT_OF_MEMORY;
    void *memory = NULL;
    if (posix_memalign(&memory, 512, bytes)) return OUT_OF_MEMORY;
    memset(memory, 0, bytes);
    struct object *object;
    make(kind, &object);
    object->address = *address = (Address)memory;
    object->bytes = bytes;
    if (kind == MEMORY) device_bytes += bytes;
    return SUCCESS;
}

static Result release(const char *function, enum kind kind, Address address) {
    for (int i = 0; i < object_count; i++) {
        struct object *object = objects[i];
        if (object->kind != kind || !object->alive || object->address != address) continue;
        free((void *)address);
        if (kind == MEMORY) device_bytes -= object->bytes;
        destroy(object);
        return SUCCESS;
    }
    violation("%s: %#lx is not the begin of an allocation", function, (long)address);
    return INVALID_VALUE;
}

EXPORT Result cuMemAlloc(Address *address, size_t bytes) {
    ENTER(cuMemAlloc);
    return allocate(MEMORY, address, bytes);
}
ALIAS(cuMemAlloc, cuMemAlloc_v2)

EXPORT Result cuMemFree(Address address) {
    ENTER(cuMemFree);
    return release(self, MEMORY, address);
}
ALIAS(cuMemFree, cuMemFree_v2)

EXPORT Result cuMemHostAlloc(Address *address, size_t bytes, unsigned flags) {
    ENTER(cuMemHostAlloc);
    (void)flags;
    return allocate(HOST_MEMORY, address, bytes);
}

EXPORT Result cuMemFreeHost(Address address) {
    ENTER(cuMemFreeHost);
    return release(self, HOST_MEMORY, address);
}

EXPORT Result cuMemGetAddressRange(Address *base, size_t *bytes, Address address) {
    ENTER(cuMemGetAddressRange);
    int found = allocation(address, 1);
    if (found < 0) return NOT_FOUND;
    if (base) *base = objects[found]->address;
    if (bytes) *bytes = objects[found]->bytes;
    return SUCCESS;
}
ALIAS(cuMemGetAddressRange, cuMemGetAddressRange_v2)

static Result pointer_attribute(void *value, int attribute, Address address) {
    int found = allocation(address, 1);
    if (found < 0) return INVALID_VALUE;
    switch (attribute) {
    case 1: *(Handle *)value = CONTEXT; return SUCCESS;
    case 2: *(unsigned *)value = 2; return SUCCESS;  /* memory of a device */
    case 3: *(Address *)value = address; return SUCCESS;
    case 7: *(unsigned long long *)value = found; return SUCCESS;
    case 8: *(unsigned *)value = 0; return SUCCESS;  /* not managed */
    case 9: *(int *)value = 0; return SUCCESS;
    case 11: *(Address *)value = objects[found]->address; return SUCCESS;
    case 12: *(size_t *)value = objects[found]->bytes; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

EXPORT Result cuPointerGetAttribute(void *value, int attribute, Address address) {
    ENTER(cuPointerGetAttribute);
    return pointer_attribute(value, attribute, address);
}

EXPORT Result cuPointerGetAttributes(unsigned count, int *wanted, void **values, Address address) {
    ENTER(cuPointerGetAttributes);
    for (unsigned i = 0; i < count; i++) pointer_attribute(values[i], wanted[i], address);
    return SUCCESS;
}

EXPORT Result cuMemcpyHtoD(Address to, const void *from, size_t bytes) {
    ENTER(cuMemcpyHtoD);
    if (!inside(self, to, bytes)) return INVALID_VALUE;
    memcpy((void *)to, from, bytes);
    return SUCCESS;
}
ALIAS(cuMemcpyHtoD, cuMemcpyHtoD_v2)

EXPORT Result cuMemcpyDtoH(void *to, Address from, size_t bytes) {
    ENTER(cuMemcpyDtoH);
    if (!inside(self, from, bytes)) return INVALID_VALUE;
    memcpy(to, (void *)from, bytes);
    return SUCCESS;
}
ALIAS(cuMemcpyDtoH, cuMemcpyDtoH_v2)

EXPORT Result cuMemcpyDtoD(Address to, Address from, size_t bytes) {
    ENTER(cuMemcpyDtoD);
    if (!inside(self, to, bytes) || !inside(self, from, bytes)) return INVALID_VALUE;
    memmove((void *)to, (void *)from, bytes);
    return SUCCESS;
}
ALIAS(cuMemcpyDtoD, cuMemcpyDtoD_v2)

EXPORT Result cuMemsetD8(Address to, unsigned char value, size_t bytes) {
    ENTER(cuMemsetD8);
    if (!inside(self, to, bytes)) return INVALID_VALUE;
    memset((void *)to, value, bytes);
    return SUCCESS;
}
ALIAS(cuMemsetD8, cuMemsetD8_v2)

/* A copy on a stream: a node where it is captured, done at once where it is not. */
static Result copy_on(const char *function, Handle handle, void *to, const void *from, size_t bytes) {
    struct object *stream = find(function, STREAM, handle);
    if (!stream) return INVALID_HANDLE;
    Result status;
    if (!captured(function, handle, stream, &status) && status == SUCCESS)
        memmove(to, from, bytes);
    return status;
}

EXPORT Result cuMemcpyHtoDAsync(Address to, const void *from, size_t bytes, Handle stream) {
    ENTER(cuMemcpyHtoDAsync);
    if (!inside(self, to, bytes)) return INVALID_VALUE;
    return copy_on(self, stream, (void *)to, from, bytes);
}
ALIAS(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2)

EXPORT Result cuMemcpyDtoHAsync(void *to, Address from, size_t bytes, Handle stream) {
    ENTER(cuMemcpyDtoHAsync);
    if (!inside(self, from, bytes)) return INVALID_VALUE;
    return copy_on(self, stream, to, (void *)from, bytes);
}
ALIAS(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2)

EXPORT Result cuMemcpyDtoDAsync(Address to, Address from, size_t bytes, Handle stream) {
    ENTER(cuMemcpyDtoDAsync);
    if (!inside(self, to, bytes) || !inside(self, from, bytes)) return INVALID_VALUE;
    return copy_on(self, stream, (void *)to, (void *)from, bytes);
}
ALIAS(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2)

EXPORT Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Handle handle) {
    ENTER(cuMemsetD8Async);
    if (!inside(self, to, bytes)) return INVALID_VALUE;
    FIND(stream, STREAM, handle);
    Result status;
    if (!captured(self, handle, stream, &status) && status == SUCCESS)
        memset((void *)to, value, bytes);
    return status;
}

/* --- streams and events ----------------------------------------------------------------------- */

EXPORT Result cuStreamCreate(Handle *stream, unsigned flags) {
    ENTER(cuStreamCreate);
    struct object *made;
    *stream = make(STREAM, &made);
    made->flags = flags;
    return SUCCESS;
}

EXPORT Result cuStreamCreateWithPriority(Handle *stream, unsigned flags, int priority) {
    ENTER(cuStreamCreateWithPriority);
    (void)priority;
    struct object *made;
    *stream = make(STREAM, &made);
    made->flags = flags;
    return SUCCESS;
}

EXPORT Result cuStreamDestroy(Handle handle) {
    ENTER(cuStreamDestroy);
    FIND(stream, STREAM, handle);
    destroy(stream);
    return SUCCESS;
}
ALIAS(cuStreamDestroy, cuStreamDestroy_v2)

EXPORT Result cuStreamSynchronize(Handle handle) {
    ENTER(cuStreamSynchronize);
    FIND(stream, STREAM, handle);
    return stream->capture ? CAPTURE_UNSUPPORTED : SUCCESS;
}

EXPORT Result cuStreamQuery(Handle handle) {
    ENTER(cuStreamQuery);
    FIND(stream, STREAM, handle);
    return stream->capture ? CAPTURE_UNSUPPORTED : SUCCESS;
}

EXPORT Result cuStreamGetCtx(Handle handle, Handle *context) {
    ENTER(cuStreamGetCtx);
    FIND(stream, STREAM, handle);
    *context = CONTEXT;
    return SUCCESS;
}

EXPORT Result cuStreamGetId(Handle handle, unsigned long long *id) {
    ENTER(cuStreamGetId);
    FIND(stream, STREAM, handle);
    *id = handle;
    return SUCCESS;
}

EXPORT Result cuStreamGetFlags(Handle handle, unsigned *flags) {
    ENTER(cuStreamGetFlags);
    FIND(stream, STREAM, handle);
    *flags = stream->flags;
    return SUCCESS;
}

EXPORT Result cuStreamGetPriority(Handle handle, int *priority) {
    ENTER(cuStreamGetPriority);
    FIND(stream, STREAM, handle);
    *priority = 0;
    return SUCCESS;
}

EXPORT Result cuEventCreate(Handle *event, unsigned flags) {
    ENTER(cuEventCreate);
    struct object *made;
    *event = make(EVENT, &made);
    made->flags = flags;
    return SUCCESS;
}

EXPORT Result cuEventDestroy(Handle handle) {
    ENTER(cuEventDestroy);
    FIND(event, EVENT, handle);
    destroy(event);
    return SUCCESS;
}
ALIAS(cuEventDestroy, cuEventDestroy_v2)

/* An event marks where its stream is; on a captured stream it belongs to the capture. */
static Result record(const char *self, Handle event_handle, Handle stream_handle) {
    FIND(event, EVENT, event_handle);
    FIND(stream, STREAM, stream_handle);
    if (capture.number && stream_handle <= 2) {
        violation("%s on the legacy stream during a capture", self);
        return CAPTURE_IMPLICIT;
    }
    event->capture = stream->capture;
    event->behind = (struct list){0};
    append_all(&event->behind, &stream->behind);
    return SUCCESS;
}

EXPORT Result cuEventRecord(Handle event, Handle stream) {
    ENTER(cuEventRecord);
    return record(self, event, stream);
}

EXPORT Result cuEventRecordWithFlags(Handle event, Handle stream, unsigned flags) {
    ENTER(cuEventRecordWithFlags);
    (void)flags;
    return record(self, event, stream);
}

/* Waiting for a captured event brings a stream into the capture. */
EXPORT Result cuStreamWaitEvent(Handle stream_handle, Handle event_handle, unsigned flags) {
    ENTER(cuStreamWaitEvent);
    (void)flags;
    FIND(stream, STREAM, stream_handle);
    FIND(event, EVENT, event_handle);
    if (event->capture != 0 && event->capture != capture.number) {
        violation("%s: the event was recorded in a capture that has ended", self);
        return CAPTURED_EVENT;
    }
    if (event->capture == 0 && stream->capture == 0) return SUCCESS;
    if (event->capture == 0) {
        violation("%s: a captured stream waits for an event from outside of the capture", self);
        return CAPTURE_ISOLATION;
    }
    stream->capture = event->capture;
    append_all(&stream->behind, &event->behind);
    return SUCCESS;
}

static Result ask_event(const char *self, Handle handle) {
    FIND(event, EVENT, handle);
    if (event->capture == 0) return SUCCESS;
    violation("%s: the event was last recorded in a capture", self);
    return CAPTURED_EVENT;
}

EXPORT Result cuEventQuery(Handle event) {
    ENTER(cuEventQuery);
    return ask_event(self, event);
}

EXPORT Result cuEventSynchronize(Handle event) {
    ENTER(cuEventSynchronize);
    return ask_event(self, event);
}

EXPORT Result cuEventElapsedTime(float *milliseconds, Handle begin_handle, Handle end_handle) {
    ENTER(cuEventElapsedTime);
    enum { DISABLE_TIMING = 2 };
    FIND(begin, EVENT, begin_handle);
    FIND(end, EVENT, end_handle);
    *milliseconds = 1.0f;
    return (begin->flags | end->flags) & DISABLE_TIMING ? INVALID_HANDLE : SUCCESS;
}
ALIAS(cuEventElapsedTime, cuEventElapsedTime_v2)

/* --- graphs ----------------------------------------------------------------------------------- */

EXPORT Result cuStreamIsCapturing(Handle handle, int *status) {
    ENTER(cuStreamIsCapturing);
    FIND(stream, STREAM, handle);
    *status = stream->capture ? 1 : 0;
    return SUCCESS;
}

EXPORT Result cuStreamBeginCapture(Handle handle, int mode) {
    ENTER(cuStreamBeginCapture);
    FIND(stream, STREAM, handle);
    if (handle <= 2 || capture.number) {
        violation("%s: %s", self, handle <= 2 ? "the legacy stream" : "a capture is under way");
        return CAPTURE_UNSUPPORTED;
    }
    static int number;
    capture = (__typeof__(capture)){.number = ++number, .origin = handle, .mode = mode};
    stream->capture = capture.number;
    stream->behind = (struct list){0};
    captures++;
    return SUCCESS;
}
ALIAS(cuStreamBeginCapture, cuStreamBeginCapture_v2)

/* Every node must come before what the origin stands behind. */
static bool joined(const struct object *origin) {
    struct list reached = {0};
    append_all(&reached, &capture.followed);
    append_all(&reached, &origin->behind);
    return reached.count == capture.nodes;
}

EXPORT Result cuStreamEndCapture(Handle handle, Handle *graph) {
    ENTER(cuStreamEndCapture);
    FIND(stream, STREAM, handle);
    *graph = 0;
    if (!capture.number || handle != capture.origin) {
        violation("%s: the capture did not begin on this stream", self);
        return INVALID_VALUE;
    }
    bool whole = joined(stream), invalid = capture.invalid;
    struct list reads = capture.reads;
    for (int i = 0; i < object_count; i++)
        if (objects[i]->kind == STREAM) {
            objects[i]->capture = 0;
            objects[i]->behind = (struct list){0};
        }
    capture.number = 0;
    if (!whole) violation("%s: a stream was not joined to the one that captures", self);
    if (invalid) return CAPTURE_INVALIDATED;
    if (!whole) return CAPTURE_UNJOINED;
    struct object *made;
    *graph = make(GRAPH, &made);
    made->reads = reads;
    return SUCCESS;
}

EXPORT Result cuGraphInstantiateWithFlags(Handle *executable, Handle handle, uint64_t flags) {
    ENTER(cuGraphInstantiateWithFlags);
    (void)flags;
    FIND(graph, GRAPH, handle);
    struct object *made;
    *executable = make(GRAPH_EXEC, &made);
    made->reads = graph->reads;
    return SUCCESS;
}
ALIAS(cuGraphInstantiateWithFlags, cuGraphInstantiate)

EXPORT Result cuGraphUpload(Handle executable_handle, Handle stream_handle) {
    ENTER(cuGraphUpload);
    FIND(executable, GRAPH_EXEC, executable_handle);
    FIND(stream, STREAM, stream_handle);
    return SUCCESS;
}

EXPORT Result cuGraphLaunch(Handle executable_handle, Handle stream_handle) {
    ENTER(cuGraphLaunch);
    FIND(executable, GRAPH_EXEC, executable_handle);
    FIND(stream, STREAM, stream_handle);
    graph_launches++;
    for (int i = 0; i < executable->reads.count; i++) {
        const struct object *memory = objects[executable->reads.items[i]];
        if (memory->alive) continue;
        violation("%s: the graph works on %zu bytes that were freed", self, memory->bytes);
        break;
    }
    Result status;
    captured(self, stream_handle, stream, &status);
    return status;
}

EXPORT Result cuGraphDestroy(Handle handle) {
    ENTER(cuGraphDestroy);
    FIND(graph, GRAPH, handle);
    destroy(graph);
    return SUCCESS;
}

EXPORT Result cuGraphExecDestroy(Handle handle) {
    ENTER(cuGraphExecDestroy);
    FIND(executable, GRAPH_EXEC, handle);
    destroy(executable);
    return SUCCESS;
}

/* --- code: what a cubin says of its kernels --------------------------------------------------- */

/* Attributes in the sections .nv.info (of all) and .nv.info.NAME (of one kernel). */
enum { KPARAM_INFO = 0x17, CBANK_PARAM_SIZE = 0x19, MAX_THREADS_OF = 0x05, REGCOUNT = 0x2f };
enum { SIZED = 4 };  /* the format of an attribute that is followed by its bytes */

static uint32_t word(const char *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static void read_attribute(struct kernel *kernel, int attribute, int value, const char *data) {
    switch (attribute) {
    case KPARAM_INFO: {  /* data: -, ordinal (16 bits) and offset (16), size in the upper bits */
        int ordinal = word(data + 4) & 0xffff;
        if (ordinal >= 256) return;
        kernel->parameters[ordinal].offset = word(data + 4) >> 16;
        kernel->parameters[ordinal].size = word(data + 8) >> 18;
        if (ordinal >= kernel->parameter_count) kernel->parameter_count = ordinal + 1;
        return;
    }
    case CBANK_PARAM_SIZE: kernel->parameter_bytes = value; return;
    case MAX_THREADS_OF: kernel->max_threads = word(data) * word(data + 4) * word(data + 8); return;
    }
}

/* The kernels of a cubin become objects; false where the image is none. */
static bool read_cubin(const char *image, int library) {
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
    if (memcmp(image, ELFMAG, SELFMAG) || header->e_ident[EI_CLASS] != ELFCLASS64) return false;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
    const char *section_names = image + sections[header->e_shstrndx].sh_offset;
    const char *own = ".nv.info.", *shared = ".nv.shared.", *all = ".nv.info";
    for (int s = 0; s < header->e_shnum; s++) {
        const char *name = section_names + sections[s].sh_name;
        if (strncmp(name, own, strlen(own))) continue;
        struct kernel *kernel = calloc(1, sizeof *kernel);
        kernel->name = strdup(name + strlen(own));
        kernel->library = library;
        kernel->max_threads = MAX_THREADS;
        kernel->parameter_bytes = -1;
        const char *at = image + sections[s].sh_offset, *end = at + sections[s].sh_size;
        while (at < end) {
            int format = at[0], attribute = at[1], value = word(at) >> 16;
            read_attribute(kernel, attribute, value, at + 4);
            at += 4 + (format == SIZED ? value : 0);
        }
        for (int i = 0; i < header->e_shnum; i++) {
            const char *other = section_names + sections[i].sh_name;
            if (!strncmp(other, shared, strlen(shared)) &&
                !strcmp(other + strlen(shared), kernel->name))
                kernel->static_shared = sections[i].sh_size;
        }
        struct object *object;
        append(&objects[library]->kernels, index_of(make(KERNEL, &object)));
        object->kernel = kernel;
    }
    /* Registers stand in the common section, by the number of the function's symbol. */
    for (int s = 0; s < header->e_shnum; s++) {
        if (strcmp(section_names + sections[s].sh_name, all)) continue;
        const Elf64_Shdr *table = &sections[sections[s].sh_link];
        const Elf64_Sym *symbols = (const Elf64_Sym *)(image + table->sh_offset);
        const char *strings = image + sections[table->sh_link].sh_offset;
        const char *at = image + sections[s].sh_offset, *end = at + sections[s].sh_size;
        for (; at < end; at += 4 + (at[0] == SIZED ? word(at) >> 16 : 0)) {
            if (at[1] != REGCOUNT) continue;
            const char *function = strings + symbols[word(at + 4)].st_name;
            const struct list *kernels = &objects[library]->kernels;
            for (int k = 0; k < kernels->count; k++) {
                struct kernel *kernel = objects[kernels->items[k]]->kernel;
                if (!strcmp(kernel->name, function)) kernel->registers = word(at + 8);
            }
        }
    }
    return true;
}

static Result load(const char *function, Handle *library, const void *image) {
    *library = make(LIBRARY, NULL);
    if (read_cubin(image, index_of(*library))) return SUCCESS;
    violation("%s: not a cubin", function);
    destroy(objects[index_of(*library)]);
    return INVALID_IMAGE;
}

static Result unload(const char *self, Handle handle) {
    FIND(library, LIBRARY, handle);
    for (int i = 0; i < library->kernels.count; i++) destroy(objects[library->kernels.items[i]]);
    destroy(library);
    return SUCCESS;
}

static Result kernel_of(const char *self, Handle *kernel, Handle handle, const char *name) {
    FIND(library, LIBRARY, handle);
    for (int i = 0; i < library->kernels.count; i++) {
        int index = library->kernels.items[i];
        if (strcmp(objects[index]->kernel->name, name)) continue;
        *kernel = FIRST_HANDLE + 16 * (Handle)index;
        return SUCCESS;
    }
    return NOT_FOUND;
}

EXPORT Result cuLibraryLoadData(Handle *library, const void *image, void *jit, void *jit_values,
                                unsigned jit_count, void *options, void *values, unsigned count) {
    ENTER(cuLibraryLoadData);
    (void)jit, (void)jit_values, (void)jit_count, (void)options, (void)values, (void)count;
    return load(self, library, image);
}

EXPORT Result cuLibraryUnload(Handle library) {
    ENTER(cuLibraryUnload);
    return unload(self, library);
}

EXPORT Result cuLibraryGetKernel(Handle *kernel, Handle library, const char *name) {
    ENTER(cuLibraryGetKernel);
    return kernel_of(self, kernel, library, name);
}

EXPORT Result cuLibraryGetModule(Handle *module, Handle handle) {
    ENTER(cuLibraryGetModule);
    FIND(library, LIBRARY, handle);
    *module = handle;
    return SUCCESS;
}

EXPORT Result cuModuleLoadData(Handle *module, const void *image) {
    ENTER(cuModuleLoadData);
    return load(self, module, image);
}

EXPORT Result cuModuleLoadDataEx(Handle *module, const void *image, unsigned count, void *options,
                                 void *values) {
    ENTER(cuModuleLoadDataEx);
    (void)count, (void)options, (void)values;
    return load(self, module, image);
}

EXPORT Result cuModuleUnload(Handle module) {
    ENTER(cuModuleUnload);
    return unload(self, module);
}

EXPORT Result cuModuleGetFunction(Handle *function, Handle module, const char *name) {
    ENTER(cuModuleGetFunction);
    return kernel_of(self, function, module, name);
}

EXPORT Result cuKernelGetFunction(Handle *function, Handle handle) {
    ENTER(cuKernelGetFunction);
    FIND(kernel, KERNEL, handle);
    *function = handle;
    return SUCCESS;
}

static Result library_of(const char *self, Handle *library, Handle handle) {
    FIND(object, KERNEL, handle);
    *library = FIRST_HANDLE + 16 * (Handle)object->kernel->library;
    return SUCCESS;
}

EXPORT Result cuKernelGetLibrary(Handle *library, Handle kernel) {
    ENTER(cuKernelGetLibrary);
    return library_of(self, library, kernel);
}

EXPORT Result cuFuncGetModule(Handle *module, Handle function) {
    ENTER(cuFuncGetModule);
    return library_of(self, module, function);
}

enum { MAX_THREADS_PER_BLOCK = 0, SHARED_SIZE_BYTES = 1, NUM_REGS = 4, PTX_VERSION = 5,
       BINARY_VERSION = 6, MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };

static Result get_attribute(const char *self, int *value, int attribute, Handle handle) {
    FIND(object, KERNEL, handle);
    const struct kernel *kernel = object->kernel;
    switch (attribute) {
    case MAX_THREADS_PER_BLOCK: *value = kernel->max_threads; return SUCCESS;
    case SHARED_SIZE_BYTES: *value = kernel->static_shared; return SUCCESS;
    case NUM_REGS: *value = kernel->registers; return SUCCESS;
    case PTX_VERSION: case BINARY_VERSION: *value = 90; return SUCCESS;
    case MAX_DYNAMIC_SHARED_SIZE_BYTES:
        *value = kernel->max_dynamic_shared ? kernel->max_dynamic_shared
                                            : MAX_SHARED - kernel->static_shared;
        return SUCCESS;
    default: *value = 0; return SUCCESS;
    }
}

static Result set_attribute(const char *self, Handle handle, int attribute, int value) {
    FIND(object, KERNEL, handle);
    if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return SUCCESS;
    if (value < 0 || value + object->kernel->static_shared > MAX_SHARED_OPT_IN) {
        violation("%s: %d bytes of dynamic shared memory for %s", self, value, object->kernel->name);
        return INVALID_VALUE;
    }
    object->kernel->max_dynamic_shared = value;
    return SUCCESS;
}

EXPORT Result cuKernelGetAttribute(int *value, int attribute, Handle kernel, int device) {
    ENTER(cuKernelGetAttribute);
    (void)device;
    return get_attribute(self, value, attribute, kernel);
}

EXPORT Result cuFuncGetAttribute(int *value, int attribute, Handle function) {
    ENTER(cuFuncGetAttribute);
    return get_attribute(self, value, attribute, function);
}

EXPORT Result cuKernelSetAttribute(int attribute, int value, Handle kernel, int device) {
    ENTER(cuKernelSetAttribute);
    (void)device;
    return set_attribute(self, kernel, attribute, value);
}

EXPORT Result cuFuncSetAttribute(Handle function, int attribute, int value) {
    ENTER(cuFuncSetAttribute);
    return set_attribute(self, function, attribute, value);
}

EXPORT Result cuFuncSetCacheConfig(Handle function, int configuration) {
    ENTER(cuFuncSetCacheConfig);
    (void)configuration;
    FIND(kernel, KERNEL, function);
    return SUCCESS;
}

static Result parameter(const char *self, Handle handle, size_t i, size_t *offset, size_t *size) {
    FIND(object, KERNEL, handle);
    if (i >= (size_t)object->kernel->parameter_count) return INVALID_VALUE;
    *offset = object->kernel->parameters[i].offset;
    if (size) *size = object->kernel->parameters[i].size;
    return SUCCESS;
}

EXPORT Result cuKernelGetParamInfo(Handle kernel, size_t index, size_t *offset, size_t *size) {
    ENTER(cuKernelGetParamInfo);
    return parameter(self, kernel, index, offset, size);
}

EXPORT Result cuFuncGetParamInfo(Handle function, size_t index, size_t *offset, size_t *size) {
    ENTER(cuFuncGetParamInfo);
    return parameter(self, function, index, offset, size);
}

/* --- launches --------------------------------------------------------------------------------- */

struct launch {
    unsigned grid[3], block[3], shared;
    Handle stream;
    void *attributes;
    unsigned attribute_count;
};

static int registers_of_block(const struct kernel *kernel, int threads) {
    int warps = (threads + 31) / 32, a_warp = (kernel->registers * 32 + 255) / 256 * 256;
    return warps * a_warp;
}

/* What a device of this kind refuses, with its error. */
static Result check_limits(const struct kernel *kernel, const struct launch *launch) {
    uint64_t threads = 1;
    for (int i = 0; i < 3; i++) {
        unsigned most_blocks = attribute_of_device(5 + i), most = attribute_of_device(2 + i);
        if (launch->grid[i] < 1 || launch->grid[i] > most_blocks || launch->block[i] < 1 ||
            launch->block[i] > most) {
            violation("launch of %s: grid (%u, %u, %u), block (%u, %u, %u)", kernel->name,
                      launch->grid[0], launch->grid[1], launch->grid[2], launch->block[0],
                      launch->block[1], launch->block[2]);
            return INVALID_VALUE;
        }
        threads *= launch->block[i];
    }
    if (threads > (uint64_t)kernel->max_threads || threads > MAX_THREADS) {
        violation("launch of %s: %lu threads a block, at most %d", kernel->name, (long)threads,
                  kernel->max_threads);
        return INVALID_VALUE;
    }
    int most = kernel->max_dynamic_shared ? kernel->max_dynamic_shared
                                          : MAX_SHARED - kernel->static_shared;
    if ((int)launch->shared > most || kernel->static_shared > MAX_SHARED) {
        violation("launch of %s: %u bytes of dynamic shared memory beside %d static, at most %d",
                  kernel->name, launch->shared, kernel->static_shared, most);
        return INVALID_VALUE;
    }
    if (registers_of_block(kernel, threads) > REGISTERS) {
        violation("launch of %s: %d registers a thread for %lu threads", kernel->name,
                  kernel->registers, (long)threads);
        return OUT_OF_RESOURCES;
    }
    return SUCCESS;
}

/* What was announced is what the kernel takes. The driver itself cannot tell: it reads what it
 * needs at the addresses that it is given. */
static Result check_arguments(const struct kernel *kernel) {
    int count = announced;
    announced = -1;
    if (count < 0) {
        unannounced++;
        return SUCCESS;
    }
    if (count != kernel->parameter_count) {
        violation("launch of %s: %d arguments, it takes %d", kernel->name, count,
                  kernel->parameter_count);
        return INVALID_VALUE;
    }
    for (int i = 0; i < count; i++)
        if ((int)announced_sizes[i] != kernel->parameters[i].size) {
            violation("launch of %s: argument %d has %zu bytes, it takes %d", kernel->name, i,
                      announced_sizes[i], kernel->parameters[i].size);
            return INVALID_VALUE;
        }
    return SUCCESS;
}

/* The allocations that a launch was given: every aligned word that is an address in one. */
static void note_reads(struct list *reads, const struct kernel *kernel, void **values) {
    for (int i = 0; i < kernel->parameter_count; i++)
        for (int at = 0; at + 8 <= kernel->parameters[i].size; at += 8) {
            Address address;
            memcpy(&address, (const char *)values[i] + at, sizeof address);
            int found = allocation(address, 1);
            if (found >= 0) append(reads, found);
        }
}

static Result submit(const char *self, const struct launch *launch, Handle function, void **values) {
    FIND(object, KERNEL, function);
    FIND(stream, STREAM, launch->stream);
    const struct kernel *kernel = object->kernel;
    Result status = check_arguments(kernel);
    if (status == SUCCESS) status = check_limits(kernel, launch);
    if (status != SUCCESS) return status;
    launches++;
    if (captured(self, launch->stream, stream, &status)) {
        captured_launches++;
        if (values) note_reads(&capture.reads, kernel, values);
    }
    return status;
}

EXPORT Result cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                             Handle stream, void **values, void **extra) {
    ENTER(cuLaunchKernel);
    (void)extra;
    struct launch launch = {
        {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream, NULL, 0};
    return submit(self, &launch, function, values);
}

EXPORT Result cuLaunchKernelEx(const struct launch *launch, Handle function, void **values,
                               void **extra) {
    ENTER(cuLaunchKernelEx);
    (void)extra;
    return submit(self, launch, function, values);
}

/* How many blocks fit beside one another, by threads, registers and shared memory. */
static Result occupancy(const char *self, int *blocks, Handle function, int threads, size_t dynamic) {
    FIND(object, KERNEL, function);
    const struct kernel *kernel = object->kernel;
    int shared = kernel->static_shared + (int)dynamic + RESERVED_SHARED, fit = BLOCKS_A_MULTIPROCESSOR;
    int registers = registers_of_block(kernel, threads);
    if (threads < 1 || threads > MAX_THREADS) return INVALID_VALUE;
    if (THREADS_A_MULTIPROCESSOR / threads < fit) fit = THREADS_A_MULTIPROCESSOR / threads;
    if (registers && REGISTERS / registers < fit) fit = REGISTERS / registers;
    if (SHARED_A_MULTIPROCESSOR / shared < fit) fit = SHARED_A_MULTIPROCESSOR / shared;
    *blocks = fit;
    return SUCCESS;
}

EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Handle function, int threads,
                                                          size_t dynamic) {
    ENTER(cuOccupancyMaxActiveBlocksPerMultiprocessor);
    return occupancy(self, blocks, function, threads, dynamic);
}

EXPORT Result cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, Handle function, int threads, size_t dynamic, unsigned flags) {
    ENTER(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags);
    (void)flags;
    return occupancy(self, blocks, function, threads, dynamic);
}

/* --- finding functions ------------------------------------------------------------------------ */

EXPORT Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags,
                               int *status);

#define ADDRESS(name, rule) (void *)name,
static void *const addresses[] = {FUNCTIONS(ADDRESS)};

EXPORT Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags,
                               int *status) {
    ENTER(cuGetProcAddress);
    (void)version, (void)flags;
    *function = NULL;
    for (int i = 0; i < FUNCTION_COUNT && !*function; i++)
        if (!strcmp(names[i], name)) *function = addresses[i];
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
ALIAS(cuGetProcAddress, cuGetProcAddress_v2)

/* --- for the tests ---------------------------------------------------------------------------- */

/* The number of bytes of each argument of the next launch, as its caller packed them. */
EXPORT void stub_announce_arguments(int count, const size_t *sizes) {
    pthread_mutex_lock(&lock);
    announced = count < 1024 ? count : 1024;
    memcpy(announced_sizes, sizes, announced * sizeof *sizes);
    pthread_mutex_unlock(&lock);
}

/* Forget calls, counts and violations, not what is alive. */
EXPORT void stub_forget(void) {
    pthread_mutex_lock(&lock);
    memset(calls, 0, sizeof calls);
    captures = launches = captured_launches = graph_launches = unannounced = 0;
    for (int i = 0; i < violation_count; i++) free(violations[i]);
    violation_count = 0;
    announced = -1;
    pthread_mutex_unlock(&lock);
}

static void write_text(FILE *file, const char *text) {
    fputc('"', file);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') fputc('\\', file);
        fputc(*text, file);
    }
    fputc('"', file);
}

/* Everything that happened since the last stub_forget, and what is alive, as JSON. */
EXPORT int stub_report(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return -1;
    pthread_mutex_lock(&lock);
    fprintf(file, "{\"captures\": %ld, \"launches\": %ld, \"captured launches\": %ld, "
            "\"graph launches\": %ld, \"unannounced launches\": %ld, \"device bytes\": %zu,\n",
            captures, launches, captured_launches, graph_launches, unannounced, device_bytes);
    fprintf(file, "\"calls\": {");
    const char *comma = "";
    for (int i = 0; i < FUNCTION_COUNT; i++)
        if (calls[i]) {
            fprintf(file, "%s\"%s\": %ld", comma, names[i], calls[i]);
            comma = ", ";
        }
    fprintf(file, "},\n\"live\": {");
    for (int i = 0; i < KINDS; i++)
        fprintf(file, "%s\"%s\": %ld", i ? ", " : "", kind_names[i], live[i]);
    fprintf(file, "},\n\"violations\": [");
    for (int i = 0; i < violation_count; i++) {
        fprintf(file, "%s", i ? ",\n" : "\n");
        write_text(file, violations[i]);
    }
    fprintf(file, "]}\n");
    pthread_mutex_unlock(&lock);
    return fclose(file);
}

__attribute__((constructor)) static void begin(void) {
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &recursive);
}

__attribute__((destructor)) static void end(void) {
    const char *path = getenv("STUB_DRIVER_LOG");
    if (path) stub_report(path);
}
