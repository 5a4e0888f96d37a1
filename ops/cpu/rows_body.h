/* The tasks of rows.h for one instruction set, VECTOR_BYTES wide, published as ROW_TASKS.
 *
 * A tile of rows [r, M] is turned on the way in and out, so that each modality is a column of its own and every loop
 * over r is one of vectors, however few modalities there are. */
#include "attribution_sample.h"
#include "element_draws.h"
#include "elementary.h"
#include "masks.h"
#include "rows.h"

typedef int32_t lane_integer_f32;
typedef int64_t lane_integer_f64;

#define BODY "columns_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "divergence_normal_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "divergence_categorical_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "btw_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "scale_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "significance_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "attribution_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "attribution_linear_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "alignment_rows_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "units_body.h"
#include "each_dtype.h"
#undef BODY
#define BODY "elements_body.h"
#include "each_dtype.h"

#define REAL float
#define NAME(f) f##_f32
#include "similarity_body.h"
#include "threshold_body.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(f) f##_f64
#include "similarity_body.h"
#include "threshold_body.h"
#undef REAL
#undef NAME

#define FOR_EACH_DTYPE(task)                                                                                           \
    {[MMBAL_F32] = task##_f32, [MMBAL_BF16] = task##_bf16, [MMBAL_F64] = task##_f64, [MMBAL_F16] = task##_f16}
const mmbal_row_tasks ROW_TASKS = {.normal_kl = FOR_EACH_DTYPE(normal_kl_task),
                                   .normal_kl_backward = FOR_EACH_DTYPE(normal_kl_backward_task),
                                   .categorical_kl = FOR_EACH_DTYPE(categorical_kl_task),
                                   .categorical_kl_backward = FOR_EACH_DTYPE(categorical_kl_backward_task),
                                   .weights = FOR_EACH_DTYPE(weights_task),
                                   .weights_backward = FOR_EACH_DTYPE(weights_backward_task),
                                   .scale = FOR_EACH_DTYPE(scale_task),
                                   .scale_dweights = FOR_EACH_DTYPE(scale_dweights_task),
                                   .cross_entropy = FOR_EACH_DTYPE(cross_entropy_task),
                                   .softmax_entropy = FOR_EACH_DTYPE(softmax_entropy_task),
                                   .attribution = FOR_EACH_DTYPE(attribution_task),
                                   .attribution_backward = FOR_EACH_DTYPE(attribution_backward_task),
                                   .attribution_second = FOR_EACH_DTYPE(attribution_second_task),
                                   .linear_scores = FOR_EACH_DTYPE(linear_scores_task),
                                   .linear_gradients = FOR_EACH_DTYPE(linear_gradients_task),
                                   .linear_zeta = FOR_EACH_DTYPE(linear_zeta_task),
                                   .linear_weights = FOR_EACH_DTYPE(linear_weights_task),
                                   .unit = FOR_EACH_DTYPE(unit_task),
                                   .regression = FOR_EACH_DTYPE(regression_task),
                                   .regression_backward = FOR_EACH_DTYPE(regression_backward_task),
                                   .unit_gradient = FOR_EACH_DTYPE(unit_gradient),
                                   .at_least = {at_least_f32, at_least_f64},
                                   .similarity_logits = {similarity_logits_f32, similarity_logits_f64},
                                   .similarity_rows = {similarity_rows_f32, similarity_rows_f64},
                                   .similarity_cols = {similarity_cols_f32, similarity_cols_f64},
                                   .similarity_gradient = {similarity_gradient_f32, similarity_gradient_f64},
                                   .squares = FOR_EACH_DTYPE(squares),
                                   .multiply = FOR_EACH_DTYPE(multiply),
                                   .element_weights = FOR_EACH_DTYPE(element_weights),
                                   .element_multiply = FOR_EACH_DTYPE(element_multiply),
                                   .add_weights = add_weights,
                                   .add_uncapped = add_uncapped,
                                   .element_keys = element_keys,
                                   .keep_smallest = keep_smallest,
                                   .keep_drawn = keep_drawn};
