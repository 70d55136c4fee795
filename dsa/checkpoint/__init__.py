"""Model folders in the published format: `index` reads headers, `load` and `save` the weights."""
