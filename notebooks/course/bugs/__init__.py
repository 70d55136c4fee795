"""Real mistakes, each as a patch that can be switched on: what tests must catch and readers may look at."""
