"""Resume a private run after a crash, without under-counting what was released."""
