"""What a model costs, counted from its config: operations, bytes, dollars; and what the report publishes."""
