"""The operations on a processor, without gradients: less work, in buffers that are made once."""
