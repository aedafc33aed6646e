"""How fast each part and the whole step run on the machine at hand."""
