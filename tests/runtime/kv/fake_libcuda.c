/* libcuda as far as the CUDA body calls it, on host memory: every call is done at once. Compiled against the real
 * header, so that what Python passes is what the driver's prototypes say. OLDER: only CUDA 12.8's batched copy. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef cuMemcpyBatchAsync
#undef cuEventElapsedTime
static double clock_ms = 0;
static int streams = 0, events = 0, batches = 0, singles = 0, registered = 0;
static CUdeviceptr refused = 0;
static CUresult batch_fails_with = CUDA_SUCCESS;
static CUcontext current = (CUcontext)0x10;

int fake_streams(void) { return streams; }
int fake_events(void) { return events; }
int fake_batches(void) { return batches; }
int fake_singles(void) { return singles; }
int fake_registered(void) { return registered; }
void fake_refuse(CUdeviceptr dst) { refused = dst; }
void fake_fail_batches(int code) { batch_fails_with = (CUresult)code; }

CUresult cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) {
    return context == current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    streams++;
    *stream = malloc(1);
    return flags == CU_STREAM_NON_BLOCKING ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuStreamDestroy_v2(CUstream stream) { streams--; free(stream); return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream stream) { return CUDA_SUCCESS; }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent *event, unsigned int flags) {
    events++;
    *event = calloc(1, sizeof(double));
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent event) { events--; free(event); return CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent event, CUstream stream) { *(double *)event = ++clock_ms; return CUDA_SUCCESS; }
CUresult cuEventQuery(CUevent event) { return *(double *)event ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY; }
CUresult cuEventElapsedTime(float *ms, CUevent start, CUevent end) {
    *ms = (float)(*(double *)end - *(double *)start);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t count, CUstream stream) {
    singles++;
    if (dst == refused) return CUDA_ERROR_INVALID_VALUE;
    memcpy((void *)dst, (void *)src, count);
    return CUDA_SUCCESS;
}
static CUresult copy_batch(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count, CUmemcpyAttributes *attrs,
                           size_t *attrsIdxs, size_t numAttrs, CUstream stream) {
    if (batch_fails_with != CUDA_SUCCESS) return batch_fails_with;
    if (numAttrs != 1 || attrsIdxs[0] != 0 || !stream) return CUDA_ERROR_INVALID_VALUE;
    if (attrs[0].srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM || attrs[0].srcLocHint.type != 0 ||
        attrs[0].dstLocHint.type != 0 || attrs[0].flags != CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
        return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; i++)
        if (dsts[i] == refused) return CUDA_ERROR_INVALID_VALUE;
    batches++;
    for (size_t i = 0; i < count; i++) memcpy((void *)dsts[i], (void *)srcs[i], sizes[i]);
    return CUDA_SUCCESS;
}
#ifdef OLDER
CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
                            CUmemcpyAttributes *attrs, size_t *attrsIdxs, size_t numAttrs, size_t *failIdx,
                            CUstream stream) {
    *failIdx = 0;
    return copy_batch(dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, stream);
}
#else
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
                               CUmemcpyAttributes *attrs, size_t *attrsIdxs, size_t numAttrs, CUstream stream) {
    return copy_batch(dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, stream);
}
#endif
static void *pinned[4096];
CUresult cuMemHostRegister_v2(void *p, size_t size, unsigned int flags) {
    if (flags != (CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP)) return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < registered; i++)
        if (pinned[i] == p) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    pinned[registered++] = p;
    return CUDA_SUCCESS;
}
CUresult cuMemHostUnregister(void *p) {
    for (int i = 0; i < registered; i++)
        if (pinned[i] == p) {
            pinned[i] = pinned[--registered];
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal + 40; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = device == 42 && attribute == CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device) {
    snprintf(text, length, "0000:%02X:00.0", device);
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_SOMETHING";
    return CUDA_SUCCESS;
}
