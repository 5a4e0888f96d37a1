"""Multistage contrastive learning (MCL, arXiv 2402.11816): batches whose pairs fell into one cluster in every earlier
stage. What told the clusters apart cannot lower the loss any more, so the model has to use something else.

    mmbal.mcl.extract_features(model, "pairs.tsv", "f0.safetensors")         # or: mmbal mcl extract
    found = mmbal.mcl.cluster_stages([Features.load("f0.safetensors")], 3)   # or: mmbal mcl cluster
    found.save("labels.safetensors")
    sampler = mmbal.mcl.ClusterBatchSampler(mmbal.mcl.load_labels("labels.safetensors"), 100)

and a stage of fine-tuning of the base model's :func:`ffn_parameters` on these batches, which CLIP-MoE
(arXiv 2409.19291) takes its experts from.
"""

from mmbal.mcl.accumulation import accumulate_labels, merge_small_clusters
from mmbal.mcl.clustering import StageClusters, cluster_features, cluster_stage, stage_seed
from mmbal.mcl.extraction import extract_features
from mmbal.mcl.features import Features, merge_features
from mmbal.mcl.labels import ClusterLabels, cluster_stages, load_labels
from mmbal.mcl.parameters import ffn_parameters
from mmbal.mcl.sampler import ClusterBatchSampler

__all__ = [
    "ClusterBatchSampler",
    "ClusterLabels",
    "Features",
    "StageClusters",
    "accumulate_labels",
    "cluster_features",
    "cluster_stage",
    "cluster_stages",
    "extract_features",
    "ffn_parameters",
    "load_labels",
    "merge_features",
    "merge_small_clusters",
    "stage_seed",
]
