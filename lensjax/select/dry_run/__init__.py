"""What a selection would do and take, without doing it: runs, FLOPs, time, memory, disk."""
