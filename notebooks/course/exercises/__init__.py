"""The exercises, a module or two for each chapter, with solutions, wrong answers and checkers."""
