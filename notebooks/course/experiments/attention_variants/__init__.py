"""Other ways to choose what attention reads, each on the same base: the designs that chapter 12 compares."""
