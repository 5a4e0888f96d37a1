#include "elements_search.cuh"
#include "pieces.cuh"

// No multiply-add is fused here that is not spelt out (cmake/MmbalCuda.cmake), as in the C core.
namespace mmbal {
namespace {

// --- The list of tensors travels by the parameters of kernels, 4 KiB at a time ---------------------------------------

constexpr int TENSORS_AT_ONCE = 60;
struct Table {
    Elements of[TENSORS_AT_ONCE];
    int count;
};
static_assert(sizeof(Table) <= 4000, "fits the parameters of a kernel");

__global__ void __launch_bounds__(WARP * 2, 1) write_tensors(const __grid_constant__ Table table, Elements *to) {
    if (static_cast<int>(threadIdx.x) < table.count) to[threadIdx.x] = table.of[threadIdx.x];
}

__global__ void __launch_bounds__(THREADS, 1)
    begin_masks(const double *__restrict__ rho, int64_t M, bool unbiased, int *stop) {
    for (int64_t m = threadIdx.x; m < M; m += THREADS)
        if (!(rho[m] >= 0 && rho[m] <= 1) || (unbiased && rho[m] == 0)) __trap();
    if (threadIdx.x == 0) *stop = 0;
}

// --- Products --------------------------------------------------------------------------------------------------------

// Elements with the threshold's key are left to multiply_ties where not all of them are kept; counts says how many.
__global__ void __launch_bounds__(THREADS, 1) multiply_chunks(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t item = blockIdx.x; item < pass.chunks; item += gridDim.x) {
        const int64_t at = tensor_of(pass, item);
        const Found found = pass.found[at];
        if (found.state == LEFT_ALONE) continue;
        const Elements t = pass.tensors[at];
        const int64_t begin = (item - t.first_chunk) * CHUNK;
        int64_t ties = 0;
        for (int64_t first = begin + threadIdx.x * QUAD; first < begin + CHUNK; first += THREADS * QUAD) {
            const int here = elements_here(t, first);
            if (here == 0) break;
            double w[QUAD], multipliers[QUAD];
            weights_of(pass, t, first, here, w);
            if (pass.options.sampler == MMBAL_INDEPENDENT) {
                draw_quad(pass, t, found, first, w, multipliers);
            } else {
                uint32_t keys[QUAD];
                keys_of(pass, t, first, w, keys);
#pragma unroll
                for (int i = 0; i < QUAD; i++) {
                    const bool tied = found.has_ties && keys[i] == found.below;
                    multipliers[i] = keys[i] < found.below ? found.multiplier : tied ? 1 : 0;
                    ties += i < here && tied;
                }
            }
            multiply_quad(t, first, here, multipliers);
        }
        if (!found.has_ties) continue;
        ties = sum_over_block<THREADS>(ties, shared.block);
        if (threadIdx.x == 0) pass.counts[item] = ties;
    }
}

constexpr int64_t NO_TIES = -1; // a chunk without

// Of each chunk how many ties come before it.
__global__ void __launch_bounds__(THREADS, 1) place_ties(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t at = blockIdx.x; at < pass.T; at += gridDim.x) {
        if (!pass.found[at].has_ties) continue;
        const Elements &t = pass.tensors[at];
        const int64_t chunks = ceil_div(t.count, CHUNK);
        int64_t *counts = pass.counts + t.first_chunk, so_far = 0;
        for (int64_t first = 0; first < chunks; first += THREADS) {
            const int64_t chunk = first + threadIdx.x, mine = chunk < chunks ? counts[chunk] : 0;
            int64_t here;
            const int64_t before = so_far + sum_before<THREADS>(mine, shared.block, &here);
            if (chunk < chunks) counts[chunk] = mine > 0 ? before : NO_TIES;
            so_far += here;
        }
    }
}

// The first `ties` of the elements whose key is the threshold are kept. Keys are what they were: of elements that were
// set to 0 infinite, of others the same.
__global__ void __launch_bounds__(THREADS, 1) multiply_ties(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t item = blockIdx.x; item < pass.chunks; item += gridDim.x) {
        const int64_t at = tensor_of(pass, item);
        const Found found = pass.found[at];
        if (!found.has_ties || pass.counts[item] == NO_TIES) continue;
        const Elements t = pass.tensors[at];
        const int64_t begin = (item - t.first_chunk) * CHUNK;
        int64_t so_far = pass.counts[item];
        for (int64_t step = 0; step < CHUNK && begin + step < t.count; step += THREADS * QUAD) {
            const int64_t first = begin + step + threadIdx.x * QUAD;
            const int here = elements_here(t, first);
            bool tied[QUAD] = {};
            int mine = 0;
            if (here > 0) {
                double w[QUAD];
                uint32_t keys[QUAD];
                weights_of(pass, t, first, here, w);
                keys_of(pass, t, first, w, keys);
#pragma unroll
                for (int i = 0; i < QUAD; i++) tied[i] = i < here && keys[i] == found.below, mine += tied[i];
            }
            int64_t all;
            int64_t place = so_far + sum_before<THREADS>(mine, shared.block, &all);
            double multipliers[QUAD];
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                multipliers[i] = !tied[i] ? 1 : place < found.ties ? found.multiplier : 0;
                place += tied[i];
            }
            if (mine > 0) multiply_quad(t, first, here, multipliers);
            so_far += all;
        }
    }
}

mmbal_status check_elements(const mmbal_elements *tensors, int64_t T, int64_t M, mmbal_importance importance) {
    const bool known = importance == MMBAL_GN || importance == MMBAL_SQRT_GN || importance == MMBAL_GN_WN;
    if (T < 0 || M < 0 || M > INT32_MAX || !known) return MMBAL_INVALID_ARGUMENT;
    for (int64_t t = 0; t < T; t++) {
        const mmbal_elements &of = tensors[t];
        if (!is_dtype(of.dtype)) return MMBAL_UNSUPPORTED;
        if (of.count < 0 || of.modality < 0 || of.modality >= M || of.id < 0 || of.id > UINT32_MAX)
            return MMBAL_INVALID_ARGUMENT;
        if ((importance == MMBAL_GN_WN && !of.weights && of.count > 0) || (of.base && !of.gradient))
            return MMBAL_INVALID_ARGUMENT;
    }
    return MMBAL_OK;
}

bool is_aligned(const void *data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Fills the table of the tensors on the device, and tells how many chunks they have.
mmbal_status write_table(const mmbal_elements *tensors, int64_t T, Elements *to, int64_t *chunks, mmbal_stream stream) {
    Table table;
    *chunks = 0, table.count = 0;
    for (int64_t t = 0; t < T; t++) {
        const mmbal_elements &of = tensors[t];
        const void *gradient = of.gradient ? of.gradient : of.data;
        const bool aligned =
            is_aligned(of.data) && is_aligned(gradient) && is_aligned(of.weights) && is_aligned(of.base);
        table.of[table.count++] = {of.data,
                                   gradient,
                                   of.weights,
                                   of.base,
                                   of.count,
                                   *chunks,
                                   static_cast<int>(of.modality),
                                   static_cast<uint32_t>(of.id),
                                   of.dtype,
                                   aligned};
        *chunks += ceil_div(of.count, CHUNK);
        if (table.count < TENSORS_AT_ONCE && t + 1 < T) continue;
        MMBAL_RETURN_UNLESS_OK(launch(stream, 1, 2 * WARP, 0, write_tensors, table, to));
        to += table.count, table.count = 0;
    }
    return MMBAL_OK;
}

// Cuts the workspace.
int64_t lay_out(const mmbal_elements *tensors, int64_t T, Pieces *from, Pass *pass) {
    pass->T = T, pass->chunks = 0;
    for (int64_t t = 0; t < T; t++) pass->chunks += ceil_div(tensors[t].count, CHUNK);
    pass->tensors = from->take<Elements>(T), pass->found = from->take<Found>(T);
    pass->sums = from->take<double>(pass->chunks), pass->counts = from->take<int64_t>(pass->chunks);
    pass->bins = from->take<unsigned long long>(T * BINS), pass->stop = from->take<int>(1);
    return from->bytes();
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_mask_elements_workspace_cuda(const mmbal_elements *tensors, int64_t T) {
    Pieces from(nullptr);
    Pass pass;
    return lay_out(tensors, T, &from, &pass);
}

mmbal_status mmbal_mask_elements_cuda(const mmbal_elements *tensors, const double *rho, int64_t T, int64_t M,
                                      int64_t seed, int64_t step, mmbal_importance importance,
                                      mmbal_mask_options options, const uint8_t *skip, void *workspace,
                                      mmbal_stream stream) {
    MMBAL_RETURN_UNLESS_OK(check_elements(tensors, T, M, importance));
    if (!mask_is_served(nullptr, 0, step, options)) return MMBAL_INVALID_ARGUMENT;
    const bool independent = options.sampler == MMBAL_INDEPENDENT;
    if (options.sampler == MMBAL_SYSTEMATIC || (options.sampler == MMBAL_BOTTOMK && options.unbiased))
        return MMBAL_UNSUPPORTED;
    Pieces from(workspace);
    Pass pass = {};
    pass.rho = rho, pass.skip = skip, pass.seed = seed, pass.step = step;
    pass.importance = importance, pass.options = options;
    lay_out(tensors, T, &from, &pass);
    MMBAL_RETURN_UNLESS_OK(launch(stream, 1, THREADS, 0, begin_masks, rho, M, options.unbiased != 0, pass.stop));
    MMBAL_RETURN_UNLESS_OK(write_table(tensors, T, pass.tensors, &pass.chunks, stream));
    if (pass.chunks == 0) return MMBAL_OK;
    const auto run = [&](int64_t blocks, auto kernel, auto... rest) {
        return launch(stream, blocks, THREADS, sizeof(ChunkShared), kernel, pass, rest...);
    };
    if (independent) {
        MMBAL_RETURN_UNLESS_OK(run(pass.chunks, weigh<false>));
        MMBAL_RETURN_UNLESS_OK(run(T, decide));
        for (int round = 0; round < LEVEL_ROUNDS; round++) {
            MMBAL_RETURN_UNLESS_OK(run(pass.chunks, sum_at_level));
            MMBAL_RETURN_UNLESS_OK(run(T, raise_levels));
        }
        MMBAL_RETURN_UNLESS_OK(run(T, finish_levels));
        return run(pass.chunks, multiply_chunks);
    }
    const size_t bytes = static_cast<size_t>(T) * BINS * sizeof(*pass.bins);
    if (cudaMemsetAsync(pass.bins, 0, bytes, static_cast<cudaStream_t>(stream)) != cudaSuccess)
        return MMBAL_DEVICE_ERROR;
    MMBAL_RETURN_UNLESS_OK(run(pass.chunks, weigh<true>));
    MMBAL_RETURN_UNLESS_OK(run(T, decide));
    MMBAL_RETURN_UNLESS_OK(run(pass.chunks, count_digits, FIRST_DIGIT, SECOND_DIGIT));
    MMBAL_RETURN_UNLESS_OK(run(T, find_digits, SECOND_DIGIT));
    MMBAL_RETURN_UNLESS_OK(run(pass.chunks, count_digits, SECOND_DIGIT, THIRD_DIGIT));
    MMBAL_RETURN_UNLESS_OK(run(T, find_digits, THIRD_DIGIT));
    MMBAL_RETURN_UNLESS_OK(run(pass.chunks, multiply_chunks));
    MMBAL_RETURN_UNLESS_OK(run(T, place_ties));
    return run(pass.chunks, multiply_ties);
}
