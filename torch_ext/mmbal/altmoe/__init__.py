"""Alignment of any modalities, direction by direction, through one mixture of experts (Alt-MoE / M3-JEPA, arXiv
2409.05929)."""
