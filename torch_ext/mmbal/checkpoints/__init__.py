"""CLIP checkpoints of OpenAI, transformers and open_clip, dense and as mixtures, read and written tensor by tensor."""
