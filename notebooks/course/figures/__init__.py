"""The pictures of the chapters, one module for each thing that is shown."""
