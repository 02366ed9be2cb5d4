"""What several test files share: tiny models, small programs, makers of golden values, and worker processes."""
