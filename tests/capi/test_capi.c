/* The C ABI as a C program sees it: encode, restore, multiply, slice, concat, pack, and refuse. Linked with
 * libxorz.a alone. Usage: test_capi <folder for files>. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xorz.h"

enum { N = 37, K = 53, M = 5 };

static int failures = 0;
static xorz_error error;

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      fprintf(stderr, "%s:%d: failed: %s (last error: %s)\n", __FILE__, __LINE__, #condition, \
              error.message);                                                                 \
      failures++;                                                                             \
    }                                                                                         \
  } while (0)

#define REFUSED(call, want, part)                    \
  do {                                               \
    memset(&error, 0, sizeof error);                 \
    CHECK((call) == (want) && error.kind == (want)); \
    CHECK(strstr(error.message, (part)) != NULL);    \
  } while (0)

static uint32_t state = 1;
static float small_integer(void) { /* sums of their products are exact in f32 */
  state = state * 1664525u + 1013904223u;
  return (float)((int)(state >> 24) % 9 - 4);
}

static xorz_matrix matrix(const float* words, size_t n, size_t k) {
  xorz_matrix m = {words, n * k * sizeof(float), n, k, XORZ_F32};
  return m;
}

/* An executor of two POSIX threads. */
struct half {
  size_t first, end;
  xorz_task task;
  const void* context;
};
static void* run_half(void* p) {
  struct half* h = p;
  for (size_t i = h->first; i < h->end; i++) h->task(h->context, i);
  return NULL;
}
static int32_t run_two(void* calls, size_t tasks, xorz_task task, const void* task_context) {
  struct half a = {0, tasks / 2, task, task_context}, b = {tasks / 2, tasks, task, task_context};
  pthread_t thread;
  ++*(int*)calls;
  if (pthread_create(&thread, NULL, run_half, &a) != 0) return 1;
  run_half(&b);
  return pthread_join(thread, NULL);
}
/* One that runs nothing, one that runs everything twice, one that fails. */
static int32_t run_none(void* c, size_t tasks, xorz_task task, const void* task_context) {
  (void)c, (void)tasks, (void)task, (void)task_context;
  return 0;
}
static int32_t run_twice(void* c, size_t tasks, xorz_task task, const void* task_context) {
  (void)c;
  for (size_t i = 0; i < 2 * tasks + 3; i++) task(task_context, i / 2);
  return 0;
}
static int32_t run_failing(void* c, size_t tasks, xorz_task task, const void* task_context) {
  run_twice(c, tasks, task, task_context);
  return 7;
}

static float base[N * K], fine_tuned[N * K], restored[N * K], input[M * K], bias[N], grad[M * N];
static float out[M * N], want[M * N], out_grad[M * K];

static void make_data(int step) {
  for (int i = 0; i < N * K; i++) {
    base[i] = small_integer();
    fine_tuned[i] = base[i];
  }
  for (int i = 0; i < N * K; i += step) fine_tuned[i] += (i % 2) ? 1.0f : -2.0f;
  for (int i = 0; i < M * K; i++) input[i] = small_integer();
  for (int i = 0; i < N; i++) bias[i] = small_integer();
  for (int i = 0; i < M * N; i++) grad[i] = small_integer();
  for (int s = 0; s < M; s++)
    for (int j = 0; j < N; j++) {
      double sum = bias[j];
      for (int c = 0; c < K; c++) sum += (double)input[s * K + c] * fine_tuned[j * K + c];
      want[s * N + j] = (float)sum;
    }
}

static void test_products(int step, int32_t prefer) {
  make_data(step);
  xorz_matrix w = matrix(base, N, K), f = matrix(fine_tuned, N, K), x = matrix(input, M, K),
              g = matrix(grad, M, N);
  xorz_buffer delta = {NULL, 0};
  CHECK(xorz_delta_encode(&w, &f, prefer, &delta, NULL, &error) == XORZ_OK);
  CHECK(xorz_delta_check(delta.data, delta.length, &w, &error) == XORZ_OK);
  CHECK(xorz_delta_matches(delta.data, delta.length, &w, &error) == XORZ_OK);

  xorz_delta_info_t info;
  CHECK(xorz_delta_info(delta.data, delta.length, &info, &error) == XORZ_OK);
  CHECK(info.n == N && info.k == K && info.dtype == XORZ_F32 &&
        info.changed == (size_t)((N * K + step - 1) / step));

  CHECK(xorz_delta_restore(&w, delta.data, delta.length, restored, sizeof restored, NULL, &error) == XORZ_OK);
  CHECK(memcmp(restored, fine_tuned, sizeof restored) == 0);

  xorz_buffer exchange = {NULL, 0};
  uint64_t changed = 0;
  xorz_matrix inside = matrix(restored, N, K);
  CHECK(xorz_exchange_encode(&w, &f, &exchange, &changed, &error) == XORZ_OK);
  CHECK(changed == info.changed);
  CHECK(xorz_exchange_apply(&inside, exchange.data, exchange.length, 1, &error) == XORZ_OK);
  CHECK(memcmp(restored, base, sizeof restored) == 0);
  REFUSED(xorz_exchange_apply(&inside, exchange.data, exchange.length, 1, &error), XORZ_MISMATCH, "digest");
  CHECK(xorz_exchange_apply(&inside, exchange.data, exchange.length, 0, &error) == XORZ_OK);
  CHECK(memcmp(restored, fine_tuned, sizeof restored) == 0);
  REFUSED(xorz_exchange_apply(&inside, exchange.data, exchange.length - 1, 0, &error), XORZ_TRUNCATED,
          "bytes");
  inside.n--;
  inside.bytes -= K * 4;
  REFUSED(xorz_exchange_apply(&inside, exchange.data, exchange.length, 1, &error), XORZ_MISMATCH, "words");
  REFUSED(xorz_exchange_encode(&w, &inside, &exchange, &changed, &error), XORZ_MISMATCH, "[36, 53]");
  REFUSED(xorz_exchange_encode(&w, &f, &exchange, NULL, &error), XORZ_INVALID_ARGUMENT, "changed");
  xorz_buffer_free(&exchange);
  memset(restored, 0, sizeof restored);
  CHECK(xorz_delta_restore_rows(&w, delta.data, delta.length, 3, 20, restored, 17 * K * 4, NULL, &error) ==
        XORZ_OK);
  CHECK(memcmp(restored, fine_tuned + 3 * K, 17 * K * 4) == 0);
  CHECK(xorz_delta_restore_region(&w, delta.data, delta.length, 3, 20, 5, 12, restored, 17 * 7 * 4, NULL,
                                  &error) == XORZ_OK);
  for (int row = 0; row < 17; ++row)
    CHECK(memcmp(restored + row * 7, fine_tuned + (3 + row) * K + 5, 7 * 4) == 0);

  int calls = 0;
  xorz_executor two = {&calls, 2, run_two};
  const xorz_executor* executors[] = {NULL, &two};
  for (int e = 0; e < 2; e++)
    for (int32_t mode = XORZ_MODE_FAST; mode <= XORZ_MODE_DETERMINISTIC; mode++) {
      memset(out, 0, sizeof out);
      CHECK(xorz_delta_linear(&x, &w, bias, delta.data, delta.length, mode, out, sizeof out, executors[e],
                              &error) == XORZ_OK);
      CHECK(memcmp(out, want, sizeof out) == 0);
    }
  CHECK(calls > 0);

  CHECK(xorz_delta_linear_grad_input(&g, &w, delta.data, delta.length, out_grad, sizeof out_grad, &two,
                                     &error) == XORZ_OK);
  for (int s = 0; s < M; s++)
    for (int c = 0; c < K; c++) {
      double sum = 0;
      for (int j = 0; j < N; j++) sum += (double)grad[s * N + j] * fine_tuned[j * K + c];
      CHECK(out_grad[s * K + c] == (float)sum);
    }

  /* Rows 0..16 and 16..N, cut and joined, are the whole again. */
  xorz_buffer top = {NULL, 0}, bottom = {NULL, 0}, joined = {NULL, 0};
  CHECK(xorz_delta_slice(delta.data, delta.length, &w, 0, 0, 16, &top, &error) == XORZ_OK);
  CHECK(xorz_delta_slice(delta.data, delta.length, &w, 0, 16, N, &bottom, &error) == XORZ_OK);
  xorz_part parts[] = {{top.data, top.length, matrix(base, 16, K)},
                       {bottom.data, bottom.length, matrix(base + 16 * K, N - 16, K)}};
  CHECK(xorz_delta_concat(parts, 2, 0, &joined, &error) == XORZ_OK);
  CHECK(xorz_delta_restore(&w, joined.data, joined.length, restored, sizeof restored, NULL, &error) ==
        XORZ_OK);
  CHECK(memcmp(restored, fine_tuned, sizeof restored) == 0);
  xorz_buffer_free(&top);
  xorz_buffer_free(&bottom);
  xorz_buffer_free(&joined);

  memcpy(restored, base, sizeof base);
  xorz_matrix mine = matrix(restored, N, K);
  CHECK(xorz_delta_apply(&mine, delta.data, delta.length, NULL, &error) == XORZ_OK);
  CHECK(memcmp(restored, fine_tuned, sizeof restored) == 0);
  REFUSED(xorz_delta_apply(&mine, delta.data, delta.length, NULL, &error), XORZ_MISMATCH, "digest");
  CHECK(memcmp(restored, fine_tuned, sizeof restored) == 0);
  xorz_buffer_free(&delta);
  CHECK(delta.data == NULL && delta.length == 0);
  xorz_buffer_free(&delta);
  xorz_buffer_free(NULL);
}

static void test_refusals(void) {
  make_data(20);
  xorz_matrix w = matrix(base, N, K), f = matrix(fine_tuned, N, K), x = matrix(input, M, K);
  xorz_buffer delta = {NULL, 0};
  CHECK(xorz_delta_encode(&w, &f, XORZ_PREFER_SPEED, &delta, NULL, &error) == XORZ_OK);
  const uint8_t* d = delta.data;
  const size_t len = delta.length;

  xorz_matrix bad = w;
  bad.words = NULL;
  REFUSED(xorz_delta_check(d, len, &bad, &error), XORZ_INVALID_ARGUMENT, "base.words is NULL");
  REFUSED(xorz_delta_check(d, len, NULL, &error), XORZ_INVALID_ARGUMENT, "base is NULL");
  REFUSED(xorz_delta_check(NULL, len, &w, &error), XORZ_INVALID_ARGUMENT, "delta is NULL");
  CHECK(xorz_delta_check(NULL, 0, &w, &error) != XORZ_OK);
  bad = w;
  bad.dtype = 99;
  REFUSED(xorz_delta_check(d, len, &bad, &error), XORZ_INVALID_ARGUMENT, "99");
  bad = w;
  bad.bytes -= 4;
  REFUSED(xorz_delta_check(d, len, &bad, &error), XORZ_MISMATCH, "bytes");
  bad = w;
  bad.n = SIZE_MAX / 2;
  CHECK(xorz_delta_check(d, len, &bad, &error) != XORZ_OK);
  bad = matrix(base, K, N);
  REFUSED(xorz_delta_restore(&bad, d, len, restored, sizeof restored, NULL, &error), XORZ_MISMATCH,
          "[53, 37]");
  REFUSED(xorz_delta_check(d, len, &f, &error), XORZ_MISMATCH, "digest");
  REFUSED(xorz_delta_matches(d, len, &f, &error), XORZ_MISMATCH, "digest");
  delta.data[len - 1] ^= 1;
  REFUSED(xorz_delta_matches(d, len, &w, &error), XORZ_CORRUPT, "digest");
  delta.data[len - 1] ^= 1;
  REFUSED(xorz_delta_check(d, 10, &w, &error), XORZ_TRUNCATED, "10");
  REFUSED(xorz_delta_restore(&w, d, len, restored, 12, NULL, &error), XORZ_MISMATCH, "12");
  REFUSED(xorz_delta_restore(&w, d, len, NULL, sizeof restored, NULL, &error), XORZ_INVALID_ARGUMENT,
          "out is NULL");
  REFUSED(xorz_delta_restore_rows(&w, d, len, 5, 4, restored, 0, NULL, &error), XORZ_INVALID_ARGUMENT, "5");
  REFUSED(xorz_delta_restore_rows(&w, d, len, 0, N + 1, restored, sizeof restored, NULL, &error),
          XORZ_INVALID_ARGUMENT, "38");
  REFUSED(xorz_delta_restore_region(&w, d, len, 0, N, 7, K + 1, restored, sizeof restored, NULL, &error),
          XORZ_INVALID_ARGUMENT, "columns 7..54 are not within 0..53");
  REFUSED(xorz_delta_restore_region(&w, d, len, 0, 2, 0, 3, restored, 20, NULL, &error), XORZ_MISMATCH,
          "take 24");
  REFUSED(xorz_delta_linear(&x, &w, bias, d, len, 9, out, sizeof out, NULL, &error), XORZ_INVALID_ARGUMENT,
          "9");
  REFUSED(xorz_delta_linear(&x, &w, bias, d, len, 0, out, 8, NULL, &error), XORZ_MISMATCH, "out_bytes is 8");
  bad = matrix(input, M, K - 1);
  REFUSED(xorz_delta_linear(&bad, &w, bias, d, len, 0, out, sizeof out, NULL, &error), XORZ_MISMATCH, "52");
  REFUSED(xorz_delta_encode(&w, &f, 5, &delta, NULL, &error), XORZ_INVALID_ARGUMENT, "prefer");
  REFUSED(xorz_delta_encode(&w, &f, 0, NULL, NULL, &error), XORZ_INVALID_ARGUMENT, "delta is NULL");
  REFUSED(xorz_delta_slice(d, len, &w, 0, 3, N + 9, &delta, &error), XORZ_INVALID_ARGUMENT, "46");
  REFUSED(xorz_delta_concat(NULL, 2, 0, &delta, &error), XORZ_INVALID_ARGUMENT, "parts is NULL");
  CHECK(xorz_delta_check(d, 10, &w, NULL) == XORZ_TRUNCATED); /* error may be NULL */

  xorz_executor none = {NULL, 2, run_none}, twice = {NULL, 2, run_twice}, failing = {NULL, 2, run_failing},
                null = {NULL, 2, NULL};
  REFUSED(xorz_delta_linear(&x, &w, bias, d, len, 0, out, sizeof out, &none, &error), XORZ_INTERNAL,
          "ran 0 of");
  REFUSED(xorz_delta_linear(&x, &w, bias, d, len, 0, out, sizeof out, &failing, &error), XORZ_INTERNAL,
          "code 7");
  REFUSED(xorz_delta_linear(&x, &w, bias, d, len, 0, out, sizeof out, &null, &error), XORZ_INVALID_ARGUMENT,
          "run");
  CHECK(xorz_delta_linear(&x, &w, bias, d, len, 0, out, sizeof out, &twice, &error) == XORZ_OK);
  CHECK(memcmp(out, want, sizeof out) == 0);

  /* Every byte of a delta broken: refused, or harmless. */
  uint8_t* copy = malloc(len);
  for (size_t i = 0; i < len; i++) {
    memcpy(copy, d, len);
    copy[i] ^= 0xFF;
    xorz_delta_linear(&x, &w, bias, copy, len, 0, out, sizeof out, NULL, &error);
    xorz_delta_restore(&w, copy, len, restored, sizeof restored, NULL, &error);
    CHECK(xorz_delta_check(copy, len, &w, &error) != XORZ_OK);
  }
  free(copy);
  xorz_buffer delta_again = {(uint8_t*)d, len};
  xorz_buffer_free(&delta_again);
}

static void path_in(char* to, size_t size, const char* folder, const char* name) {
  snprintf(to, size, "%s/%s", folder, name);
}

static void test_packages(const char* folder) {
  make_data(30);
  char path[4096], absent[4096];
  path_in(path, sizeof path, folder, "capi.xorz");
  path_in(absent, sizeof absent, folder, "no such folder/capi.xorz");
  const size_t dims[] = {N, K}, bias_dims[] = {N};
  xorz_tensor w = {"w", "F32", dims, 2, base, sizeof base},
              f = {"w", "F32", dims, 2, fine_tuned, sizeof fine_tuned},
              b = {"b", "F32", bias_dims, 1, bias, sizeof bias};
  xorz_options options = {XORZ_PREFER_SPEED, XORZ_CODEC_SMALLEST, 0, XORZ_TRUST_SHA256, NULL};
  xorz_writer* writer = NULL;
  REFUSED(xorz_writer_new(absent, &options, &writer, &error), XORZ_IO, "");
  REFUSED(xorz_writer_new(NULL, &options, &writer, &error), XORZ_INVALID_ARGUMENT, "path is NULL");
  CHECK(xorz_writer_new(path, &options, &writer, &error) == XORZ_OK);
  CHECK(xorz_writer_add(writer, &f, &w, &error) == XORZ_OK);
  CHECK(xorz_writer_add(writer, &b, NULL, &error) == XORZ_OK);
  REFUSED(xorz_writer_add(writer, &b, NULL, &error), XORZ_INVALID_ARGUMENT, "`b`");
  CHECK(xorz_writer_removed(writer, "gone", &error) == XORZ_OK);
  xorz_buffer json = {NULL, 0};
  CHECK(xorz_writer_finish(writer, &json, &error) == XORZ_OK);
  CHECK(json.length > 2 && json.data[0] == '{');
  xorz_buffer_free(&json);
  CHECK(xorz_writer_new(path, &options, &writer, &error) == XORZ_OK);
  xorz_writer_free(writer);

  xorz_package* package = NULL;
  REFUSED(xorz_package_open(absent, &package, &error), XORZ_IO, "");
  CHECK(xorz_package_open(path, &package, &error) == XORZ_OK);
  CHECK(xorz_package_describe(package, &json, &error) == XORZ_OK);
  CHECK(json.length > 2 && json.data[0] == '{');
  xorz_buffer_free(&json);
  REFUSED(xorz_package_trust(package, 7, &error), XORZ_INVALID_ARGUMENT, "trust");
  CHECK(xorz_package_trust(package, XORZ_TRUST_SHA256, &error) == XORZ_OK);
  xorz_matrix from = matrix(base, N, K), wrong = matrix(fine_tuned, N, K);
  memset(restored, 0, sizeof restored);
  CHECK(xorz_package_restore(package, "w", &from, restored, sizeof restored, &error) == XORZ_OK);
  CHECK(memcmp(restored, fine_tuned, sizeof restored) == 0);
  CHECK(xorz_package_restore(package, "b", NULL, out, sizeof bias, &error) == XORZ_OK);
  CHECK(memcmp(out, bias, sizeof bias) == 0);
  REFUSED(xorz_package_restore(package, "w", &wrong, restored, sizeof restored, &error), XORZ_MISMATCH,
          "`w`");
  REFUSED(xorz_package_restore(package, "w", NULL, restored, sizeof restored, &error), XORZ_MISMATCH, "`w`");
  REFUSED(xorz_package_restore(package, "v", &from, restored, sizeof restored, &error), XORZ_INVALID_ARGUMENT,
          "`v`");
  xorz_buffer delta = {NULL, 0};
  CHECK(xorz_package_resident(package, "w", &from, XORZ_PREFER_STORED, &delta, &error) == XORZ_OK);
  xorz_delta_info_t info;
  CHECK(xorz_delta_info(delta.data, delta.length, &info, &error) == XORZ_OK);
  /* The same of a base whose words are elsewhere: none is read. */
  xorz_matrix away = from;
  away.words = NULL;
  xorz_buffer same = {NULL, 0};
  CHECK(xorz_delta_matches_known(delta.data, delta.length, &away, info.base_digest, &error) == XORZ_OK);
  REFUSED(xorz_delta_matches_known(delta.data, delta.length, &away, NULL, &error), XORZ_INVALID_ARGUMENT,
          "digest is NULL");
  /* This package may not be believed without a sha256, which is one of words. */
  CHECK(xorz_package_resident_known(package, "w", &away, info.base_digest, XORZ_PREFER_STORED, &same,
                                    &error) == XORZ_OK);
  CHECK(same.length == 0);
  xorz_buffer_free(&same);
  info.base_digest[0] ^= 1;
  REFUSED(xorz_delta_matches_known(delta.data, delta.length, &away, info.base_digest, &error), XORZ_MISMATCH,
          "digest");
  REFUSED(
      xorz_package_resident_known(package, "w", &away, info.base_digest, XORZ_PREFER_STORED, &same, &error),
      XORZ_MISMATCH, "`w`");
  CHECK(xorz_cuda_open(-1, &error) != XORZ_OK && strlen(error.message) > 0);
  xorz_matrix x = matrix(input, M, K);
  CHECK(xorz_delta_linear(&x, &from, bias, delta.data, delta.length, 0, out, sizeof out, NULL, &error) ==
        XORZ_OK);
  CHECK(memcmp(out, want, sizeof out) == 0);
  xorz_buffer_free(&delta);
  xorz_package_close(package);

  /* One that was packed without cannot be trusted. */
  options.trust = XORZ_TRUST_DIGEST;
  CHECK(xorz_writer_new(path, &options, &writer, &error) == XORZ_OK);
  CHECK(xorz_writer_add(writer, &f, &w, &error) == XORZ_OK);
  CHECK(xorz_writer_finish(writer, NULL, &error) == XORZ_OK);
  CHECK(xorz_package_open(path, &package, &error) == XORZ_OK);
  REFUSED(xorz_package_trust(package, XORZ_TRUST_SHA256, &error), XORZ_MISMATCH, "`w`");
  xorz_package_close(package);
  /* Where there is no place for a result, none is left. */
  REFUSED(xorz_delta_encode(&from, &wrong, XORZ_PREFER_SPEED, NULL, NULL, &error), XORZ_INVALID_ARGUMENT,
          "delta is NULL");
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: test_capi <folder>\n");
    return 2;
  }
  CHECK(xorz_abi_version() == XORZ_ABI_VERSION);
  CHECK(strlen(xorz_version()) > 0);
  CHECK(sizeof(xorz_error) == 1024);
  const int steps[] = {N * K + 1, 40, 3, 1}; /* one word changed (step beyond the end), 2.5 %, a third, all */
  for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
    test_products(steps[i], XORZ_PREFER_SPEED);
    test_products(steps[i], XORZ_PREFER_MEMORY);
  }
  test_refusals();
  test_packages(argv[1]);
  xorz_reset_counters();
  CHECK(xorz_panels_restored() == 0 && xorz_scratch_peak_bytes() == 0);
  if (failures) {
    fprintf(stderr, "capi: %d checks failed\n", failures);
    return 1;
  }
  printf("capi: all checks passed\n");
  return 0;
}
