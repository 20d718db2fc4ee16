"""One attention backend per platform; what they share is in `common`."""
