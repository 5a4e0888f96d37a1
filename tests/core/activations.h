// The activations of expert_mlp.h and their derivatives, from their formulas, in double.
#ifndef MMBAL_TESTS_ACTIVATIONS_H
#define MMBAL_TESTS_ACTIVATIONS_H

#include <cmath>

#include "mmbal/expert_mlp.h"

namespace mmbal_test {

constexpr mmbal_activation ACTIVATIONS[] = {MMBAL_QUICK_GELU, MMBAL_GELU, MMBAL_GELU_TANH, MMBAL_RELU,
                                            MMBAL_RELU2,      MMBAL_SILU, MMBAL_IDENTITY};

inline double sigmoid(double z) { return z >= 0 ? 1 / (1 + std::exp(-z)) : std::exp(z) / (1 + std::exp(z)); }

inline bool is_gated(mmbal_activation activation) {
    return activation == MMBAL_QUICK_GELU || activation == MMBAL_GELU || activation == MMBAL_GELU_TANH ||
           activation == MMBAL_SILU;
}

inline double gate(mmbal_activation activation, double u) {
    if (activation == MMBAL_QUICK_GELU) return 1.702 * u;
    if (activation == MMBAL_GELU) return u * u / 2;
    // (1 + tanh(z)) / 2 = sigmoid(2 z)
    if (activation == MMBAL_GELU_TANH) return 2 * std::sqrt(2 / M_PI) * (u + 0.044715 * u * u * u);
    return u;
}

inline double activation_value(mmbal_activation activation, double u) {
    switch (activation) {
    case MMBAL_QUICK_GELU:
    case MMBAL_GELU_TANH:
    case MMBAL_SILU: return u * sigmoid(gate(activation, u));
    case MMBAL_GELU: return u * std::erfc(-u / std::sqrt(2.0)) / 2;
    case MMBAL_RELU: return u > 0 ? u : 0;
    case MMBAL_RELU2: return u > 0 ? u * u : 0;
    case MMBAL_IDENTITY: return u;
    }
    return NAN;
}

inline double activation_slope(mmbal_activation activation, double u) {
    const double z = gate(activation, u), s = sigmoid(z), ds = u * s * sigmoid(-z);
    switch (activation) {
    case MMBAL_QUICK_GELU: return s + 1.702 * ds;
    case MMBAL_GELU_TANH: return s + 2 * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * u * u) * ds;
    case MMBAL_SILU: return s + ds;
    case MMBAL_GELU: return std::erfc(-u / std::sqrt(2.0)) / 2 + u * std::exp(-u * u / 2) / std::sqrt(2 * M_PI);
    case MMBAL_RELU: return u > 0 ? 1 : 0;
    case MMBAL_RELU2: return u > 0 ? 2 * u : 0;
    case MMBAL_IDENTITY: return 1;
    }
    return NAN;
}

} // namespace mmbal_test
#endif
