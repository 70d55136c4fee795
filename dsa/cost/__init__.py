"""What attention costs: counted from a config, and as published."""
