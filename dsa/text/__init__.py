"""What the models read, and files that are whole or not there."""
