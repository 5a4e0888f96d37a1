// mmbal._core: what is no operator. CPU features, build facts and the random numbers, for `mmbal info` and the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "mmbal/cpu.h"
#include "mmbal/expert_mlp.h"
#include "mmbal/philox.h"

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_features() {
    const unsigned found = mmbal_cpu_features();
    std::vector<std::string> names;
    if (found & MMBAL_CPU_AVX2_FMA) names.emplace_back("avx2+fma");
    if (found & MMBAL_CPU_AVX512) names.emplace_back("avx512");
    if (found & MMBAL_CPU_AVX512_BF16) names.emplace_back("avx512_bf16");
    if (found & MMBAL_CPU_AMX_BF16) names.emplace_back("amx_bf16");
    return names;
}

bool is_isa_name(const std::string &name) {
    mmbal_isa isa;
    return mmbal_isa_from_name(name.c_str(), &isa) != 0;
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4> &counter, const std::array<uint32_t, 2> &key) {
    std::array<uint32_t, 4> words{};
    mmbal_philox4x32(counter.data(), key.data(), words.data());
    return words;
}

int64_t packed_bytes(const std::string &dtype, int64_t D, int64_t F, int64_t E) {
    const std::map<std::string, mmbal_dtype> codes = {
        {"float32", MMBAL_F32}, {"float64", MMBAL_F64}, {"bfloat16", MMBAL_BF16}, {"float16", MMBAL_F16}};
    const auto code = codes.find(dtype);
    if (code == codes.end())
        throw std::runtime_error("expert_mlp_pack: w1 must be float32, bfloat16, float16 or float64, got " + dtype);
    return mmbal_expert_mlp_packed_bytes(code->second, {0, D, F, E, 1});
}

} // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "What is no operator: CPU features, build facts, Philox words.";
    m.def("cpu_features", &cpu_features, "Names of the instruction sets found that kernels may use.");
    m.def(
        "isa_in_use", [] { return std::string(mmbal_isa_name(mmbal_isa_in_use())); },
        "The instruction set whose kernels run: portable, avx2, avx512, avx512_bf16 or amx. MMBAL_ISA caps it, "
        "and asks for avx512_bf16 where its products are slow.");
    m.def(
        "multiplies_bfloat16", [] { return mmbal_isa_in_use() >= MMBAL_ISA_AVX512_BF16; },
        "Whether those kernels have products of bfloat16; otherwise it is converted to float32.");
    m.def(
        "bfloat16_pairs_are_slow", [] { return mmbal_bfloat16_pairs_are_slow() != 0; },
        "Whether this processor multiplies bfloat16 faster as float32 than in pairs.");
    m.def("is_isa_name", &is_isa_name, py::arg("name"), "Whether name is a value that MMBAL_ISA may have.");
    m.def("expert_mlp_packed_bytes", &packed_bytes, py::arg("dtype"), py::arg("D"), py::arg("F"), py::arg("E"),
          "Bytes of the tensor that mmbal::expert_mlp_pack returns.");
    m.def("philox4x32", &philox, py::arg("counter"), py::arg("key"),
          "The four words of Philox4x32-10 for a counter of four and a key of two 32-bit words.");
    m.attr("version") = MMBAL_VERSION;
    m.attr("built_with_torch") = MMBAL_TORCH_VERSION;
    m.attr("compiler") = MMBAL_COMPILER;
}
