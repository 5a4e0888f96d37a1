// elements.cu against the C core: bitwise where the core fuses multiply-adds, as a GPU does.
#include "mmbal/cuda/elements.h"

#include <functional>
#include <list>

#include "any_tensor.h"
#include "device.h"
#include "mmbal/cpu.h"
#include "sampling_reference.h"

namespace mmbal_test {
namespace {

struct Tensor {
    AnyTensor data, gradient, weights, base;
    int64_t modality = 0, id = 0;
    bool has_gradient = true, has_base = false;
    int64_t misaligned = 0; // bytes
};

// Device memory of one tensor, `misaligned` bytes beyond a multiple of 16.
class DeviceTensor {
public:
    DeviceTensor(const char *name, const AnyTensor &values, int64_t misaligned)
        : bytes_(name, with_front(values.bytes, misaligned)), misaligned_(misaligned) {}
    void *data() { return bytes_.data() + misaligned_; }
    std::vector<unsigned char> values() const {
        const auto all = bytes_.values();
        return {all.begin() + misaligned_, all.end()};
    }

private:
    static std::vector<unsigned char> with_front(const std::vector<unsigned char> &bytes, int64_t misaligned) {
        std::vector<unsigned char> all(misaligned);
        all.insert(all.end(), bytes.begin(), bytes.end());
        return all;
    }
    DeviceBytes bytes_;
    int64_t misaligned_;
};

struct List {
    std::vector<Tensor> tensors;
    std::vector<double> rho = {0.5, 0.1, 0.9, 1, 0.37};
    int64_t seed = 11, step = (INT64_C(3) << 32) + 5;
    mmbal_importance importance = MMBAL_GN;
    mmbal_mask_options options = {MMBAL_BOTTOMK, 0, 0};

    Tensor &add(mmbal_dtype dtype, int64_t count, Random &random, double decades = 2) {
        Tensor t = {AnyTensor(dtype, count), AnyTensor(dtype, count), AnyTensor(dtype, count), AnyTensor(dtype, count)};
        for (int64_t i = 0; i < count; i++) {
            const double sign = random.below(2) ? 1 : -1;
            t.data.set(i, sign * random.uniform(0.5, 1.9));
            t.gradient.set(i, random.below(20) ? sign * std::pow(10, random.uniform(-decades, decades)) : 0);
            t.weights.set(i, random.uniform(-1, 1)), t.base.set(i, random.uniform(2.5, 4));
        }
        t.modality = random.below(static_cast<int64_t>(rho.size())), t.id = random.below(INT64_C(1) << 32);
        if (random.below(3) == 0) t.misaligned = static_cast<int64_t>(AnyTensor::size_of(dtype));
        tensors.push_back(t);
        return tensors.back();
    }
    std::vector<std::vector<unsigned char>> on_cpu() const {
        std::vector<Tensor> copies = tensors;
        std::vector<mmbal_elements> elements;
        for (Tensor &t : copies)
            elements.push_back({t.data.data(), t.has_gradient ? t.gradient.data() : nullptr, t.weights.data(),
                                t.has_base ? t.base.data() : nullptr, t.data.count(), t.data.dtype, t.modality, t.id});
        const auto T = static_cast<int64_t>(copies.size()), M = static_cast<int64_t>(rho.size());
        std::vector<unsigned char> workspace(mmbal_mask_elements_workspace(elements.data(), T, serial()));
        EXPECT_EQ(mmbal_mask_elements(elements.data(), rho.data(), T, M, seed, step, importance, options,
                                      workspace.data(), serial()),
                  MMBAL_OK);
        std::vector<std::vector<unsigned char>> masked;
        for (const Tensor &t : copies) masked.push_back(t.data.bytes);
        return masked;
    }
    std::vector<std::vector<unsigned char>> on_cuda(const uint8_t *skip = nullptr) const {
        std::list<DeviceTensor> memory;
        std::vector<const DeviceTensor *> data;
        std::vector<mmbal_elements> elements;
        const auto copy = [&](const char *name, const AnyTensor &values, int64_t misaligned) {
            memory.emplace_back(name, values, misaligned);
            return memory.back().data();
        };
        for (const Tensor &t : tensors) {
            void *d = copy("data", t.data, t.misaligned);
            data.push_back(&memory.back());
            elements.push_back({d, t.has_gradient ? copy("gradient", t.gradient, 0) : nullptr,
                                importance == MMBAL_GN_WN ? copy("weights", t.weights, 0) : nullptr,
                                t.has_base ? copy("base", t.base, t.misaligned) : nullptr, t.data.count(), t.data.dtype,
                                t.modality, t.id});
        }
        const auto T = static_cast<int64_t>(tensors.size()), M = static_cast<int64_t>(rho.size());
        DeviceArray<double> d_rho("rho", rho);
        DeviceBytes workspace("workspace", mmbal_mask_elements_workspace_cuda(elements.data(), T));
        EXPECT_EQ(mmbal_mask_elements_cuda(elements.data(), d_rho.data(), T, M, seed, step, importance, options, skip,
                                           workspace.data(), nullptr),
                  MMBAL_OK);
        std::vector<std::vector<unsigned char>> masked;
        for (const DeviceTensor *t : data) masked.push_back(t->values());
        return masked;
    }
    std::vector<std::vector<unsigned char>> unchanged() const {
        std::vector<std::vector<unsigned char>> bytes;
        for (const Tensor &t : tensors) bytes.push_back(t.data.bytes);
        return bytes;
    }
};

// Keys of the portable C core differ in their last bits: it fuses nothing.
bool core_fuses() { return mmbal_isa_in_use() != MMBAL_ISA_PORTABLE; }

void expect_that_of_the_core(const List &list, const decltype(once) &run = for_each_schedule) {
    if (!core_fuses() && list.options.sampler != MMBAL_TOPK && list.options.sampler != MMBAL_INDEPENDENT)
        GTEST_SKIP() << "the C core has no fused multiply-add here";
    const auto expected = list.on_cpu();
    run([&] { EXPECT_TRUE(list.on_cuda() == expected); });
}

const std::vector<mmbal_mask_options> ALL_OPTIONS = {
    {MMBAL_BOTTOMK, 0, 0},     {MMBAL_TOPK, 0, 0},          {MMBAL_UNIFORM, 0, 0},     {MMBAL_UNIFORM, 1, 0},
    {MMBAL_INDEPENDENT, 0, 0}, {MMBAL_INDEPENDENT, 0, 0.3}, {MMBAL_INDEPENDENT, 1, 1}, {MMBAL_INDEPENDENT, 1, 0.5}};

template <typename T>
class CudaElements : public ::testing::Test {};
TYPED_TEST_SUITE(CudaElements, Dtypes, DtypeNames);

TYPED_TEST(CudaElements, MasksAreThoseOfTheCore) {
    Random random(1);
    for (const mmbal_mask_options &options : ALL_OPTIONS)
        for (mmbal_importance importance : {MMBAL_GN, MMBAL_SQRT_GN, MMBAL_GN_WN}) {
            SCOPED_TRACE("sampler " + std::to_string(options.sampler) + ", importance " + std::to_string(importance));
            List list;
            list.importance = importance, list.options = options;
            list.seed = static_cast<int64_t>(random.bits());
            for (int64_t count : {0, 3, 257, 1030}) list.add(TypeParam::dtype, count, random);
            list.tensors[2].has_base = true, list.tensors[3].has_gradient = random.below(2);
            ASSERT_NO_FATAL_FAILURE(expect_that_of_the_core(list, under_next_schedule));
        }
}

// Tensors of several chunks, of which the last has a tail; equal keys in all of them.
TYPED_TEST(CudaElements, ChunksAreSummedAndTiesAreGivenInTheOrderOfTheCore) {
    Random random(2);
    for (const mmbal_mask_options &options :
         std::vector<mmbal_mask_options>{{MMBAL_TOPK, 0, 0}, {MMBAL_BOTTOMK, 0, 0}, {MMBAL_INDEPENDENT, 1, 0.2}}) {
        List list;
        list.options = options;
        Tensor &t = list.add(TypeParam::dtype, 32768 + 1237, random);
        t.modality = 4;
        if (options.sampler == MMBAL_TOPK)
            for (int64_t i = 0; i < t.data.count(); i++) t.gradient.set(i, static_cast<double>(random.below(3)));
        list.add(TypeParam::dtype, 700, random).modality = 1;
        SCOPED_TRACE("sampler " + std::to_string(options.sampler));
        ASSERT_NO_FATAL_FAILURE(expect_that_of_the_core(list));
    }
}

// More tensors than fit the parameters of one launch, of all dtypes.
TEST(CudaElementLists, ListsOfAnyLengthAreServed) {
    Random random(3);
    for (mmbal_sampler sampler : {MMBAL_BOTTOMK, MMBAL_INDEPENDENT}) {
        List list;
        list.options = {sampler, 0, 1};
        for (int64_t i = 0; i < 70; i++) list.add(ALL_DTYPES[i % 4], i % 11 * 3, random).has_gradient = false;
        ASSERT_NO_FATAL_FAILURE(expect_that_of_the_core(list, once));
    }
    List none;
    EXPECT_TRUE(none.on_cuda().empty());
}

// Energies of which each round caps a few more: more rounds than all blocks take part in.
TEST(CudaElementLists, LevelsAreFoundHoweverManyRoundsTheyTake) {
    Random random(4);
    List list;
    list.options = {MMBAL_INDEPENDENT, 1, 0};
    Tensor &t = list.add(MMBAL_F64, 600, random);
    t.modality = 2, t.misaligned = 0;
    for (int64_t i = 0; i < 600; i++) t.gradient.set(i, std::pow(1.7, static_cast<double>(i % 300)));
    list.add(MMBAL_F32, 500, random, 0.2);
    expect_that_of_the_core(list);
}

TEST(CudaElementLists, OneValueThatIsNoNumberLeavesAllTensors) {
    Random random(5);
    for (double bad : {NOT_A_NUMBER, INFINITE})
        for (const mmbal_mask_options &options : ALL_OPTIONS) {
            List list;
            list.options = options;
            for (mmbal_dtype dtype : ALL_DTYPES) list.add(dtype, 300, random);
            list.tensors[1].gradient.set(299, bad);
            under_next_schedule([&] { EXPECT_TRUE(list.on_cuda() == list.unchanged()); });
        }
}

TEST(CudaElementLists, SkipLeavesAllTensors) {
    Random random(6);
    for (mmbal_sampler sampler : {MMBAL_BOTTOMK, MMBAL_INDEPENDENT}) {
        List list;
        list.options = {sampler, 0, 0.4};
        list.add(MMBAL_F32, 300, random).modality = 0;
        const auto masked = list.on_cpu();
        for (uint8_t skips : {0, 1})
            for_each_schedule([&] {
                DeviceArray<uint8_t> skip("skip", std::vector<uint8_t>{skips});
                const auto after = list.on_cuda(skip.data());
                EXPECT_TRUE(skips ? after == list.unchanged() : after == masked || !core_fuses());
                EXPECT_EQ(skips != 0, after == list.unchanged());
            });
    }
}

TEST(CudaElementLists, ARatioThatTheCpuRefusesFailsTheLaunch) {
    Random random(7);
    for (double bad : {-0.1, 1.1, NOT_A_NUMBER, 0.0}) {
        List list;
        list.options = {MMBAL_UNIFORM, 1, 0};
        list.add(MMBAL_F32, 30, random).modality = 0;
        list.rho[4] = bad;
        cuda_shim::take_reports();
        list.on_cuda();
        EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos) << bad;
    }
}

TEST(CudaElementLists, WhatTheHostKnowsIsRefusedBeforeALaunch) {
    float x[4] = {1, 2, 3, 4};
    const auto status = [&](mmbal_elements e, mmbal_importance importance, mmbal_mask_options options, int64_t step) {
        return mmbal_mask_elements_cuda(&e, nullptr, 1, 1, 0, step, importance, options, nullptr, nullptr, nullptr);
    };
    const mmbal_elements good = {x, nullptr, nullptr, nullptr, 4, MMBAL_F32, 0, 0};
    const mmbal_mask_options plain = {MMBAL_BOTTOMK, 0, 0};
    EXPECT_EQ(status(good, MMBAL_GN_WN, plain, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status(good, enum_of<mmbal_importance>(3), plain, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status(good, MMBAL_GN, plain, -1), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status(good, MMBAL_GN, {MMBAL_TOPK, 1, 0}, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status(good, MMBAL_GN, {MMBAL_BOTTOMK, 1, 0.5}, 0), MMBAL_UNSUPPORTED);
    EXPECT_EQ(status(good, MMBAL_GN, {MMBAL_SYSTEMATIC, 0, 0.5}, 0), MMBAL_UNSUPPORTED);
    mmbal_elements bad = good;
    bad.modality = 1;
    EXPECT_EQ(status(bad, MMBAL_GN, plain, 0), MMBAL_INVALID_ARGUMENT);
    bad = good, bad.base = x;
    EXPECT_EQ(status(bad, MMBAL_GN, plain, 0), MMBAL_INVALID_ARGUMENT);
    bad = good, bad.dtype = enum_of<mmbal_dtype>(4);
    EXPECT_EQ(status(bad, MMBAL_GN, plain, 0), MMBAL_UNSUPPORTED);
}

} // namespace
} // namespace mmbal_test
