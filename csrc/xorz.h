/* xorz.h: the C ABI of xorz, for C and for every language that speaks it. Link libxorz.a (-lm -lpthread
 * -ldl), or load libxorz_torch.so, which exports the same functions.
 *
 * Functions that can fail give 0 or one of xorz_kind, and fill *error (which may be NULL) with the kind and a
 * sentence. Where they fail, outputs are as before or hold unspecified values; nothing is leaked and nothing
 * is half written to disk. No input, file or delta, however broken, may crash the process. What C cannot
 * check is the caller's duty: pointers are NULL or valid for the stated length, alignment beyond that of the
 * declared type is not needed, outputs overlap no input, strings are zero-terminated UTF-8. No pointer is
 * kept after a call returns. Every function may be called from any thread, and on one object from several
 * threads at once where that object is const.
 */
#ifndef XORZ_H
#define XORZ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XORZ_ABI_VERSION 4

/* What went wrong, and on whose side. */
typedef enum xorz_kind {
  XORZ_OK = 0,
  XORZ_CORRUPT = 1,          /* bytes of a package or delta contradict themselves */
  XORZ_TRUNCATED = 2,        /* bytes end before what they announce */
  XORZ_MISMATCH = 3,         /* a delta and another base, a shape and another shape */
  XORZ_UNSUPPORTED = 4,      /* valid, but beyond this version or this op */
  XORZ_INVALID_ARGUMENT = 5, /* never valid */
  XORZ_IO = 6,               /* the operating system refused */
  XORZ_DEVICE = 7,           /* an accelerator refused */
  XORZ_INTERNAL = 8          /* a defect of xorz itself */
} xorz_kind;

#define XORZ_MESSAGE_BYTES 1020
typedef struct xorz_error {
  int32_t kind;
  char message[XORZ_MESSAGE_BYTES]; /* UTF-8, zero-terminated */
} xorz_error;

/* Element types. */
typedef enum xorz_dtype {
  XORZ_F32 = 1,
  XORZ_BF16 = 2,
  XORZ_F16 = 3,
  XORZ_F64 = 4,
  XORZ_U8 = 5,
  XORZ_I8 = 6,
  XORZ_BOOL = 7,
  XORZ_F8_E4M3 = 8,
  XORZ_F8_E5M2 = 9,
  XORZ_U16 = 10,
  XORZ_I16 = 11,
  XORZ_U32 = 12,
  XORZ_I32 = 13,
  XORZ_U64 = 14,
  XORZ_I64 = 15
} xorz_dtype;

typedef enum xorz_encoding {
  XORZ_ENCODING_UNCHANGED = 0,
  XORZ_ENCODING_SPARSE = 1,
  XORZ_ENCODING_EXPONENT = 2,
  XORZ_ENCODING_RAW = 3
} xorz_encoding;

/* What a resident delta is encoded for. XORZ_PREFER_STORED: as the package holds it. XORZ_PREFER_AUTO: MEMORY
 * where this machine decodes it about as fast as memory is read (AVX-512 with VBMI2 and BF16), else SPEED. */
typedef enum xorz_prefer {
  XORZ_PREFER_STORED = -1,
  XORZ_PREFER_SPEED = 0,
  XORZ_PREFER_MEMORY = 1,
  XORZ_PREFER_AUTO = 2
} xorz_prefer;

/* Order of summation: fast, or one order for a row whatever the other rows are. */
typedef enum xorz_mode { XORZ_MODE_FAST = 0, XORZ_MODE_DETERMINISTIC = 1 } xorz_mode;

/* How a package stores a delta. XORZ_CODEC_SMALLEST: the smallest, tensor by tensor. XORZ_CODEC_FAST: the
 * smallest of those that are quickly made and loaded. */
typedef enum xorz_codec {
  XORZ_CODEC_FAST = -2,
  XORZ_CODEC_SMALLEST = -1,
  XORZ_CODEC_XOR = 0, /* one zstd frame of the raw XOR bytes, for exchange */
  XORZ_CODEC_RESIDENT = 1,
  XORZ_CODEC_RESIDENT_ZSTD = 2,
  XORZ_CODEC_PLANES = 3,
  XORZ_CODEC_PREDICTED = 6 /* entropy-coded by what the base predicts */
} xorz_codec;

/* Bytes owned by the library; give them back with xorz_buffer_free. */
typedef struct xorz_buffer {
  uint8_t* data;
  size_t length;
} xorz_buffer;

/* A row-major matrix of n rows and k columns, `bytes` = n * k words of `dtype` (xorz_dtype). */
typedef struct xorz_matrix {
  const void* words;
  size_t bytes;
  size_t n;
  size_t k;
  uint32_t dtype;
} xorz_matrix;

/* Runs one task; never fails. */
typedef void (*xorz_task)(const void* task_context, size_t index);

/* The caller's threads. run calls task(task_context, i) once for every i < tasks, in any order, on any
 * threads (all of which may call it at once), waits for all of them and gives 0. Where an executor may be
 * NULL, that means the calling thread alone. */
typedef struct xorz_executor {
  void* context;
  size_t threads;
  int32_t (*run)(void* context, size_t tasks, xorz_task task, const void* task_context);
} xorz_executor;

uint32_t xorz_abi_version(void);

/* What XORZ_PREFER_AUTO comes to on this machine: XORZ_PREFER_SPEED or XORZ_PREFER_MEMORY. */
int32_t xorz_prefer_auto(void);
const char* xorz_version(void); /* static */
void xorz_buffer_free(xorz_buffer* buffer);

/* ---- resident deltas: one matrix, in the form that products are computed on ---- */

typedef struct xorz_delta_info_t {
  uint32_t encoding; /* xorz_encoding */
  uint32_t dtype;    /* xorz_dtype */
  uint64_t n;
  uint64_t k;
  uint64_t tile_rows;
  uint64_t tile_cols;
  uint64_t changed; /* words that differ from the base */
  uint8_t base_digest[16];
} xorz_delta_info_t;

typedef struct xorz_part {
  const void* delta;
  size_t delta_bytes;
  xorz_matrix base;
} xorz_part;

/* Reads the header alone. */
int32_t xorz_delta_info(const void* delta, size_t delta_bytes, xorz_delta_info_t* info, xorz_error* error);

/* delta := from base to fine_tuned; same dtype and shape. */
int32_t xorz_delta_encode(const xorz_matrix* base, const xorz_matrix* fine_tuned, int32_t prefer,
                          xorz_buffer* delta, const xorz_executor* executor, xorz_error* error);

/* Full validation, the digest of base included. */
int32_t xorz_delta_check(const void* delta, size_t delta_bytes, const xorz_matrix* base, xorz_error* error);

/* What xorz_delta_apply checks before the first word changes: the delta's bytes against their digest, that
 * base is its base, and that every stream ends where its words do, so that of a forged delta, too, no word is
 * changed. Cheaper than xorz_delta_check: only encoding exponent is decoded. */
int32_t xorz_delta_matches(const void* delta, size_t delta_bytes, const xorz_matrix* base, xorz_error* error);

/* The same of a base that is elsewhere, such as in a device's memory, of which somebody knows dtype, shape
 * and digest (16 bytes): base->words is not read, and no stream is looked at. */
int32_t xorz_delta_matches_known(const void* delta, size_t delta_bytes, const xorz_matrix* base,
                                 const uint8_t* digest, xorz_error* error);

/* out := the fine-tuned words, as many bytes as base has. */
int32_t xorz_delta_restore(const xorz_matrix* base, const void* delta, size_t delta_bytes, void* out,
                           size_t out_bytes, const xorz_executor* executor, xorz_error* error);

/* out := rows first .. end (exclusive). */
int32_t xorz_delta_restore_rows(const xorz_matrix* base, const void* delta, size_t delta_bytes, size_t first,
                                size_t end, void* out, size_t out_bytes, const xorz_executor* executor,
                                xorz_error* error);

/* out := rows first_row .. end_row of columns first_column .. end_column (ends exclusive), row after row.
 * Only the tiles that they touch are read. */
int32_t xorz_delta_restore_region(const xorz_matrix* base, const void* delta, size_t delta_bytes,
                                  size_t first_row, size_t end_row, size_t first_column, size_t end_column,
                                  void* out, size_t out_bytes, const xorz_executor* executor,
                                  xorz_error* error);

/* weight, which must be the base (digest checked), becomes the fine-tune in place; its words must be
 * writable. */
int32_t xorz_delta_apply(const xorz_matrix* weight, const void* delta, size_t delta_bytes,
                         const xorz_executor* executor, xorz_error* error);

/* The exchange between two versions of a matrix: where their words differ, and by what; and how many do. It
 * is for this process alone: no format, and another release may write others. */
int32_t xorz_exchange_encode(const xorz_matrix* old, const xorz_matrix* new_words, xorz_buffer* exchange,
                             uint64_t* changed, xorz_error* error);

/* words become the new ones in place (back 0), or the old ones again (any other back). Only those that differ
 * are touched, and each is compared with what it was; after an error all are as they were. Unlike
 * xorz_delta_apply it does not see whether words that stay are those of the version. Nobody else may write
 * them meanwhile. */
int32_t xorz_exchange_apply(const xorz_matrix* words, const void* exchange, size_t exchange_bytes,
                            int32_t back, xorz_error* error);

/* out [m, n] := input [m, k] @ (weight [n, k] (+) delta)^T + bias [n]. All of the weight's dtype: F32, BF16
 * or F16. The fine-tuned matrix is not built. bias may be NULL. The digest of weight is not checked here: see
 * xorz_delta_check. */
int32_t xorz_delta_linear(const xorz_matrix* input, const xorz_matrix* weight, const void* bias,
                          const void* delta, size_t delta_bytes, int32_t mode, void* out, size_t out_bytes,
                          const xorz_executor* executor, xorz_error* error);

/* out [m, k] := grad [m, n] @ (weight [n, k] (+) delta). */
int32_t xorz_delta_linear_grad_input(const xorz_matrix* grad, const xorz_matrix* weight, const void* delta,
                                     size_t delta_bytes, void* out, size_t out_bytes,
                                     const xorz_executor* executor, xorz_error* error);

/* out := the delta of rows (dim 0) or columns (dim 1) start .. end (exclusive) of base. */
int32_t xorz_delta_slice(const void* delta, size_t delta_bytes, const xorz_matrix* base, size_t dim,
                         size_t start, size_t end, xorz_buffer* out, xorz_error* error);

/* out := the delta of the parts' bases put one after another along dim. */
int32_t xorz_delta_concat(const xorz_part* parts, size_t count, size_t dim, xorz_buffer* out,
                          xorz_error* error);

/* ---- packages: a whole checkpoint's delta in one file ---- */

/* A tensor of a checkpoint: safetensors dtype name (such as "BF16"), dimensions, row-major bytes. */
typedef struct xorz_tensor {
  const char* name;
  const char* dtype;
  const size_t* dims;
  size_t rank; /* at most 64 */
  const void* data;
  size_t bytes;
} xorz_tensor;

/* What must speak for a base beside the digests of its tensors, which are compared in any case and find
 * mistakes. XORZ_TRUST_SHA256: the sha256 of each base tensor, which nobody can forge. Packages have them
 * where they were packed so; others are refused. */
typedef enum xorz_trust { XORZ_TRUST_DIGEST = 0, XORZ_TRUST_SHA256 = 1 } xorz_trust;

typedef struct xorz_options {
  int32_t prefer;           /* XORZ_PREFER_SPEED, _MEMORY or _AUTO */
  int32_t codec;            /* xorz_codec */
  int32_t level;            /* of zstd; 0 is the default */
  int32_t trust;            /* xorz_trust: what the package says of its base */
  const char* strip_prefix; /* dropped from names on both sides before xorz_pack_files pairs them, or NULL */
} xorz_options;

/* How a job over files runs; NULL, and all zeros, are the defaults. Nothing in it changes the bytes written.
 */
typedef struct xorz_run {
  uint32_t jobs;        /* threads; 0 takes one per core */
  uint32_t flags;       /* XORZ_RUN_... or 0 */
  const uint32_t* stop; /* ends the job, soon, when it is no longer 0: store atomically; or NULL */
} xorz_run;

/* Unpack and verify do not compare the sha256 of each restored file; tensors are still compared by the
 * digests of base and delta. */
#define XORZ_RUN_NO_SHA256 1u

/* Unpack and verify go by XORZ_TRUST_SHA256. */
#define XORZ_RUN_TRUST_SHA256 2u

/* `stop` is not NULL and that of a xorz_watch, into which the job writes how far it is. */
#define XORZ_RUN_WATCHED 4u

/* What another thread may read, by atomic loads, while a job runs. A job has one stage or several. */
typedef struct xorz_watch {
  uint32_t stop;   /* what `stop` of xorz_run points to */
  uint32_t stages; /* how many have begun */
  uint64_t total;  /* bytes of the last one that has begun, and how many of them are done */
  uint64_t done;
} xorz_watch;

typedef struct xorz_writer xorz_writer;
typedef struct xorz_package xorz_package;
typedef struct xorz_base xorz_base;

/* A package appears under `path` at once, when it is finished. */
int32_t xorz_writer_new(const char* path, const xorz_options* options, xorz_writer** writer,
                        xorz_error* error);

/* base: the tensor that fine_tuned is paired with, or NULL. Of another dtype or shape: stored alone. */
int32_t xorz_writer_add(xorz_writer* writer, const xorz_tensor* fine_tuned, const xorz_tensor* base,
                        xorz_error* error);

/* Notes a base tensor that the fine-tune lacks. */
int32_t xorz_writer_removed(xorz_writer* writer, const char* name, xorz_error* error);

/* Frees the writer in any case. report: JSON, or NULL. */
int32_t xorz_writer_finish(xorz_writer* writer, xorz_buffer* report, xorz_error* error);

/* Frees a writer without writing a package. */
void xorz_writer_free(xorz_writer* writer);

int32_t xorz_package_open(const char* path, xorz_package** package, xorz_error* error);
void xorz_package_close(xorz_package* package);

/* From now on the package gives nothing before `trust` (xorz_trust) speaks for the base that is given. */
int32_t xorz_package_trust(xorz_package* package, int32_t trust, xorz_error* error);

/* json: totals, removed names and one entry per tensor. */
int32_t xorz_package_describe(const xorz_package* package, xorz_buffer* json, xorz_error* error);

/* delta := one tensor's resident delta. prefer: xorz_prefer. No dense matrix is made; the digest of base is
 * checked. */
int32_t xorz_package_resident(const xorz_package* package, const char* name, const xorz_matrix* base,
                              int32_t prefer, xorz_buffer* delta, xorz_error* error);

/* The same of a base that is elsewhere, such as in a device's memory, of which somebody knows dtype, shape
 * and digest (16 bytes): base->words is not read. delta := no bytes where words are needed, since the package
 * keeps no resident delta for `prefer`, or its sha256 must speak for the base. */
int32_t xorz_package_resident_known(const xorz_package* package, const char* name, const xorz_matrix* base,
                                    const uint8_t* digest, int32_t prefer, xorz_buffer* delta,
                                    xorz_error* error);

/* Takes one exchange, of `words` words of the base from word `first` on, of which `changed` differ; its bytes
 * are there until it returns. 0, or another number to have no more. */
typedef int32_t (*xorz_exchange_sink)(void* context, size_t first, size_t words, const void* exchange,
                                      size_t exchange_bytes, uint64_t changed);

/* The exchanges (xorz_exchange_apply) that turn the base of one tensor into it, in order, a few MiB of words
 * each; those of words that stay are left out. The digest of base is checked first. Neither a dense matrix
 * nor a delta is made. */
int32_t xorz_package_exchanges(const xorz_package* package, const char* name, const xorz_matrix* base,
                               xorz_exchange_sink sink, void* context, xorz_error* error);

/* A base on disk, a safetensors file or a folder. The digests of its tensors come from the user's cache, or
 * are computed and kept there. */
int32_t xorz_base_open(const char* path, const xorz_run* run, xorz_base** base, xorz_error* error);
void xorz_base_close(xorz_base* base);

/* As xorz_package_resident; words of the base are read only if the delta must be encoded anew. */
int32_t xorz_package_resident_from(const xorz_package* package, const char* name, const xorz_base* base,
                                   int32_t prefer, xorz_buffer* delta, xorz_error* error);

/* out := one tensor's fine-tuned bytes. base: NULL for a tensor stored alone. */
int32_t xorz_package_restore(const xorz_package* package, const char* name, const xorz_matrix* base,
                             void* out, size_t out_bytes, xorz_error* error);

/* The same from a base on disk, for tensors stored alone, too. */
int32_t xorz_package_restore_from(const xorz_package* package, const char* name, const xorz_base* base,
                                  void* out, size_t out_bytes, xorz_error* error);

/* Whole checkpoints: safetensors files, or folders of them. report: JSON. */
int32_t xorz_pack_files(const char* base, const char* fine_tuned, const char* package,
                        const xorz_options* options, const xorz_run* run, xorz_buffer* report,
                        xorz_error* error);

/* Many fine-tunes, each against the nearest of base_count bases; fine_tuned[i] goes into packages[i]. Each
 * base's words are read once for many of them. One that cannot be packed ends no other: report, a JSON
 * object, has "packages", each with its "report", or "error" and "kind". */
int32_t xorz_pack_fleet(const char* const* bases, size_t base_count, const char* const* fine_tuned,
                        const char* const* packages, size_t count, const xorz_options* options,
                        const xorz_run* run, xorz_buffer* report, xorz_error* error);
int32_t xorz_unpack_files(const char* base, const char* package, const char* out, const xorz_run* run,
                          xorz_buffer* report, xorz_error* error);

/* Restores everything without writing it; fine_tuned, if not NULL, is compared too. */
int32_t xorz_verify_files(const char* base, const char* package, const char* fine_tuned, const xorz_run* run,
                          xorz_buffer* report, xorz_error* error);

/* What CUDA kernels on a device have reported since the last call of an op there, or of this: an error, and
 * the next call knows nothing of it. Ops say it by themselves; this is for processes that only replay
 * captured graphs. Waits for nothing: synchronise first to hear of all that was launched. XORZ_OK, too, where
 * no op has run on that device. */
int32_t xorz_cuda_status(int32_t device, xorz_error* error);

/* XORZ_OK where kernels can be launched on a CUDA device, which is made ready; else why not. */
int32_t xorz_cuda_open(int32_t device, xorz_error* error);

/* ---- counters, process-wide: they prove that products build no matrix ---- */

uint64_t xorz_panels_restored(void);
uint64_t xorz_scratch_peak_bytes(void);
void xorz_reset_counters(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* XORZ_H */
