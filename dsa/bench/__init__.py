"""What things cost on this machine: `cpu` and `gpu` time attention by length, `full_width` whole layers."""
