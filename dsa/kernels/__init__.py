"""The operations of sparse attention, each three ways; `ops` is their one face."""
