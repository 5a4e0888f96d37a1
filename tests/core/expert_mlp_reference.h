// expert_mlp by the formulas of its header: loops over pairs in double, nothing clever. And what calls the operator.
#ifndef MMBAL_TESTS_EXPERT_MLP_REFERENCE_H
#define MMBAL_TESTS_EXPERT_MLP_REFERENCE_H

#include <ostream>

#include "activations.h"
#include "helpers.h"
#include "mmbal/expert_mlp.h"
#include "mmbal/philox.h"
#include "mmbal/routing.h"

namespace mmbal_test {

struct Spec {
    int64_t N = 7, D = 17, F = 65, E = 4, K = 2;
    mmbal_activation activation = MMBAL_QUICK_GELU;
    double dropout = 0, output_dropout = 0;
    int64_t seed = 0, offset = 0;
    bool b1 = true, b2 = true;
    int64_t only_expert = -1; // all pairs go to it
    mmbal_expert_mlp_shape shape() const { return {N, D, F, E, K}; }
    mmbal_expert_mlp_options options() const { return {activation, dropout, output_dropout, seed, offset}; }
};

inline std::ostream &operator<<(std::ostream &out, const Spec &s) {
    return out << "N=" << s.N << " D=" << s.D << " F=" << s.F << " E=" << s.E << " K=" << s.K << " activation "
               << s.activation << " dropout " << s.dropout << ", " << s.output_dropout << " seed " << s.seed
               << " offset " << s.offset << " biases " << s.b1 << s.b2 << " only expert " << s.only_expert;
}

template <typename T>
struct Problem {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    Spec spec;
    std::vector<Stored> x, w1, b1, w2, b2, dy;
    std::vector<Real> weights;
    std::vector<int64_t> indices, permutation, offsets, inverse;
    const void *packed = nullptr;

    explicit Problem(const Spec &s, uint64_t seed = 1) : spec(s) {
        Random random(seed);
        x = random.tensor<T>(s.N * s.D, 1), dy = random.tensor<T>(s.N * s.D, 1);
        // Scales that spread the pre-activations over some [-4, 4] whatever the width is.
        w1 = random.tensor<T>(s.E * s.F * s.D, 4 / std::sqrt(static_cast<double>(s.D)));
        w2 = random.tensor<T>(s.E * s.D * s.F, 1 / std::sqrt(static_cast<double>(s.F)));
        b1 = random.tensor<T>(s.E * s.F, 1), b2 = random.tensor<T>(s.E * s.D, 1);
        for (int64_t pair = 0; pair < s.N * s.K; pair++)
            weights.push_back(pair % 11 == 5 ? 0 : static_cast<Real>(random.uniform(-0.5, 1)));
        indices = random.choices(s.N, s.K, s.E);
        if (s.only_expert >= 0) indices.assign(indices.size(), s.only_expert);
        dispatch();
    }

    void dispatch() {
        permutation.resize(spec.N * spec.K), inverse.resize(spec.N * spec.K), offsets.resize(spec.E + 1);
        EXPECT_EQ(mmbal_moe_dispatch(indices.data(), spec.N, spec.K, spec.E, permutation.data(), offsets.data(),
                                     inverse.data()),
                  MMBAL_OK);
    }

    // So many tokens to each expert, one after the other; K is 1.
    void route(const std::vector<int64_t> &rows) {
        indices.clear();
        for (int64_t e = 0; e < spec.E; e++) indices.insert(indices.end(), rows[e], e);
        ASSERT_EQ(static_cast<int64_t>(indices.size()), spec.N);
        dispatch();
    }

    mmbal_expert_mlp_inputs inputs() const {
        return {x.data(),
                w1.data(),
                spec.b1 ? b1.data() : nullptr,
                w2.data(),
                spec.b2 ? b2.data() : nullptr,
                weights.data(),
                permutation.data(),
                offsets.data(),
                inverse.data(),
                packed};
    }
};

template <typename T>
struct Forward {
    mmbal_status status;
    std::vector<typename T::Stored> y, preactivation;
    bool intact, untouched;
};

// misaligned, gradients_misaligned: bytes between the start of an aligned block and that of the workspace, of dw1 and
// dw2.
template <typename T>
Forward<T> run_forward(const Problem<T> &p, const mmbal_pool &pool = mmbal_pool_serial(), int64_t misaligned = 0) {
    const Spec &s = p.spec;
    Guarded<typename T::Stored> y(s.N * s.D), preactivation(s.N * s.K * s.F);
    Guarded<unsigned char> workspace(mmbal_expert_mlp_workspace(T::dtype, s.shape(), p.offsets.data(), pool.workers),
                                     misaligned);
    const mmbal_expert_mlp_inputs inputs = p.inputs();
    const mmbal_expert_mlp_options options = s.options();
    const mmbal_status status = mmbal_expert_mlp(T::dtype, &inputs, s.shape(), &options, y.data(), preactivation.data(),
                                                 workspace.data(), &pool);
    return {status, y.values(), preactivation.values(), y.intact() && preactivation.intact() && workspace.intact(),
            y.untouched() && preactivation.untouched()};
}

enum Wanted { DX = 1, DW1 = 2, DB1 = 4, DW2 = 8, DB2 = 16, DWEIGHTS = 32, ALL_GRADIENTS = 63 };

template <typename T>
struct Backward {
    mmbal_status status;
    std::vector<typename T::Stored> dx, dw1, db1, dw2, db2;
    std::vector<typename T::Real> dweights;
    bool intact, untouched;
};

template <typename T>
Backward<T> run_backward(const Problem<T> &p, const std::vector<typename T::Stored> &preactivation,
                         const mmbal_pool &pool = mmbal_pool_serial(), int wanted = ALL_GRADIENTS,
                         int64_t misaligned = 0, int64_t gradients_misaligned = 0) {
    const Spec &s = p.spec;
    using Stored = typename T::Stored;
    Guarded<Stored> dx(s.N * s.D), db1(s.E * s.F), db2(s.E * s.D);
    Guarded<Stored> dw1(s.E * s.F * s.D, gradients_misaligned), dw2(s.E * s.D * s.F, gradients_misaligned);
    Guarded<typename T::Real> dweights(s.N * s.K);
    Guarded<unsigned char> workspace(
        mmbal_expert_mlp_backward_workspace(T::dtype, s.shape(), p.offsets.data(), pool.workers), misaligned);
    const mmbal_expert_mlp_inputs inputs = p.inputs();
    const mmbal_expert_mlp_options options = s.options();
    const mmbal_expert_mlp_gradients gradients = {
        wanted & DX ? dx.data() : nullptr,   wanted & DW1 ? dw1.data() : nullptr,
        wanted & DB1 ? db1.data() : nullptr, wanted & DW2 ? dw2.data() : nullptr,
        wanted & DB2 ? db2.data() : nullptr, wanted & DWEIGHTS ? dweights.data() : nullptr};
    const mmbal_status status = mmbal_expert_mlp_backward(T::dtype, p.dy.data(), &inputs, preactivation.data(),
                                                          s.shape(), &options, &gradients, workspace.data(), &pool);
    return {status,
            dx.values(),
            dw1.values(),
            db1.values(),
            dw2.values(),
            db2.values(),
            dweights.values(),
            dx.intact() && dw1.intact() && db1.intact() && dw2.intact() && db2.intact() && dweights.intact() &&
                workspace.intact(),
            dx.untouched() && dw1.untouched() && db1.untouched() && dw2.untouched() && db2.untouched() &&
                dweights.untouched()};
}

// The header's rule, one element at a time: 0 or 1 / (1 - p).
inline double mask_of(const Spec &s, int tensor, int64_t element) {
    const double p = tensor == 1 ? s.dropout : s.output_dropout;
    const uint64_t block = static_cast<uint64_t>(element) / 4, seed = static_cast<uint64_t>(s.seed);
    const uint64_t offset = static_cast<uint64_t>(s.offset);
    // Words 2 and 3: the low 32 bits of offset, then its high 24 above the tensor.
    const uint32_t counter[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                 static_cast<uint32_t>(offset),
                                 static_cast<uint32_t>(offset >> 32) * 256 + static_cast<uint32_t>(tensor)};
    const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    uint32_t words[4];
    mmbal_philox4x32(counter, key, words);
    return (words[element % 4] >> 8) * 0x1p-24 >= p ? 1 / (1 - p) : 0;
}

template <typename T>
struct Reference {
    std::vector<Sum> preactivation, y, dx, dw1, db1, dw2, db2, dweights;

    // Everything after u is taken from the u that the operator returned: it is rounded, and its rounding is checked.
    Reference(const Problem<T> &p, const std::vector<typename T::Stored> &returned_u) {
        const Spec &s = p.spec;
        preactivation.resize(s.N * s.K * s.F), y.resize(s.N * s.D);
        dx.resize(s.N * s.D), dw1.resize(s.E * s.F * s.D), db1.resize(s.E * s.F);
        dw2.resize(s.E * s.D * s.F), db2.resize(s.E * s.D), dweights.resize(s.N * s.K);
        for (int64_t n = 0; n < s.N; n++)
            for (int64_t k = 0; k < s.K; k++) add_pair(p, returned_u, n, k);
    }

private:
    void add_pair(const Problem<T> &p, const std::vector<typename T::Stored> &returned_u, int64_t n, int64_t k) {
        const Spec &s = p.spec;
        const int64_t pair = n * s.K + k, e = p.indices[pair], r = p.inverse[pair];
        const double weight = p.weights[pair];
        const auto *x = p.x.data() + n * s.D, *dy = p.dy.data() + n * s.D;
        const auto *w1 = p.w1.data() + e * s.F * s.D, *w2 = p.w2.data() + e * s.D * s.F;
        const auto *b1 = p.b1.data() + e * s.F, *b2 = p.b2.data() + e * s.D;

        // u, a and activation'(u) of the pair; value and slope carry the size that their errors are proportional to.
        std::vector<Sum> value(s.F), a(s.F), slope(s.F);
        for (int64_t f = 0; f < s.F; f++) {
            for (int64_t d = 0; d < s.D; d++) preactivation[r * s.F + f].add(T::load(w1[f * s.D + d]) * T::load(x[d]));
            if (s.b1) preactivation[r * s.F + f].add(T::load(b1[f]));
            const double u = T::load(returned_u[r * s.F + f]), mask = mask_of(s, 1, pair * s.F + f);
            const double v = activation_value(s.activation, u), dv = activation_slope(s.activation, u);
            value[f].add(v, std::fabs(v) + std::fabs(u));
            slope[f].add(dv, std::fabs(dv) + 1);
            a[f].add(v * mask, value[f].magnitude * mask);
        }
        std::vector<double> g(s.D);
        for (int64_t d = 0; d < s.D; d++) {
            const double mask = mask_of(s, 2, pair * s.D + d);
            Sum o;
            for (int64_t f = 0; f < s.F; f++) {
                const double w = T::load(w2[d * s.F + f]);
                o.add(w * a[f].value, std::fabs(w) * a[f].magnitude);
            }
            if (s.b2) o.add(T::load(b2[d]));
            y[n * s.D + d].add(weight * o.value * mask, std::fabs(weight) * o.magnitude * mask);
            g[d] = T::load(dy[d]) * mask;
            if (s.b2) dweights[pair].add(g[d] * T::load(b2[d]));
            db2[e * s.D + d].add(weight * g[d]);
            for (int64_t f = 0; f < s.F; f++)
                dw2[(e * s.D + d) * s.F + f].add(weight * g[d] * a[f].value, std::fabs(weight * g[d]) * a[f].magnitude);
        }
        for (int64_t f = 0; f < s.F; f++) {
            const double mask = mask_of(s, 1, pair * s.F + f);
            Sum h;
            for (int64_t d = 0; d < s.D; d++) h.add(T::load(w2[d * s.F + f]) * g[d] * mask);
            dweights[pair].add(h.value * value[f].value, h.magnitude * value[f].magnitude);
            const double du = weight * h.value * slope[f].value;
            const double size = std::fabs(weight) * h.magnitude * slope[f].magnitude;
            db1[e * s.F + f].add(du, size);
            for (int64_t d = 0; d < s.D; d++) {
                const double w = T::load(w1[f * s.D + d]), input = T::load(x[d]);
                dx[n * s.D + d].add(w * du, std::fabs(w) * size);
                dw1[(e * s.F + f) * s.D + d].add(du * input, size * std::fabs(input));
            }
        }
    }
};

} // namespace mmbal_test
#endif
