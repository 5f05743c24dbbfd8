// SPDX-License-Identifier: Apache-2.0
// A libcuda without a device: it takes what Triton's launcher hands to the driver, refuses what the documentation of
// the driver API forbids (cuLaunchKernelEx, cuTensorMapEncodeTiled), counts, and runs nothing. Limits are those of sm_90.
#include <cuda.h>
#include <stdio.h>

#define SHARED_BYTES 232448
static int launches, descriptors;
static char fault[256] = "no fault";

int driver_launches(void) { return launches; }
int driver_descriptors(void) { return descriptors; }

static CUresult refuse(const char *what, unsigned long long value) {
    snprintf(fault, sizeof fault, "%s: %llu", what, value);
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) { *text = fault; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_BYTES; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED_BYTES + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    return refuse("cuOccupancyMaxActiveClusters is not expected", 0);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
    if (config->gridDimX == 0 || config->gridDimX > 2147483647) return refuse("gridDimX", config->gridDimX);
    if (config->gridDimY == 0 || config->gridDimY > 65535) return refuse("gridDimY", config->gridDimY);
    if (config->gridDimZ == 0 || config->gridDimZ > 65535) return refuse("gridDimZ", config->gridDimZ);
    if (config->blockDimX == 0 || config->blockDimX > 1024) return refuse("blockDimX", config->blockDimX);
    if (config->sharedMemBytes > SHARED_BYTES) return refuse("sharedMemBytes", config->sharedMemBytes);
    launches++;
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    int half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    int single = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
    if (!half && !single) return refuse("tensorDataType", type);
    unsigned inner = box[0] * (half ? 2 : 4);
    unsigned limits[] = {[CU_TENSOR_MAP_SWIZZLE_NONE] = 1024, [CU_TENSOR_MAP_SWIZZLE_32B] = 32,
                         [CU_TENSOR_MAP_SWIZZLE_64B] = 64, [CU_TENSOR_MAP_SWIZZLE_128B] = 128};
    if ((unsigned long long)address % 16) return refuse("globalAddress", (unsigned long long)address);
    if (rank < 1 || rank > 5) return refuse("tensorRank", rank);
    if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return refuse("swizzle", swizzle);
    if (inner % 16 || inner > limits[swizzle]) return refuse("bytes of boxDim[0]", inner);
    for (unsigned i = 0; i < rank; i++) {
        if (shape[i] == 0 || shape[i] > 1ULL << 32) return refuse("globalDim", shape[i]);
        if (box[i] == 0 || box[i] > 256) return refuse("boxDim", box[i]);
        if (steps[i] != 1) return refuse("elementStrides", steps[i]);
        if (i > 0 && (strides[i - 1] % 16 || strides[i - 1] >= 1ULL << 40)) return refuse("globalStrides", strides[i - 1]);
    }
    descriptors++;
    return CUDA_SUCCESS;
}
