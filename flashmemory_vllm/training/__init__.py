"""Training of the neural indexer from recorded attention."""
