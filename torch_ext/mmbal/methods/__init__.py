"""Methods that balance modalities while a multimodal model trains, as lines in the user's own loop."""
