/* Routes five tokens to two of four experts each and prints which rows every expert gets.
 *
 *     cmake --install BUILD --prefix PREFIX
 *     cmake -S examples/c -B example -Dmmbal_ROOT=PREFIX && cmake --build example && example/route_tokens
 */
#include <stdio.h>

#include <mmbal/routing.h>

enum { N = 5, E = 4, K = 2, R = N * K };

static const float logits[N * E] = {
    2.0f, 0.5f, 1.0f, -1.0f, /* prefers experts 0 and 2 */
    0.0f, 3.0f, 0.0f, 0.0f,  /* 1, then the tie goes to the lower index: 0 */
    0.1f, 0.2f, 0.3f, 0.4f,  /* 3 and 2 */
    1.0f, 1.0f, 1.0f, 1.0f,  /* 0 and 1 */
    0.0f, 0.0f, 5.0f, 4.0f,  /* 2 and 3 */
};

int main(void) {
    const mmbal_pool pool = mmbal_pool_serial();
    float weights[R];
    int64_t indices[R], permutation[R], offsets[E + 1], inverse[R];

    mmbal_status status = mmbal_moe_topk(MMBAL_F32, logits, NULL, N, E, K, 1, weights, indices, &pool);
    if (status == MMBAL_OK) status = mmbal_moe_dispatch(indices, N, K, E, permutation, offsets, inverse);
    if (status != MMBAL_OK) {
        fprintf(stderr, "route_tokens: %s\n", mmbal_status_string(status));
        return 1;
    }
    for (int e = 0; e < E; e++) {
        printf("expert %d:", e);
        for (int64_t r = offsets[e]; r < offsets[e + 1]; r++) {
            const int64_t pair = permutation[r];
            printf("  token %d (weight %.2f)", (int)(pair / K), (double)weights[pair]);
        }
        printf("\n");
    }
    return 0;
}
