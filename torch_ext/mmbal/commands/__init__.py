"""The sub-commands of ``mmbal``."""
