"""A finished selection as text, as an HTML page, as figures, and the schema of its JSON form."""
