"""Device operations of FlashMemory: one folder is one op with its specification, kernel and cases."""
