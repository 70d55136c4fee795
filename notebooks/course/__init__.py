"""The course behind the chapters: figures, panels, exercises, real bugs, and the builder of the notebooks."""
