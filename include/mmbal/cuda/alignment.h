/* alignment.h on a GPU; see stream.h. The pointers of mmbal_alignment and mmbal_alignment_gradients are to device
 * memory. */
#ifndef MMBAL_CUDA_ALIGNMENT_H
#define MMBAL_CUDA_ALIGNMENT_H

#include "mmbal/alignment.h"
#include "mmbal/cuda/stream.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 16; 0 where the alignment is refused. */
int64_t mmbal_align_loss_workspace_cuda(const mmbal_alignment *alignment);

mmbal_status mmbal_align_loss_cuda(const mmbal_alignment *alignment, void *loss, /* [] real, out */
                                   void *regression, void *contrastive,          /* [] real, out */
                                   void *normalizers,                            /* [2, B] real, out */
                                   void *workspace, mmbal_stream stream);

int64_t mmbal_align_loss_backward_workspace_cuda(const mmbal_alignment *alignment,
                                                 const mmbal_alignment_gradients *gradients);

mmbal_status mmbal_align_loss_backward_cuda(const mmbal_alignment *alignment, const void *dloss, /* [] real */
                                            const void *dregression, const void *dcontrastive,   /* [] real */
                                            const void *normalizers,                             /* [2, B] real */
                                            const mmbal_alignment_gradients *gradients,          /* out */
                                            void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
