"""Standing here puts this folder on the path, so that every test file can import its neighbours (`doubles`)."""
