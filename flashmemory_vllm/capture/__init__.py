"""Records what dense attention looked at while a model decoded: the data that an indexer is trained on."""
