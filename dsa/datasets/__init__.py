"""What models read: text and tokenizers, recall tasks with needles, and problems whose answers can be checked."""
