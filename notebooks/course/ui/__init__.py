"""What every figure, panel, guess and claim of the course is made with."""
