"""Teaching the model and its indexer."""
