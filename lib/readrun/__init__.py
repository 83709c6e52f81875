"""Read & Run: thin helpers shared by the chapters of the book."""
