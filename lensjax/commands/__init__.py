"""What the commands share: options, shell completion, exit codes."""
