"""Shared by the commands: options, shell completion, exit codes."""
