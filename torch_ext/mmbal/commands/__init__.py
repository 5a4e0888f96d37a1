"""The commands of ``mmbal`` that work on files."""
