"""What attention costs: counted from a config, measured on the machine at hand, and as published."""
