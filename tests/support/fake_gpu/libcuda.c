/* A libcuda.so.1 of this machine's memory: work waits until it is awaited, and misuse is written down.

   Memory is filled with 0xff (NaN) when it is made, when it is freed, and where a copy is still to
   arrive. What a real driver would not notice (memory used after it was freed, host memory changed
   under a copy) is a complaint, which a test reads; what it would notice is an error as well. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4096, SPARE = 65536 };
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_CAPTURED = 900 };
enum kind { IN, OUT, WITHIN, CLEAR, CALL };

typedef struct { unsigned char *base; size_t size; int alive, on_device; } block;
typedef struct {
  enum kind kind;
  unsigned char *target, *source;
  size_t size;
  uint64_t sum;
  int (*call)(int);
  int argument;
} work;
typedef struct { work items[MOST]; int count; } list;
typedef struct { list queue, *recording; int spoilt; } stream;

static block blocks[SPARE];
static int block_count;
static size_t limit_bytes = (size_t)1 << 40, used_bytes;
static char said[1 << 16];
static long calls, allocations;
static __thread void *current_context;

static void complain(const char *form, ...) {
  va_list values;
  size_t length = strlen(said);
  va_start(values, form);
  vsnprintf(said + length, sizeof said - length - 2, form, values);
  va_end(values);
  strcat(said, "\n");
}

static int refuse(int status, const char *why) { complain("%s", why); return status; }

static block *find(const void *address) {
  const unsigned char *at = address;
  for (int i = block_count - 1; i >= 0; i--)
    if (at >= blocks[i].base && at < blocks[i].base + blocks[i].size) return &blocks[i];
  return NULL;
}

/* Whether so many bytes there are alive, and of the GPU or of the CPU. */
static int holds(const void *address, size_t size, int on_device, const char *what) {
  block *found = find(address);
  if (size == 0) return 1;
  if (!found) { complain("%s: %p is no memory of the %s", what, address, on_device ? "GPU" : "CPU"); return 0; }
  if (!found->alive) { complain("%s: memory is used after it was freed", what); return 0; }
  if (found->on_device != on_device) { complain("%s: memory of the wrong side", what); return 0; }
  if ((const unsigned char *)address + size > found->base + found->size) {
    complain("%s: beyond the end of the memory", what);
    return 0;
  }
  return 1;
}

static uint64_t sum_of(const unsigned char *bytes, size_t size) {
  uint64_t sum = 1469598103934665603u;
  for (size_t i = 0; i < size; i++) sum = (sum ^ bytes[i]) * 1099511628211u;
  return sum;
}

/* ---- for the fake TensorRT and the tests ---- */

const char *fake_complaints(void) { return said; }
void fake_forget_complaints(void) { said[0] = 0; }
long fake_calls(void) { return calls; }
long fake_allocations(void) { return allocations; }
size_t fake_used_bytes(void) { return used_bytes; }
void fake_limit_memory(size_t size) { limit_bytes = size; }
void fake_complain(const char *what) { complain("%s", what); }
int fake_holds(void *address, size_t size, int on_device, const char *what) { return holds(address, size, on_device, what); }
int fake_is_recording(stream *given) { return given->recording != NULL; }
void fake_spoil_recording(stream *given) { given->spoilt = 1; }

static int give(stream *to, work item) {
  list *into = to->recording ? to->recording : &to->queue;
  if (!current_context) return refuse(201, "no context is current in this thread");
  if (into->count == MOST) return refuse(999, "the fake's queue is full");
  if (!to->recording) {
    if (item.kind == IN) item.sum = sum_of(item.source, item.size);
    if (item.kind == OUT) memset(item.target, 0xff, item.size);
  }
  into->items[into->count++] = item;
  return OK;
}

int fake_enqueue(stream *to, int (*call)(int), int argument) {
  return give(to, (work){.kind = CALL, .call = call, .argument = argument});
}

/* ---- the driver's own ---- */

int cuInit(unsigned flags) { calls++; return flags ? INVALID : OK; }
int cuDriverGetVersion(int *version) { calls++; *version = 12060; return OK; }
int cuDeviceGet(int *device, int ordinal) { calls++; *device = ordinal; return ordinal == 0 ? OK : 101; }
int cuDeviceGetName(char *name, int length, int device) { calls++; (void)device; snprintf(name, length, "Orin (fake)"); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  calls++; (void)device;
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18 ? 1 : 0;
  return OK;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { calls++; (void)device; *context = &calls; return OK; }
int cuCtxSetCurrent(void *context) { calls++; current_context = context; return context ? OK : INVALID; }
int cuGetErrorString(int status, const char **text) {
  *text = status == INVALID ? "invalid argument" : status == NO_MEMORY ? "out of memory"
        : status == NOT_CAPTURED ? "operation not permitted when stream is capturing" : "fake error";
  return OK;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  calls++; *total = limit_bytes; *free_bytes = limit_bytes - used_bytes; return OK;
}

static int make(unsigned char **address, size_t size, int on_device) {
  calls++; allocations++;
  if (used_bytes + size > limit_bytes) return NO_MEMORY;
  if (block_count == SPARE || posix_memalign((void **)address, 256, size)) return NO_MEMORY;
  memset(*address, 0xff, size);
  blocks[block_count++] = (block){*address, size, 1, on_device};
  used_bytes += size;
  return OK;
}

/* Freed memory stays where it is, spoilt, so that whoever still uses it is seen. */
static int drop(void *address, int on_device) {
  block *found = find(address);
  calls++;
  if (!found || found->base != address || found->on_device != on_device) return refuse(INVALID, "what is freed was never given");
  if (!found->alive) return refuse(INVALID, "memory is freed twice");
  memset(found->base, 0xff, found->size);
  found->alive = 0;
  used_bytes -= found->size;
  return OK;
}

int cuMemAlloc_v2(uint64_t *address, size_t size) { return make((unsigned char **)address, size, 1); }
int cuMemFree_v2(uint64_t address) { return drop((void *)address, 1); }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { (void)flags; return make((unsigned char **)address, size, 0); }
int cuMemFreeHost(void *address) { return drop(address, 0); }

int cuMemsetD8Async(uint64_t target, unsigned char value, size_t size, stream *to) {
  calls++;
  if (value || !holds((void *)target, size, 1, "clear")) return INVALID;
  return give(to, (work){.kind = CLEAR, .target = (void *)target, .size = size});
}
int cuMemcpyHtoDAsync_v2(uint64_t target, void *source, size_t size, stream *to) {
  calls++;
  if (!holds((void *)target, size, 1, "copy in")) return INVALID;
  return give(to, (work){.kind = IN, .target = (void *)target, .source = source, .size = size});
}
int cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t size, stream *to) {
  calls++;
  if (!holds((void *)source, size, 1, "copy out")) return INVALID;
  return give(to, (work){.kind = OUT, .target = target, .source = (void *)source, .size = size});
}
int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t size, stream *to) {
  calls++;
  if (!holds((void *)source, size, 1, "copy") || !holds((void *)target, size, 1, "copy")) return INVALID;
  if (target < source + size && source < target + size) return refuse(INVALID, "a copy onto itself");
  return give(to, (work){.kind = WITHIN, .target = (void *)target, .source = (void *)source, .size = size});
}

int cuStreamCreate(stream **made, unsigned flags) { calls++; (void)flags; *made = calloc(1, sizeof **made); return *made ? OK : NO_MEMORY; }
int cuStreamDestroy_v2(stream *given) { calls++; (void)given; return OK; }

static int run(work *item) {
  switch (item->kind) {
    case IN:
      if (sum_of(item->source, item->size) != item->sum) complain("host memory was changed while a copy from it was to come");
      if (!holds(item->target, item->size, 1, "copy in")) return 700;
      memcpy(item->target, item->source, item->size);
      return OK;
    case OUT:
      if (!holds(item->source, item->size, 1, "copy out")) return 700;
      memcpy(item->target, item->source, item->size);
      return OK;
    case WITHIN:
      if (!holds(item->source, item->size, 1, "copy") || !holds(item->target, item->size, 1, "copy")) return 700;
      memcpy(item->target, item->source, item->size);
      return OK;
    case CLEAR:
      if (!holds(item->target, item->size, 1, "clear")) return 700;
      memset(item->target, 0, item->size);
      return OK;
    default: return item->call(item->argument);
  }
}

int cuStreamSynchronize(stream *given) {
  int status = OK;
  calls++;
  if (given->recording) { given->spoilt = 1; return refuse(NOT_CAPTURED, "a stream that records is awaited"); }
  for (int i = 0; i < given->queue.count && !status; i++) status = run(&given->queue.items[i]);
  given->queue.count = 0;
  return status;
}
int cuStreamBeginCapture_v2(stream *given, int mode) {
  calls++; (void)mode;
  if (given->recording) return INVALID;
  given->recording = calloc(1, sizeof *given->recording);
  given->spoilt = 0;
  return OK;
}
int cuStreamEndCapture(stream *given, list **graph) {
  calls++;
  if (!given->recording) return INVALID;
  *graph = given->spoilt ? NULL : given->recording;
  given->recording = NULL;
  return given->spoilt ? 901 : OK;
}
int cuGraphInstantiateWithFlags(list **made, list *graph, uint64_t flags) {
  calls++; (void)flags;
  *made = malloc(sizeof **made);
  memcpy(*made, graph, sizeof *graph);
  return OK;
}
int cuGraphDestroy(list *graph) { calls++; free(graph); return OK; }
int cuGraphExecDestroy(list *graph) { calls++; graph->count = -1; return OK; }
int cuGraphLaunch(list *graph, stream *to) {
  calls++;
  if (graph->count < 0) return refuse(INVALID, "a graph is launched after it was destroyed");
  for (int i = 0; i < graph->count; i++) {
    int status = give(to, graph->items[i]);
    if (status) return status;
  }
  return OK;
}
