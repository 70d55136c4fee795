"""From percent-format sources to executed notebooks, and from these to a book of pages."""
